#include "kernels/cuda/peak.h"

#include "ops/cuda/stream.h"

namespace pymtl::ops::cuda {
namespace {

void cluster_rounds(Tensor like, int64_t blocks, int64_t rounds, bool messages) {
  check(blocks >= 1 && blocks <= 16, "blocks: expected a number from 1 to 16, got ", blocks);
  check(rounds >= 0 && rounds < INT32_MAX, "rounds: expected a number from 0 below 2^31, got ", rounds);
  const Stream stream(like);
  pymtl::cuda::cluster_rounds(static_cast<int>(blocks), rounds, messages, stream.get());
}

}  // namespace
}  // namespace pymtl::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(pymtl, PYMTL_DISPATCH_KEY, m) {
  m.impl("cluster_rounds", TORCH_BOX(&pymtl::ops::cuda::cluster_rounds));
}
