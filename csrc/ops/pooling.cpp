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

// Checked arguments of attention_pool, without where its result goes.
template <typename T>
struct AttentionCall {
  Batch batch;
  Tensor input, scores;
  AttentionPool<T> args{};

  AttentionCall(const Tensor& given_input, const Tensor& given_scores, const Tensor& batch_sizes)
      : batch(given_input, batch_sizes), input(given_input), scores(given_scores) {
    const int64_t features = given_input.size(1);
    check(given_scores.dim() == 2, "scores: expected [tokens, heads], got ", given_scores.dim(), "-D");
    const int64_t heads = given_scores.size(1);
    check(heads > 0 && features % heads == 0, "scores: expected a number of heads that divides the ", features,
          " features, got ", heads);
    const ScalarType type = given_input.scalar_type();
    input = checked(given_input, "input", type, {batch.tokens, features});
    scores = checked(given_scores, "scores", type, {batch.tokens, heads});
    args.shape = shape_of(batch, 1, features);
    args.heads = heads;
    args.input = read<T>(input);
    args.scores = read<T>(scores);
  }
};

Tensor attention_pool(Tensor input, Tensor scores, Tensor batch_sizes) {
  return with_real_type(input, "input", [&]<typename T>() {
    AttentionCall<T> call(input, scores, batch_sizes);
    const Tensor output = make(call.input, {call.batch.batch, call.input.size(1)});
    call.args.output = write<T>(output);
    if (output.numel() > 0) attention_pool_forward(call.args, torch_executor());
    return output;
  });
}

std::tuple<Tensor, Tensor> attention_pool_backward(Tensor given_grad_output, Tensor input, Tensor scores,
                                                   Tensor batch_sizes) {
  return with_real_type(input, "input", [&]<typename T>() {
    const AttentionCall<T> call(input, scores, batch_sizes);
    const Tensor grad_output =
        checked(given_grad_output, "grad_output", call.input.scalar_type(), {call.batch.batch, call.input.size(1)});
    const Tensor grad_input = make(call.input, sizes_of(call.input));
    const Tensor grad_scores = make(call.input, sizes_of(call.scores));
    if (grad_input.numel() > 0) {
      pymtl::attention_pool_backward(
          AttentionPoolBackward<T>{call.args, read<T>(grad_output), write<T>(grad_input), write<T>(grad_scores)},
          torch_executor());
    }
    return std::make_tuple(grad_input, grad_scores);
  });
}

}  // namespace
}  // namespace pymtl::ops

STABLE_TORCH_LIBRARY_IMPL(pymtl, CPU, m) {
  m.impl("pool", TORCH_BOX(&pymtl::ops::pool));
  m.impl("pool_backward", TORCH_BOX(&pymtl::ops::pool_backward));
  m.impl("attention_pool", TORCH_BOX(&pymtl::ops::attention_pool));
  m.impl("attention_pool_backward", TORCH_BOX(&pymtl::ops::attention_pool_backward));
}
