// How the sequences of a packed batch are shared out among workers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../executor.h"
#include "../rnn.h"

namespace pymtl {

// Below this many multiply-adds a call is over before a second thread has woken up.
constexpr int64_t kWorthSharing = 128 * 1024;

// The caller's executor, or one of a single thread if `work` multiply-adds are too few to share.
inline Executor executor_for(int64_t work, const Executor& executor) {
  return work < kWorthSharing ? Executor{serially, 1} : executor;
}

// starts [steps + 1]: the first token of each step.
inline void fill_starts(const RnnShape& shape, int64_t* starts) {
  starts[0] = 0;
  for (int64_t t = 0; t < shape.steps; ++t) {
    starts[t + 1] = starts[t] + (shape.batch_sizes == nullptr ? shape.batch : shape.batch_sizes[t]);
  }
}

// The first token of each step: of short sequences without memory of its own.
class StepStarts {
 public:
  explicit StepStarts(const RnnShape& shape) {
    if (shape.steps >= kFew) many_.resize(static_cast<size_t>(shape.steps) + 1);
    fill_starts(shape, data());
  }

  int64_t* data() { return many_.empty() ? few_ : many_.data(); }
  int64_t operator[](int64_t step) { return data()[step]; }

 private:
  static constexpr int64_t kFew = 256;
  int64_t few_[kFew];
  std::vector<int64_t> many_;
};

// How many workers each recurrence has so that the tasks fill all threads.
inline int64_t worker_count(const RnnShape& shape, const Executor& executor) {
  const int64_t threads = std::max<int64_t>(executor.threads, 1);
  return threads / std::gcd(threads, std::max<int64_t>(shape.recurrences, 1));
}

// Into how many slices of sequences each recurrence is cut.
inline int64_t slice_count(const RnnShape& shape, const Executor& executor) {
  return std::max<int64_t>(1, std::min(worker_count(shape, executor), shape.batch));
}

// bounds [slices + 1]: slice s holds sequences [bounds[s], bounds[s + 1]), about as many tokens as any other.
inline void fill_bounds(const RnnShape& shape, const int64_t* starts, int64_t slices, int64_t* bounds) {
  const int64_t tokens = starts[shape.steps];
  int64_t length = shape.steps;
  int64_t before = 0;
  int64_t slice = 1;
  bounds[0] = 0;
  for (int64_t row = 0; row < shape.batch && slice < slices; ++row) {
    while (length > 0 && starts[length] - starts[length - 1] <= row) --length;
    before += length;
    while (slice < slices && before * slices >= tokens * slice) bounds[slice++] = row + 1;
  }
  while (slice <= slices) bounds[slice++] = shape.batch;
}

// Where part `part` of `parts` equal shares of `count` begins, in whole groups of twelve: tiles' rows on every
// instruction set.
inline int64_t share(int64_t count, int64_t part, int64_t parts) {
  constexpr int64_t kGroup = 12;
  const int64_t groups = (count + kGroup - 1) / kGroup;
  return std::min(count, groups * part / parts * kGroup);
}

inline int64_t largest_share(int64_t count, int64_t parts) {
  int64_t largest = 0;
  for (int64_t part = 0; part < parts; ++part) {
    largest = std::max(largest, share(count, part + 1, parts) - share(count, part, parts));
  }
  return largest;
}

}  // namespace pymtl
