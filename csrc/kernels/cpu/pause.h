// What a thread does while it waits for another one that is a fraction of a microsecond away.
#pragma once

#include <sched.h>

#include <cstdint>

namespace pymtl {
namespace {

// Gives the core to others now and then: more threads may want to run than there are cores.
inline void pause_a_moment(int64_t& spins) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
  if (++spins % 128 == 0) sched_yield();
}

}  // namespace
}  // namespace pymtl
