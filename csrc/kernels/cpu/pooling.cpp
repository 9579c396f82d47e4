#include "../pooling.h"

#include <algorithm>

#include "kernels.h"
#include "schedule.h"

namespace pymtl {
template <typename T>
void pool_forward(const Pool<T>& args, const Executor& given) {
  StepStarts starts(args.shape);
  const Executor executor = executor_for(args.shape.tokens * args.shape.recurrences * args.shape.hidden_size, given);
  for_each(executor, args.shape.batch,
           [&](int64_t row) { active_kernels().of<T>().pool_rows(args, starts.data(), row, row + 1); });
}

template <typename T>
void pool_backward(const PoolBackward<T>& args, const Executor& given) {
  StepStarts starts(args.shape);
  const int64_t width = args.shape.recurrences * args.shape.hidden_size;
  const Executor executor = executor_for(args.shape.tokens * width, given);
  for_each(executor, args.shape.batch, [&](int64_t row) {
    int64_t length = 0;
    while (length < args.shape.steps && starts[length + 1] - starts[length] > row) ++length;
    const T* const grad = args.grad_output + row * width;
    for (int64_t t = 0; t < length; ++t) {
      T* const to = args.grad_input + (starts[t] + row) * width;
      if (args.kind == Pooling::mean) {
        for (int64_t c = 0; c < width; ++c) to[c] = grad[c] / static_cast<T>(length);
      } else {
        std::fill(to, to + width, T(0));
      }
    }
    if (args.kind == Pooling::max) {
      for (int64_t c = 0; c < width; ++c) args.grad_input[args.argmax[row * width + c] * width + c] = grad[c];
    }
  });
}

template <typename T>
void attention_pool_forward(const AttentionPool<T>& args, const Executor& given) {
  StepStarts starts(args.shape);
  const Executor executor = executor_for(args.shape.tokens * args.shape.hidden_size, given);
  for_each(executor, args.shape.batch,
           [&](int64_t row) { active_kernels().of<T>().attention_pool_row(args, starts.data(), row); });
}

template <typename T>
void attention_pool_backward(const AttentionPoolBackward<T>& args, const Executor& given) {
  const RnnShape& shape = args.forward.shape;
  StepStarts starts(shape);
  const Executor executor = executor_for(2 * shape.tokens * shape.hidden_size, given);
  for_each(executor, shape.batch,
           [&](int64_t row) { active_kernels().of<T>().attention_pool_gradient(args, starts.data(), row); });
}

template void attention_pool_forward(const AttentionPool<float>&, const Executor&);
template void attention_pool_forward(const AttentionPool<double>&, const Executor&);
template void attention_pool_backward(const AttentionPoolBackward<float>&, const Executor&);
template void attention_pool_backward(const AttentionPoolBackward<double>&, const Executor&);
template void pool_forward(const Pool<float>&, const Executor&);
template void pool_forward(const Pool<double>&, const Executor&);
template void pool_backward(const PoolBackward<float>&, const Executor&);
template void pool_backward(const PoolBackward<double>&, const Executor&);

}  // namespace pymtl
