// Workers that share one time loop, each with some of the hidden units, where there are too few sequences to give
// every worker some of those. After each step they meet, since the next one reads all of h.
//
// A worker may come late or never: its thread may be busy, or an executor may run all tasks on one. The first to come
// waits for the others for a while, and then begins with those who are there; a late one finds the team closed.
#pragma once

#include <cstdint>

#include "pause.h"

namespace pymtl {

struct Team {
  static constexpr int64_t kMost = 8;
  static constexpr int64_t kClosed = int64_t{1} << 32;

  struct alignas(64) Place {
    int64_t meetings;  // this worker has come to
  };

  int64_t tickets;  // one for each that came, and kClosed when nobody else may
  int64_t size;     // 0 until the team is closed
  bool late;        // somebody kept the others waiting
  void* shared;     // the first worker's memory, which all of them read
  Place places[kMost];
};

namespace {

// Waits until the other workers have come as often as this one has now.
inline void meet(Team& team, int64_t place) {
  constexpr int64_t kLongWait = 16 * 1024;  // some hundred microseconds
  const int64_t meetings = team.places[place].meetings + 1;
  __atomic_store_n(&team.places[place].meetings, meetings, __ATOMIC_RELEASE);
  int64_t spins = 0;
  for (int64_t other = 0; other < team.size; ++other) {
    while (__atomic_load_n(&team.places[other].meetings, __ATOMIC_ACQUIRE) < meetings) pause_a_moment(spins);
  }
  if (spins > kLongWait) __atomic_store_n(&team.late, true, __ATOMIC_RELAXED);
}

}  // namespace
}  // namespace pymtl
