#include "kernels/joint_loss.h"

#include "scratch.h"
#include "tensors.h"

namespace pymtl::ops {
namespace {

Loss kind_of(const std::string& kind) {
  if (kind == "cross_entropy") return Loss::cross_entropy;
  if (kind == "mean_squared_error") return Loss::mean_squared_error;
  check(kind == "binary_cross_entropy",
        "kinds: expected 'cross_entropy', 'mean_squared_error' or 'binary_cross_entropy', got '", kind, "'");
  return Loss::binary_cross_entropy;
}

std::tuple<Tensor, Tensors> joint_loss(Tensors logits, Tensors targets, std::vector<std::string> kinds, Tensors weights,
                                       std::vector<int64_t> ignore_index, std::vector<double> label_smoothing,
                                       bool gradients) {
  const size_t count = logits.size();
  check(count > 0, "logits: expected at least one task, got none");
  check(targets.size() == count, "targets: expected ", count, " tensors, got ", targets.size());
  check(kinds.size() == count, "kinds: expected ", count, " names, got ", kinds.size());
  check(weights.size() == count, "weights: expected ", count, " tensors, got ", weights.size());
  check(ignore_index.size() == count, "ignore_index: expected ", count, " numbers, got ", ignore_index.size());
  check(label_smoothing.size() == count, "label_smoothing: expected ", count, " numbers, got ", label_smoothing.size());
  return with_real_type(logits[0], "logits[0]", [&]<typename T>() {
    const ScalarType type = logits[0].scalar_type();
    const Tensor losses = make(logits[0], {static_cast<int64_t>(count)});
    Tensors grads;
    Tensors kept;
    std::vector<LossTask<T>> tasks;
    for (size_t k = 0; k < count; ++k) {
      LossTask<T> task{};
      task.kind = kind_of(kinds[k]);
      check(logits[k].dim() == 2, Name("logits", k), ": expected [rows, classes], got ", logits[k].dim(), "-D");
      task.rows = logits[k].size(0);
      task.classes = logits[k].size(1);
      // A slice of the columns of stacked logits is read where it is.
      const bool rows_contiguous = logits[k].is_cpu() && logits[k].stride(1) == 1;
      check_cpu(logits[k], Name("logits", k));
      check_type(logits[k], Name("logits", k), type);
      kept.push_back(rows_contiguous ? logits[k] : torch::stable::contiguous(logits[k]));
      task.logits = read<T>(kept.back());
      task.row_stride = rows_contiguous ? logits[k].stride(0) : task.classes;
      if (task.kind == Loss::cross_entropy) {
        kept.push_back(checked(targets[k], Name("targets", k), ScalarType::Long, {task.rows}));
        task.class_targets = read<int64_t>(kept.back());
      } else {
        kept.push_back(checked(targets[k], Name("targets", k), type, {task.rows, task.classes}));
        task.value_targets = read<T>(kept.back());
      }
      if (weights[k].numel() > 0) {
        kept.push_back(checked(weights[k], Name("weights", k), type, {task.classes}));
        task.weight = read<T>(kept.back());
      }
      check(label_smoothing[k] >= 0 && label_smoothing[k] <= 1, Name("label_smoothing", k),
            ": expected a number from 0 to 1, got ", label_smoothing[k]);
      task.ignore_index = ignore_index[k];
      task.label_smoothing = label_smoothing[k];
      const int64_t bad = first_bad_target(task);
      check(bad < 0, Name("targets", k), ": expected classes from 0 to ", task.classes - 1, " or ignore_index ",
            task.ignore_index, ", got ", bad < 0 ? 0 : task.class_targets[bad], " at row ", bad, ", out of bounds");
      task.loss = write<T>(losses) + k;
      if (gradients) {
        grads.push_back(make(logits[0], {task.rows, task.classes}));
        task.grad = write<T>(grads.back());
      }
      tasks.push_back(task);
    }
    const Scratch workspace(joint_loss_workspace(tasks.data(), tasks.size()));
    pymtl::joint_loss(tasks.data(), static_cast<int64_t>(tasks.size()), workspace.memory(), torch_executor());
    return std::make_tuple(losses, grads);
  });
}

}  // namespace
}  // namespace pymtl::ops

STABLE_TORCH_LIBRARY_IMPL(pymtl, CPU, m) { m.impl("joint_loss", TORCH_BOX(&pymtl::ops::joint_loss)); }
