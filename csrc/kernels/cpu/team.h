// Workers that share one time loop, each with some of the hidden units, where there are too few sequences to give
// every worker some of those. After each step they meet, since the next one reads all of h.
//
// A worker may come late or never: its thread may be busy, or an executor may run all tasks on one. The first to come
// waits for the others for a while, and then begins with those who are there; a late one finds the team closed.
#pragma once

#include <time.h>

#include <cstdint>

#include "pause.h"

namespace pymtl {

struct Team {
  static constexpr int64_t kMost = 8;
  static constexpr int64_t kClosed = int64_t{1} << 32;

  struct alignas(64) Place {
    int64_t meetings;  // this worker has come to
    int64_t waited;    // for the others, in meetings where that took microseconds: nanoseconds
  };

  int64_t tickets;  // one for each that came, and kClosed when nobody else may
  int64_t size;     // 0 until the team is closed
  void* shared;     // the first worker's memory, which all of them read
  Place places[kMost];
};

namespace {

inline int64_t nanoseconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

// Waits until the other workers have come as often as this one has now.
inline void meet(Team& team, int64_t place) {
  constexpr int64_t kTimed = 256;  // spins, some microseconds, after which a wait is timed
  Team::Place& own = team.places[place];
  const int64_t meetings = own.meetings + 1;
  __atomic_store_n(&own.meetings, meetings, __ATOMIC_RELEASE);
  int64_t spins = 0;
  int64_t start = 0;
  for (int64_t other = 0; other < team.size; ++other) {
    while (__atomic_load_n(&team.places[other].meetings, __ATOMIC_ACQUIRE) < meetings) {
      pause_or_yield(spins);
      if (spins == kTimed) start = nanoseconds_now();
    }
  }
  if (spins >= kTimed) own.waited += nanoseconds_now() - start;
}

}  // namespace
}  // namespace pymtl
