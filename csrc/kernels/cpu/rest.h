// For how long calls do without other threads after those kept their callers waiting.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace pymtl {

// A thread that loses its core keeps those that wait for it for milliseconds. On a quiet machine that happens once in a
// while, and when threads wake up after a pause; beside a busy process it happens again and again. So once is no reason
// for a rest. Twice in short succession is: for eight times as long as what was lost, and if it happens again soon
// after that, for twice as many times as before, up to `most`.
class Rest {
 public:
  using Clock = std::chrono::steady_clock;

  explicit constexpr Rest(int64_t most) : most_(most) {}

  bool is_on() const { return Clock::now().time_since_epoch().count() < until_.load(std::memory_order_relaxed); }

  // So much was lost in a call that ended now.
  void note(Clock::time_point now, Clock::duration lost) {
    const Clock::duration since = now.time_since_epoch() - Clock::duration(until_.load(std::memory_order_relaxed));
    const int64_t before = times_.load(std::memory_order_relaxed);
    const bool again = since < lost * std::max(before, kLeast);
    const int64_t times = again ? std::clamp(2 * before, kLeast, most_) : 0;
    times_.store(times, std::memory_order_relaxed);
    until_.store((now + lost * times).time_since_epoch().count(), std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kLeast = 8;

  const int64_t most_;
  std::atomic<Clock::rep> until_{0};
  std::atomic<int64_t> times_{0};
};

}  // namespace pymtl
