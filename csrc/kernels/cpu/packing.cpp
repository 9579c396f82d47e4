#include "../packing.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "schedule.h"

namespace pymtl {
namespace {

// Calls move(packed offset, padded offset) in bytes for every token; a task is a block of steps.
template <typename Move>
void for_each_token(const Packing& args, const Executor& given, Move&& move) {
  constexpr int64_t kBlock = 16;
  std::vector<int64_t> starts(static_cast<size_t>(args.steps) + 1, 0);
  for (int64_t t = 0; t < args.steps; ++t) starts[t + 1] = starts[t] + args.batch_sizes[t];
  // A byte costs about a multiply-add.
  const Executor executor = executor_for(starts[args.steps] * args.row_bytes / 4, given);
  for_each(executor, (args.steps + kBlock - 1) / kBlock, [&](int64_t block) {
    for (int64_t t = block * kBlock; t < std::min((block + 1) * kBlock, args.steps); ++t) {
      for (int64_t row = 0; row < args.batch_sizes[t]; ++row) {
        const int64_t sequence = args.sorted_indices == nullptr ? row : args.sorted_indices[row];
        move((starts[t] + row) * args.row_bytes, t * args.step_stride + sequence * args.sequence_stride);
      }
    }
  });
}

}  // namespace

void packing_order(const int64_t* lengths, int64_t batch, int64_t steps, int64_t* batch_sizes, int64_t* sorted_indices,
                   int64_t* unsorted_indices) {
  std::iota(sorted_indices, sorted_indices + batch, 0);
  std::stable_sort(sorted_indices, sorted_indices + batch,
                   [lengths](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  for (int64_t row = 0; row < batch; ++row) unsorted_indices[sorted_indices[row]] = row;
  int64_t row = batch;
  for (int64_t t = 0; t < steps; ++t) {
    while (row > 0 && lengths[sorted_indices[row - 1]] <= t) --row;
    batch_sizes[t] = row;
  }
}

void pack(const Packing& args, const void* padded, void* packed, const Executor& executor) {
  for_each_token(args, executor, [&](int64_t packed_at, int64_t padded_at) {
    std::memcpy(static_cast<char*>(packed) + packed_at, static_cast<const char*>(padded) + padded_at,
                static_cast<size_t>(args.row_bytes));
  });
}

void unpack(const Packing& args, const void* packed, void* padded, const Executor& executor) {
  for_each_token(args, executor, [&](int64_t packed_at, int64_t padded_at) {
    std::memcpy(static_cast<char*>(padded) + padded_at, static_cast<const char*>(packed) + packed_at,
                static_cast<size_t>(args.row_bytes));
  });
  for (int64_t t = 0; t < args.steps; ++t) {
    for (int64_t row = args.batch_sizes[t]; row < args.batch; ++row) {
      const int64_t sequence = args.sorted_indices == nullptr ? row : args.sorted_indices[row];
      std::memset(static_cast<char*>(padded) + t * args.step_stride + sequence * args.sequence_stride, 0,
                  static_cast<size_t>(args.row_bytes));
    }
  }
}

}  // namespace pymtl
