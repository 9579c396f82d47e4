// What a thread does while it waits for another one, in general for a fraction of a microsecond.
#pragma once

#include <sched.h>

#include <cstdint>

namespace pymtl {
namespace {

inline void pause_a_moment() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // about as long as x86's pause; "yield" is over at once on most cores
#endif
}

// For waits without a bound: gives the core to others now and then, since more threads may want to run than there are
// cores. Not often: beside a busy process that has taken the core it does not come back for milliseconds.
inline void pause_or_yield(int64_t& spins) {
  pause_a_moment();
  if (++spins % 1024 == 0) sched_yield();
}

}  // namespace
}  // namespace pymtl
