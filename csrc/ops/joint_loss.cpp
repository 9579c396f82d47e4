#include "kernels/joint_loss.h"

#include <algorithm>

#include "loss_tasks.h"
#include "scratch.h"

namespace pymtl::ops {
namespace {

std::tuple<Tensor, Tensors, Tensor> joint_loss(Tensors logits, Tensors targets, std::vector<std::string> kinds,
                                               Tensors weights, std::vector<int64_t> ignore_index,
                                               std::vector<double> label_smoothing, bool gradients) {
  check(!logits.empty(), "logits: expected at least one task, got none");
  check_cpu(logits[0], Name("logits", 0));
  return with_real_type(logits[0], "logits[0]", [&]<typename T>() {
    const LossTasks<T> all(logits, targets, kinds, weights, ignore_index, label_smoothing, gradients);
    for (size_t k = 0; k < all.tasks.size(); ++k) {
      const LossTask<T>& task = all.tasks[k];
      const int64_t bad = first_bad_target(task);
      check(bad < 0, Name("targets", k), ": expected classes from 0 to ", task.classes - 1, " or ignore_index ",
            task.ignore_index, ", got ", bad < 0 ? 0 : task.class_targets[bad], " at row ", bad, ", out of bounds");
    }
    const Scratch workspace(joint_loss_workspace(all.tasks.data(), all.count()));
    pymtl::joint_loss(all.tasks.data(), all.count(), workspace.memory(), torch_executor());
    const Tensor bad_rows = make(logits[0], {all.count()}, ScalarType::Long);
    std::fill_n(write<int64_t>(bad_rows), all.count(), -1);
    return std::make_tuple(all.losses, all.grads, bad_rows);
  });
}

}  // namespace
}  // namespace pymtl::ops

STABLE_TORCH_LIBRARY_IMPL(pymtl, CPU, m) { m.impl("joint_loss", TORCH_BOX(&pymtl::ops::joint_loss)); }
