// For how long calls do without other threads after those kept their callers waiting.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace pymtl {

// A thread that loses its core keeps those that wait for it for milliseconds. On a quiet machine that happens once in a
// while, and when threads wake up after a pause; beside a busy process it happens again and again. So one late call
// changes nothing. A second one soon after it begins a rest, which lasts for eight times the length of the late call,
// and for four calls. After a rest it takes two late calls again; if they come soon, the next rest is four times as
// long, up to `most` times the length of a call. Late calls come soon if little time or few calls are between them.
class Rest {
 public:
  using Clock = std::chrono::steady_clock;

  explicit constexpr Rest(int64_t most) : most_(most) {}

  // Whether the call that begins now is to do without other threads.
  bool covers_call() {
    const bool one_of_many = calls_left_.load(kRelaxed) > 0 && calls_left_.fetch_sub(1, kRelaxed) > 0;
    if (one_of_many || Clock::now().time_since_epoch().count() < until_.load(kRelaxed)) return true;
    calls_.fetch_add(1, kRelaxed);
    return false;
  }

  // A call from `start` to `end` was late.
  void note(Clock::time_point start, Clock::time_point end) {
    if (noting_.exchange(true, std::memory_order_acquire)) return;
    // A call that ran at the same time as the last late one was late for the same reason.
    if (start >= noted_) begin_if_again(std::min<Clock::duration>(end - start, kLongest), end);
    noting_.store(false, std::memory_order_release);
  }

 private:
  static constexpr std::memory_order kRelaxed = std::memory_order_relaxed;
  static constexpr int64_t kLeast = 8, kGrowth = 4, kCallsPart = 2, kFewCalls = 4;
  // A call that was stopped for seconds says no more than that.
  static constexpr std::chrono::milliseconds kLongest{10};

  void begin_if_again(Clock::duration length, Clock::time_point end) {
    const int64_t calls = calls_.exchange(0, kRelaxed);  // since the last late one, or since a rest
    const bool again = is_second_ && (calls <= kFewCalls || end - noted_ < length * kLeast / 2);
    if (!again) {
      const Clock::time_point rest{Clock::duration(until_.load(kRelaxed))};
      grows_ = times_ > 0 && !is_second_ && (calls <= kFewCalls || end - rest < length * times_);
    } else {
      times_ = grows_ ? std::min(most_, kGrowth * times_) : kLeast;
      calls_left_.store(times_ / kCallsPart, kRelaxed);
      until_.store((end + length * times_).time_since_epoch().count(), kRelaxed);
    }
    is_second_ = !again;
    noted_ = end;
  }

  const int64_t most_;
  std::atomic<Clock::rep> until_{0};
  std::atomic<int64_t> calls_left_{0};  // of a rest
  std::atomic<int64_t> calls_{0};       // that no rest covered, since the last late one or the last rest
  std::atomic<bool> noting_{false};     // the fields below are the noting caller's
  Clock::time_point noted_{};           // the end of the last late call
  int64_t times_ = 0;                   // how many times the length of the late call the last rest was
  bool is_second_ = false;              // whether the next late call would be the second one
  bool grows_ = false;                  // whether the rest would be the next one of a series
};

}  // namespace pymtl
