#include "kernels/cuda/pooling.h"
#include "kernels/cuda/tokens.h"

namespace pymtl::cuda {
namespace {

template <typename Args>
__host__ __device__ Tokens tokens_of(const Args& args) {
  return {args.steps, args.batch, args.tokens, args.batch_sizes, args.ends};
}

// A thread for each feature of each sequence; threads side by side read features side by side.
template <typename T>
__global__ void pool(const __grid_constant__ Pool<T> args) {
  const Tokens tokens = tokens_of(args);
  const int64_t stride = block_count() * block_threads();
  for (int64_t i = block_index() * block_threads() + thread_index(); i < args.batch * args.features; i += stride) {
    const int64_t sequence = i / args.features;
    const int64_t feature = i % args.features;
    const bool reverse = (args.reverse >> (feature / (args.features / args.recurrences)) & 1U) != 0;
    const int64_t length = tokens.length(sequence);
    const bool mean = args.kind == Pooling::mean;
    Accum<T> value = mean ? Accum<T>(0) : -static_cast<Accum<T>>(__builtin_inff());
    Accum<T> error = 0;
    int64_t best = 0;
    for (int64_t k = 0; k < length; ++k) {
      const int64_t token = tokens.start(reverse ? length - 1 - k : k) + sequence;
      const Accum<T> h = to_accum(args.input[token * args.features + feature]);
      if (mean) {  // with the rounding errors carried along
        const Accum<T> term = h - error;
        const Accum<T> sum = value + term;
        error = sum - value - term;
        if (error != error) error = 0;  // an infinite sum has no error, and stays infinite
        value = sum;
        continue;
      }
      // The first token, then every one that is greater; a NaN once.
      if (k == 0 || h > value || (h != h && value == value)) {
        best = token;
        value = h;
      }
    }
    args.output[i] = from_accum<T>(mean && length > 0 ? value / static_cast<Accum<T>>(length) : value);
    if (!mean) args.argmax[i] = best;
  }
}

template <typename T>
__global__ void pool_gradient(const __grid_constant__ PoolBackward<T> args) {
  const Tokens tokens = tokens_of(args);
  for (int64_t token = first_row(); token < args.tokens; token += row_stride()) {
    const int64_t step = tokens.step_of(token);
    const bool there = step < tokens.steps;
    const int64_t sequence = there ? token - tokens.start(step) : 0;
    const bool mean = args.kind == Pooling::mean;
    const Accum<T> length = mean ? static_cast<Accum<T>>(tokens.length(sequence)) : Accum<T>(1);
    for (int64_t feature = lane_index(); feature < args.features; feature += kWarp) {
      const int64_t from = sequence * args.features + feature;
      const bool chosen = there && (mean || args.argmax[from] == token);
      const Accum<T> grad = chosen ? to_accum(args.grad_output[from]) / length : Accum<T>(0);
      args.grad_input[token * args.features + feature] = from_accum<T>(grad);
    }
  }
}

}  // namespace

template <typename T>
void pool_forward(const Pool<T>& args, void* stream) {
  const int64_t threads = args.batch * args.features;
  launch(pool<T>, grid_of_rows((threads + kWarp - 1) / kWarp), static_cast<Stream>(stream), args);
}

template <typename T>
void pool_backward(const PoolBackward<T>& args, void* stream) {
  launch(pool_gradient<T>, grid_of_rows(args.tokens), static_cast<Stream>(stream), args);
}

#define PYMTL_INSTANTIATE(T)                         \
  template void pool_forward(const Pool<T>&, void*); \
  template void pool_backward(const PoolBackward<T>&, void*);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(double)
PYMTL_INSTANTIATE(BFloat16)
PYMTL_INSTANTIATE(Float16)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl::cuda
