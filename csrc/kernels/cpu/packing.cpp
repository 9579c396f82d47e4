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

struct Segment {
  int64_t sequence, start, length;
};

std::vector<Segment> segments_of(const Resets& args) {
  std::vector<Segment> segments;
  for (int64_t sequence = 0; sequence < args.batch; ++sequence) {
    const int64_t length = args.lengths == nullptr ? args.steps : args.lengths[sequence];
    const bool* const own = args.resets + sequence * args.sequence_stride;
    int64_t start = 0;
    for (int64_t t = 1; t < length; ++t) {
      if (!own[t * args.step_stride]) continue;
      segments.push_back({sequence, start, t - start});
      start = t;
    }
    if (length > 0) segments.push_back({sequence, start, length - start});
  }
  return segments;
}

}  // namespace

SegmentCounts count_segments(const Resets& args) {
  SegmentCounts counts{};
  for (const Segment& segment : segments_of(args)) {
    counts.tokens += segment.length;
    ++counts.segments;
  }
  return counts;
}

void segment_order(const Resets& args, int64_t* batch_sizes, int64_t* tokens, int64_t* first, int64_t* last,
                   int64_t* sequences) {
  std::vector<Segment> segments = segments_of(args);
  std::stable_sort(segments.begin(), segments.end(),
                   [](const Segment& a, const Segment& b) { return a.length > b.length; });
  const int64_t count = static_cast<int64_t>(segments.size());
  for (int64_t row = 0; row < count; ++row) {
    const Segment& segment = segments[row];
    sequences[row] = segment.sequence;
    if (segment.start == 0) first[segment.sequence] = row;
    const int64_t length = args.lengths == nullptr ? args.steps : args.lengths[segment.sequence];
    if (segment.start + segment.length == length) last[segment.sequence] = row;
  }
  int64_t rows = count;
  for (int64_t t = 0; t < args.steps; ++t) {
    while (rows > 0 && segments[rows - 1].length <= t) --rows;
    batch_sizes[t] = rows;
    for (int64_t row = 0; row < rows; ++row) {
      const Segment& segment = segments[row];
      *tokens++ = (segment.start + t) * args.step_stride + segment.sequence * args.sequence_stride;
    }
  }
}

void packing_order(const int64_t* lengths, int64_t batch, int64_t steps, int64_t* batch_sizes, int64_t* sorted_indices,
                   int64_t* unsorted_indices) {
  std::iota(sorted_indices, sorted_indices + batch, 0);
  // Not std::stable_sort, which takes memory of its own.
  std::sort(sorted_indices, sorted_indices + batch,
            [lengths](int64_t a, int64_t b) { return lengths[a] != lengths[b] ? lengths[a] > lengths[b] : a < b; });
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
