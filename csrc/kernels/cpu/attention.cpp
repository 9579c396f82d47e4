#include "../attention.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "schedule.h"

namespace pymtl {
namespace {

// Multiply-adds of all queries' scores and means, were all sequences as long as the longest.
template <typename T>
int64_t work_of(const Attention<T>& args) {
  return args.queries * args.shape.steps * (args.key_size + args.shape.hidden_size);
}

// The queries of each sequence, in their order: those of sequence b are order[starts[b]] to order[starts[b + 1] - 1].
struct Grouped {
  static int64_t numbers(int64_t queries, int64_t batch) { return queries + batch + 2; }

  int64_t* starts;  // [B + 1]
  int64_t* order;   // [M]

  // memory: numbers(queries, batch) of them.
  Grouped(const int64_t* sequences, int64_t queries, int64_t batch, int64_t* memory)
      : starts(memory), order(memory + batch + 2) {
    std::fill_n(starts, batch + 2, int64_t{0});
    // starts[b + 1] is where sequence b begins; putting its queries there moves it to where b + 1 begins.
    for (int64_t m = 0; m < queries; ++m) ++starts[sequences[m] + 2];
    for (int64_t b = 1; b <= batch; ++b) starts[b + 1] += starts[b];
    for (int64_t m = 0; m < queries; ++m) order[starts[sequences[m] + 1]++] = m;
  }
};

}  // namespace

template <typename T>
size_t attention_workspace(const AttentionForward<T>& args) {
  return static_cast<size_t>(Grouped::numbers(args.queries, args.shape.batch)) * sizeof(int64_t);
}

template <typename T>
void attention_forward(const AttentionForward<T>& args, void* workspace, const Executor& given) {
  StepStarts starts(args.shape);
  // Queries of one sequence one after the other: its keys and values stay in the cache.
  const Grouped grouped(args.sequences, args.queries, args.shape.batch, static_cast<int64_t*>(workspace));
  const Executor executor = executor_for(work_of(args), given);
  for_each(executor, args.shape.batch, [&](int64_t row) {
    for (int64_t i = grouped.starts[row]; i < grouped.starts[row + 1]; ++i) {
      active_kernels().of<T>().attention_query(args, starts.data(), grouped.order[i]);
    }
  });
}

template <typename T>
void attention_backward(const AttentionBackward<T>& args, const Executor& given) {
  StepStarts starts(args.shape);
  std::vector<int64_t> order(static_cast<size_t>(Grouped::numbers(args.queries, args.shape.batch)));
  const Grouped grouped(args.sequences, args.queries, args.shape.batch, order.data());
  const bool additive = args.score != nullptr;
  std::vector<T> parts(additive ? static_cast<size_t>(args.shape.batch * args.key_size) : 0);
  const Executor executor = executor_for(3 * work_of(args), given);
  for_each(executor, args.shape.batch, [&](int64_t row) {
    std::vector<T> scores(static_cast<size_t>(args.shape.steps));
    active_kernels().of<T>().attention_gradient(args, starts.data(), row, grouped.order + grouped.starts[row],
                                                grouped.starts[row + 1] - grouped.starts[row], scores.data(),
                                                additive ? parts.data() + row * args.key_size : nullptr);
  });
  if (!additive) return;
  std::fill_n(args.grad_score, args.key_size, T(0));
  for (int64_t row = 0; row < args.shape.batch; ++row) {
    for (int64_t d = 0; d < args.key_size; ++d) args.grad_score[d] += parts[row * args.key_size + d];
  }
}

template size_t attention_workspace(const AttentionForward<float>&);
template size_t attention_workspace(const AttentionForward<double>&);
template void attention_forward(const AttentionForward<float>&, void*, const Executor&);
template void attention_forward(const AttentionForward<double>&, void*, const Executor&);
template void attention_backward(const AttentionBackward<float>&, const Executor&);
template void attention_backward(const AttentionBackward<double>&, const Executor&);

}  // namespace pymtl
