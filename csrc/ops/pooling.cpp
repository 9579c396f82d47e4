#include "kernels/pooling.h"

#include <memory>

#include "batch.h"
#include "tensors.h"

namespace pymtl::ops {
namespace {

Pooling kind_of(const std::string& kind) {
  check(kind == "mean" || kind == "max", "kind: expected 'mean' or 'max', got '", kind, "'");
  return kind == "mean" ? Pooling::mean : Pooling::max;
}

RnnShape shape_of(const Batch& batch, int64_t recurrences, int64_t features) {
  return {
      recurrences, batch.steps, batch.batch, batch.tokens, 0, features / recurrences, read<int64_t>(batch.batch_sizes)};
}

std::tuple<Tensor, Tensor> pool(Tensor given_input, OptionalTensor batch_sizes, std::vector<bool> reverse,
                                std::string kind) {
  return with_real_type(given_input, "input", [&]<typename T>() {
    const Pooling pooling = kind_of(kind);
    const Batch batch(given_input, batch_sizes);
    const int64_t features = given_input.size(given_input.dim() - 1);
    const int64_t recurrences = static_cast<int64_t>(reverse.size());
    check(recurrences > 0 && features % recurrences == 0, "reverse: expected a number of flags that divides ", "the ",
          features, " features, got ", recurrences);
    const Tensor input = checked(given_input, "input", given_input.scalar_type(), batch.with(features));
    const Tensor output = make(input, {batch.batch, features});
    const Tensor argmax = make(input, {pooling == Pooling::max ? batch.batch : 0, features}, ScalarType::Long);
    const auto flags = std::make_unique<bool[]>(reverse.size());
    std::copy(reverse.begin(), reverse.end(), flags.get());
    if (output.numel() > 0) {
      pool_forward(Pool<T>{shape_of(batch, recurrences, features), flags.get(), pooling, read<T>(input),
                           write<T>(output), write<int64_t>(argmax)},
                   torch_executor());
    }
    return std::make_tuple(output, argmax);
  });
}

Tensor pool_backward(Tensor given_grad_output, OptionalTensor batch_sizes, Tensor given_argmax,
                     std::vector<int64_t> size, std::string kind) {
  return with_real_type(given_grad_output, "grad_output", [&]<typename T>() {
    const Pooling pooling = kind_of(kind);
    check(!size.empty(), "size: expected the size of the pooled input, got none");
    const Tensor grad_input = make(given_grad_output, size);
    const Batch batch(grad_input, batch_sizes);
    const int64_t features = size.back();
    const Tensor grad_output =
        checked(given_grad_output, "grad_output", given_grad_output.scalar_type(), {batch.batch, features});
    const Tensor argmax =
        checked(given_argmax, "argmax", ScalarType::Long, {pooling == Pooling::max ? batch.batch : 0, features});
    const int64_t* const tokens = read<int64_t>(argmax);
    for (int64_t i = 0; i < argmax.numel(); ++i) {
      check(tokens[i] >= 0 && tokens[i] < batch.tokens, "argmax: expected tokens below ", batch.tokens, ", got ",
            tokens[i]);
    }
    if (grad_input.numel() > 0) {
      pool_backward(
          PoolBackward<T>{shape_of(batch, 1, features), pooling, read<T>(grad_output), tokens, write<T>(grad_input)},
          torch_executor());
    }
    return grad_input;
  });
}

}  // namespace
}  // namespace pymtl::ops

STABLE_TORCH_LIBRARY_IMPL(pymtl, CPU, m) {
  m.impl("pool", TORCH_BOX(&pymtl::ops::pool));
  m.impl("pool_backward", TORCH_BOX(&pymtl::ops::pool_backward));
}
