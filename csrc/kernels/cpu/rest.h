// For how long calls do without other threads after one of those kept its caller waiting.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace pymtl {

// A thread that loses its core keeps those that wait for it for milliseconds. Beside a busy process that happens again
// and again, on a quiet machine once in a while. So a rest is some times as long as what led to it: eight times, and if
// that happens again soon after it, twice as many as before, up to `most`.
class Rest {
 public:
  using Clock = std::chrono::steady_clock;

  explicit constexpr Rest(int64_t most) : most_(most) {}

  bool is_on() const { return Clock::now().time_since_epoch().count() < until_.load(std::memory_order_relaxed); }

  void begin(Clock::time_point now, Clock::duration lost) {
    const Clock::duration since = now.time_since_epoch() - Clock::duration(until_.load(std::memory_order_relaxed));
    const int64_t before = times_.load(std::memory_order_relaxed);
    const int64_t times = since < lost * before ? std::min(most_, 2 * before) : kLeast;
    times_.store(times, std::memory_order_relaxed);
    until_.store((now + lost * times).time_since_epoch().count(), std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kLeast = 8;

  const int64_t most_;
  std::atomic<Clock::rep> until_{0};
  std::atomic<int64_t> times_{kLeast};
};

}  // namespace pymtl
