#include "kernels/cuda/pooling.h"

#include "ops/cuda/batch.h"
#include "ops/cuda/dtypes.h"

namespace pymtl::ops::cuda {
namespace {

Pooling kind_of(const std::string& kind) {
  check(kind == "mean" || kind == "max", "kind: expected 'mean' or 'max', got '", kind, "'");
  return kind == "mean" ? Pooling::mean : Pooling::max;
}

std::tuple<Tensor, Tensor> pool(Tensor given_input, OptionalTensor batch_sizes, std::vector<bool> reverse,
                                std::string kind) {
  return with_any_type(given_input, "input", [&]<typename T>() {
    const Stream stream(given_input);
    const Pooling pooling = kind_of(kind);
    const Batch batch(given_input, batch_sizes, std::nullopt, stream);
    check(batch.exact(), "batch_sizes: expected them on the CPU, got them on the GPU");
    const int64_t features = given_input.size(given_input.dim() - 1);
    const int64_t recurrences = static_cast<int64_t>(reverse.size());
    check(recurrences > 0 && features % recurrences == 0, "reverse: expected a number of flags that divides the ",
          features, " features, got ", recurrences);
    check(recurrences <= pymtl::cuda::kPooledRecurrences, "reverse: expected at most ", pymtl::cuda::kPooledRecurrences,
          " flags on the GPU, got ", recurrences);
    const Tensor input = checked(given_input, "input", given_input.scalar_type(), batch.with(features), given_input);
    const Tensor output = make(input, {batch.batch, features});
    const Tensor argmax = make(input, {pooling == Pooling::max ? batch.batch : 0, features}, ScalarType::Long);
    uint64_t bits = 0;
    for (size_t g = 0; g < reverse.size(); ++g) bits |= static_cast<uint64_t>(reverse[g] ? 1 : 0) << g;
    if (output.numel() > 0) {
      pymtl::cuda::pool_forward(
          pymtl::cuda::Pool<T>{batch.steps, batch.batch, batch.tokens, batch.sizes(), batch.ends(), recurrences,
                               features, bits, pooling, read<T>(input), write<T>(output), write<int64_t>(argmax)},
          stream.get());
    }
    return std::make_tuple(output, argmax);
  });
}

Tensor pool_backward(Tensor given_grad_output, OptionalTensor batch_sizes, Tensor given_argmax,
                     std::vector<int64_t> size, std::string kind) {
  return with_any_type(given_grad_output, "grad_output", [&]<typename T>() {
    const Stream stream(given_grad_output);
    const Pooling pooling = kind_of(kind);
    check(!size.empty(), "size: expected the size of the pooled input, got none");
    const Tensor grad_input = make(given_grad_output, size);
    const Batch batch(grad_input, batch_sizes, std::nullopt, stream);
    const int64_t features = size.back();
    const Tensor grad_output =
        checked(given_grad_output, "grad_output", given_grad_output.scalar_type(), {batch.batch, features}, grad_input);
    const Tensor argmax = checked(given_argmax, "argmax", ScalarType::Long,
                                  {pooling == Pooling::max ? batch.batch : 0, features}, grad_input);
    if (grad_input.numel() > 0) {
      pymtl::cuda::pool_backward(
          pymtl::cuda::PoolBackward<T>{batch.steps, batch.batch, batch.tokens, batch.sizes(), batch.ends(), features,
                                       pooling, read<T>(grad_output), read<int64_t>(argmax), write<T>(grad_input)},
          stream.get());
    }
    return grad_input;
  });
}

}  // namespace
}  // namespace pymtl::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(pymtl, PYMTL_DISPATCH_KEY, m) {
  m.impl("pool", TORCH_BOX(&pymtl::ops::cuda::pool));
  m.impl("pool_backward", TORCH_BOX(&pymtl::ops::cuda::pool_backward));
}
