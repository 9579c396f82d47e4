// What a pool of threads asks of the operating system. macOS lets nobody choose the core of a thread.
#pragma once

#include <pthread.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif !defined(__APPLE__)
#error "the pool of threads is for Linux and macOS"
#endif

#include <atomic>
#include <climits>
#include <cstdint>
#include <thread>

namespace pymtl {

// Sleeps as long as the word has this value; may return before.
inline void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  word.wait(value);
#endif
}

// Wakes all that sleep on the word.
inline void wake(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
  word.notify_all();
#endif
}

inline void name_thread(pthread_t thread, const char* name) {
#if defined(__linux__)
  pthread_setname_np(thread, name);
#else
  static_cast<void>(thread);  // macOS: only a thread itself can
  static_cast<void>(name);
#endif
}

// The core that the calling thread is on: negative where it is unknown, always 0 on macOS.
inline int current_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return 0;
#endif
}

// By which a thread is placed; never 0.
inline int32_t this_thread() {
#if defined(__linux__)
  return static_cast<int32_t>(syscall(SYS_gettid));
#else
  return 1;
#endif
}

// The cores that the calling thread may run on; none where that is unknown.
class Cores {
 public:
#if defined(__linux__)
  Cores() {
    CPU_ZERO(&set_);
    known_ = sched_getaffinity(0, sizeof set_, &set_) == 0;  // not where there are more than the set has room for
  }

  int64_t count() const { return known_ ? CPU_COUNT(&set_) : 0; }
  void remove(int core) { CPU_CLR(core, &set_); }
  void place(int32_t thread) const { sched_setaffinity(thread, sizeof set_, &set_); }

 private:
  cpu_set_t set_;
  bool known_;
#else
  int64_t count() const { return count_; }
  void remove(int) { --count_; }
  void place(int32_t) const {}

 private:
  int64_t count_ = std::thread::hardware_concurrency();
#endif
};

}  // namespace pymtl
