#include "kernels/cuda/joint_loss.h"

#include "ops/cuda/dtypes.h"
#include "ops/cuda/stream.h"
#include "ops/loss_tasks.h"

namespace pymtl::ops::cuda {
namespace {

std::tuple<Tensor, Tensors, Tensor> joint_loss(Tensors logits, Tensors targets, std::vector<std::string> kinds,
                                               Tensors weights, std::vector<int64_t> ignore_index,
                                               std::vector<double> label_smoothing, bool gradients) {
  check(!logits.empty(), "logits: expected at least one task, got none");
  return with_any_type(logits[0], "logits[0]", [&]<typename T>() {
    const Stream stream(logits[0]);
    const LossTasks<T> all(logits, targets, kinds, weights, ignore_index, label_smoothing, gradients);
    const int64_t numbers = pymtl::cuda::joint_loss_workspace(all.tasks.data(), all.count());
    const Tensor workspace = make(logits[0], {numbers}, ScalarType::Double);
    const Tensor bad_rows = make(logits[0], {all.count()}, ScalarType::Long);
    pymtl::cuda::joint_loss(all.tasks.data(), all.count(), write<int64_t>(bad_rows), write<double>(workspace),
                            stream.get());
    return std::make_tuple(all.losses, all.grads, bad_rows);
  });
}

}  // namespace
}  // namespace pymtl::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(pymtl, PYMTL_DISPATCH_KEY, m) {
  m.impl("joint_loss", TORCH_BOX(&pymtl::ops::cuda::joint_loss));
}
