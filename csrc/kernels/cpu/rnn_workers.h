// Who computes which part of a recurrent pass: teams that share a recurrence's hidden units, or workers that have a
// recurrence's sequences, or some of them, to themselves.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "../executor.h"
#include "../rnn.h"
#include "rest.h"
#include "schedule.h"
#include "team.h"
#include "workspace.h"

namespace pymtl {

// Multiply-adds of all recurrences over the whole batch.
inline int64_t work_of(const RnnShape& shape) {
  const CellSizes& sizes = sizes_of(shape.cell);
  const int64_t depth = (sizes.normalised ? 0 : shape.input_size) + shape.hidden_size;
  return shape.recurrences * shape.tokens * sizes.gates * shape.hidden_size * depth;
}

// How many workers share each recurrence's hidden units. 1: no team; workers share out the sequences instead.
// Teams pay where a slice would have few sequences or few steps, and so would read all weights for little arithmetic.
// They do not pay where the weights are small: to meet would take longer than a step. A team smaller than the number of
// slices would leave threads idle. A team whose members do not all run at the same time would wait in vain. The units
// of a normalised cell stay with one worker. number: the bytes of one; most: how many workers a time loop can use.
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
    while (__atomic_load_n(&team.size, __ATOMIC_ACQUIRE) == 0) pause_or_yield(spins);
    return place;
  }
  team.shared = memory;
  const Clock::time_point start = Clock::now();
  while (__atomic_load_n(&team.tickets, __ATOMIC_ACQUIRE) < workers &&
         std::chrono::duration<double>(Clock::now() - start).count() < seconds) {
    pause_or_yield(spins);
  }
  __atomic_store_n(&team.size, __atomic_fetch_add(&team.tickets, Team::kClosed, __ATOMIC_ACQ_REL), __ATOMIC_RELEASE);
  return 0;
}

// How long the first worker of a team waits for the others: a small part of what its time loop takes alone, which reads
// weights of `number` bytes each from memory at first.
inline double patience(const RnnShape& shape, size_t number) {
  constexpr double kMultiplyAddsASecond = 25e9, kBytesASecond = 20e9;
  const auto multiply_adds = static_cast<double>(work_of(shape) / shape.recurrences);
  const double bytes =
      multiply_adds / static_cast<double>(std::max<int64_t>(shape.tokens, 1)) * static_cast<double>(number);
  return 0.05 * (multiply_adds / kMultiplyAddsASecond + bytes / kBytesASecond);
}

// If a member of a team loses its core, the others wait until the system schedules it again. After that has happened,
// each recurrence has a single worker for a while: the same bits, without waiting.
inline Rest team_rest(64);

// Notes a call, begun at `start`, whose teams of `workers` lost so much time by waiting that single workers would have
// been done earlier. While one member is late all the others wait, so that a team has lost the mean of the waits of all
// members but one.
inline void note_waits(const Team* teams, int64_t count, int64_t workers, Rest::Clock::time_point start) {
  constexpr std::chrono::nanoseconds kLong = std::chrono::microseconds(200);
  std::chrono::nanoseconds lost{0};
  for (int64_t g = 0; g < count; ++g) {
    int64_t waited = 0;
    for (const Team::Place& place : teams[g].places) waited += place.waited;
    lost = std::max(lost, std::chrono::nanoseconds(waited / (workers - 1)));
  }
  if (lost <= kLong) return;
  const Rest::Clock::time_point end = Rest::Clock::now();
  if (workers * (end - start - lost) < end - start) team_rest.note(start, end);
}

// One worker's part of a pass: the sequences [first_row, last_row) of recurrence g.
struct RnnShare {
  int64_t g;
  int64_t first_row;
  int64_t last_row;
  void* scratch;
  Team* team;  // or null; a member has a part of the hidden units
  int64_t place;

  int64_t workers() const { return team == nullptr ? 1 : team->size; }
};

struct RnnWorkers {
  Executor executor;
  size_t number;         // the bytes of a weight
  int64_t team_workers;  // that share a recurrence's hidden units
  int64_t slices;        // of the sequences
  size_t scratch_size = 0;
  int64_t* starts = nullptr;
  int64_t* bounds = nullptr;
  Team* teams = nullptr;
  char* scratch = nullptr;

  // number_bytes: of a weight; most: how many workers can share a recurrence's hidden units.
  RnnWorkers(const RnnShape& shape, size_t number_bytes, int64_t most, const Executor& given)
      : executor(executor_for(work_of(shape), given)),
        number(number_bytes),
        team_workers(team_size(shape, executor, number, most)),
        slices(team_workers > 1 ? 1 : slice_count(shape, executor)) {}

  void take(Workspace& workspace, const RnnShape& shape, size_t scratch_of_a_task) {
    scratch_size = (scratch_of_a_task + 63) / 64 * 64;
    starts = workspace.take<int64_t>(shape.steps + 1);
    bounds = workspace.take<int64_t>(slices + 1);
    teams = workspace.take<Team>(team_workers > 1 ? shape.recurrences : 0);
    scratch = workspace.take<char>(tasks(shape) * static_cast<int64_t>(scratch_size));
  }

  int64_t tasks(const RnnShape& shape) const { return shape.recurrences * slices * team_workers; }
  void* scratch_of(int64_t task) const { return scratch + static_cast<size_t>(task) * scratch_size; }

  // Workers that share out a recurrence's sequences read one pack of its weights: pack(g, part, parts) makes it before.
  // All others pack for themselves, into their own cache.
  bool one_pack() const { return slices > 1; }

  template <typename Pack>
  void pack_together(const RnnShape& shape, const Pack& pack) const {
    if (!one_pack()) return;
    for_each(executor, shape.recurrences * slices, [&](int64_t task) { pack(task / slices, task % slices, slices); });
  }

  // Calls run(share) for every worker.
  template <typename Run>
  void for_each_share(const RnnShape& shape, const Run& run) const {
    const bool in_teams = team_workers > 1 && !team_rest.covers_call();
    const Rest::Clock::time_point start = in_teams ? Rest::Clock::now() : Rest::Clock::time_point{};
    for (int64_t g = 0; g < shape.recurrences && in_teams; ++g) teams[g] = Team{};
    const double seconds = patience(shape, number);
    const int64_t count = team_workers > 1 && !in_teams ? shape.recurrences : tasks(shape);
    for_each(executor, count, [&](int64_t task) {
      RnnShare share{};
      share.scratch = scratch_of(task);
      int64_t slice = 0;
      if (in_teams) {
        // Neighbours are of different teams, since a thread may have several tasks.
        share.g = task % shape.recurrences;
        share.team = &teams[share.g];
        share.place = join(*share.team, team_workers, seconds, share.scratch);
        if (share.place < 0) return;
      } else {
        share.g = task / slices;
        slice = task % slices;
      }
      share.first_row = bounds[slice];
      share.last_row = bounds[slice + 1];
      run(share);
    });
    if (in_teams) note_waits(teams, shape.recurrences, team_workers, start);
  }
};

}  // namespace pymtl
