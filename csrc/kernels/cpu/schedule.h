// How the sequences of a packed batch are shared out among workers.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <numeric>

#include "../executor.h"
#include "../rnn.h"
#include "team.h"

namespace pymtl {

// Below this many multiply-adds a call is over before a second thread has woken up.
constexpr int64_t kWorthSharing = 64 * 1024;

inline void serially(int64_t count, Executor::Task task, void* state) {
  for (int64_t i = 0; i < count; ++i) task(state, i);
}

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

// How many workers each recurrence has so that the tasks fill all threads.
inline int64_t worker_count(const RnnShape& shape, const Executor& executor) {
  const int64_t threads = std::max<int64_t>(executor.threads, 1);
  return threads / std::gcd(threads, std::max<int64_t>(shape.recurrences, 1));
}

// Into how many slices of sequences each recurrence is cut.
inline int64_t slice_count(const RnnShape& shape, const Executor& executor) {
  return std::max<int64_t>(1, std::min(worker_count(shape, executor), shape.batch));
}

// How many workers each recurrence has that share its hidden units; 1: they share out the sequences, if any share.
// Where a slice would have few sequences, or few steps, it would read all weights for little arithmetic; where the
// weights are small, meeting would take longer than a step. A team smaller than there are slices would leave threads
// idle, and one whose members are not all first, second, ... in line on their threads would wait for them in vain.
// A normalised cell wants all units of a sequence in one place. number: the bytes of one; most: how many a time loop
// can employ.
inline int64_t team_size(const RnnShape& shape, const Executor& executor, size_t number, int64_t most) {
  constexpr int64_t kLeastSequences = 4;
  constexpr int64_t kFewSteps = 2;
  constexpr int64_t kLeastBytes = 64 * 1024;
  const int64_t workers = worker_count(shape, executor);
  if (sizes_of(shape.cell).normalised) return 1;
  if (shape.batch >= kLeastSequences * workers && shape.steps > kFewSteps) return 1;
  const int64_t bytes =
      sizes_of(shape.cell).gates * shape.hidden_size * shape.hidden_size * static_cast<int64_t>(number);
  const int64_t size = std::min({workers, most, Team::kMost, bytes / kLeastBytes});
  const bool in_line = size == workers || shape.recurrences * size <= executor.threads;
  return size > 1 && in_line && size >= slice_count(shape, executor) ? size : 1;
}

// This worker's place in the team, 0 for the first to come, which waits `seconds` for the other `workers` to come and
// lends the team its memory; -1 if the team is closed.
inline int64_t join(Team& team, int64_t workers, double seconds, void* memory) {
  using Clock = std::chrono::steady_clock;
  const int64_t place = __atomic_fetch_add(&team.tickets, 1, __ATOMIC_ACQ_REL);
  int64_t spins = 0;
  if (place >= Team::kClosed) return -1;
  if (place > 0) {
    while (__atomic_load_n(&team.size, __ATOMIC_ACQUIRE) == 0) pause_a_moment(spins);
    return place;
  }
  team.shared = memory;
  const Clock::time_point start = Clock::now();
  while (__atomic_load_n(&team.tickets, __ATOMIC_ACQUIRE) < workers &&
         std::chrono::duration<double>(Clock::now() - start).count() < seconds) {
    pause_a_moment(spins);
  }
  __atomic_store_n(&team.size, __atomic_fetch_add(&team.tickets, Team::kClosed, __ATOMIC_ACQ_REL), __ATOMIC_RELEASE);
  return 0;
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
