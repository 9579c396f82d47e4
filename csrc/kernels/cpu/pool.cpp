#include "../pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>

#include "pause.h"

namespace pymtl {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

void sleep_while(const std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake(const std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Whether the caller, who had done its own tasks at `alone`, has then waited for a thread without a core: for longer
// than to do the shares of `others` by itself would have taken. The shares of a long call may be unequal, and one
// thread less costs a long call more than a wait.
bool is_late(Clock::time_point start, Clock::time_point alone, Clock::time_point end, int64_t others) {
  return end - alone > milliseconds(1) && end - alone > (alone - start) * others;
}

// For how long to spin.
class Patience {
 public:
  explicit Patience(microseconds length) : end_(Clock::now() + length) {}

  bool is_over() {
    pause_a_moment(spins_);
    return spins_ % 64 == 0 && Clock::now() > end_;
  }

 private:
  Clock::time_point end_;
  int64_t spins_ = 0;
};

class Pool {
 public:
  static constexpr int64_t kMostHelpers = 255;

  // Returns false, with nothing done, where helpers would have no core of their own.
  bool run(int64_t threads, int64_t count, Executor::Task task, void* state) {
    const int64_t helpers = std::min({threads, count, kMostHelpers + 1}) - 1;
    if (helpers < 1 || count >= static_cast<int64_t>(kClosed) || rests() ||
        busy_.exchange(true, std::memory_order_acquire)) {
      serially(count, task, state);
      return true;
    }
    const int64_t ready = prepare(helpers);
    if (ready > 0) share(ready, count, task, state);
    busy_.store(false, std::memory_order_release);
    return ready > 0;
  }

 private:
  struct Work {
    Executor::Task task;
    void* state;
    int64_t index;
  };

  struct alignas(64) Helper {
    Pool* pool;
    int64_t place;
    std::atomic<pid_t> thread{0};
    std::atomic<uint32_t> signal{0};  // changes when there is work; what the helper sleeps on
    std::atomic<bool> asleep{false};
  };

  static constexpr uint64_t kClosed = 0xffffffff;
  static constexpr microseconds kHelperSpins{50};
  static constexpr microseconds kCallerSpins{20};

  // The generation of a call in the upper half, the next task in the lower one, kClosed between calls: a helper that
  // read the fields of one call cannot take a task of another.
  alignas(64) std::atomic<uint64_t> next_{kClosed};
  std::atomic<Executor::Task> task_{nullptr};
  std::atomic<void*> state_{nullptr};
  std::atomic<int64_t> count_{0};
  std::atomic<int64_t> wanted_{0};             // helpers of this call
  alignas(64) std::atomic<uint32_t> done_{0};  // tasks of this call that helpers have finished
  std::atomic<bool> caller_sleeps_{false};

  alignas(64) std::atomic<bool> busy_{false};
  std::atomic<Clock::rep> rest_until_{0};
  int64_t rest_factor_ = kLeastRest;
  int64_t started_ = 0;  // helpers
  int cpu_ = -1;         // that the helpers are kept off
  int64_t placed_ = 0;   // how many of them are
  Helper helpers_[kMostHelpers];

  bool claim(Work& work, int64_t place) {
    uint64_t next = next_.load(std::memory_order_seq_cst);
    for (;;) {
      const int64_t index = static_cast<int64_t>(next & kClosed);
      if (place >= wanted_.load(std::memory_order_acquire) || index >= count_.load(std::memory_order_acquire)) {
        return false;
      }
      work = {task_.load(std::memory_order_acquire), state_.load(std::memory_order_acquire), index};
      if (next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) return true;
    }
  }

  void share(int64_t helpers, int64_t count, Executor::Task task, void* state) {
    const Clock::time_point start = Clock::now();
    const uint64_t generation = (next_.load(std::memory_order_relaxed) >> 32) + 1;
    next_.store(generation << 32 | kClosed, std::memory_order_release);
    done_.store(0, std::memory_order_release);
    task_.store(task, std::memory_order_release);
    state_.store(state, std::memory_order_release);
    count_.store(count, std::memory_order_release);
    wanted_.store(helpers, std::memory_order_release);
    next_.store(generation << 32, std::memory_order_seq_cst);
    for (int64_t i = 0; i < helpers; ++i) {
      Helper& helper = helpers_[i];
      if (!helper.asleep.load(std::memory_order_seq_cst)) continue;
      helper.signal.fetch_add(1, std::memory_order_release);
      wake(helper.signal);
    }
    Work work{};
    uint32_t own = 0;
    for (; claim(work, -1); ++own) work.task(work.state, work.index);
    const Clock::time_point alone = Clock::now();
    wait_for(static_cast<uint32_t>(count) - own);
    note_wait(start, alone, Clock::now(), helpers);
  }

  void wait_for(uint32_t tasks) {
    for (Patience patience(kCallerSpins); done_.load(std::memory_order_acquire) != tasks;) {
      if (!patience.is_over()) continue;
      caller_sleeps_.store(true, std::memory_order_seq_cst);
      for (uint32_t done = done_.load(std::memory_order_seq_cst); done != tasks; done = done_.load()) {
        sleep_while(done_, done);
      }
      caller_sleeps_.store(false, std::memory_order_relaxed);
      return;
    }
  }

  // A helper that lost its core in the middle of a task keeps the caller for milliseconds, and while the machine is
  // that busy it will do so again: the next calls do without helpers.
  static constexpr int64_t kLeastRest = 8, kLongestRest = 64;

  bool rests() const { return Clock::now().time_since_epoch().count() < rest_until_.load(std::memory_order_relaxed); }

  void note_wait(Clock::time_point start, Clock::time_point alone, Clock::time_point end, int64_t helpers) {
    const Clock::duration waited = end - alone;
    if (!is_late(start, alone, end, helpers)) return;
    const Clock::duration since = end.time_since_epoch() - Clock::duration(rest_until_.load(std::memory_order_relaxed));
    const bool again = since < waited * rest_factor_;
    rest_factor_ = again ? std::min(kLongestRest, 2 * rest_factor_) : kLeastRest;
    rest_until_.store((end + waited * rest_factor_).time_since_epoch().count(), std::memory_order_relaxed);
  }

  // Starts helpers, and keeps them off the core that the caller is on, where they would only interrupt it. Returns how
  // many there are.
  int64_t prepare(int64_t helpers) {
    const int cpu = sched_getcpu();
    if (started_ >= helpers && placed_ >= helpers && cpu == cpu_) return helpers;
    cpu_set_t allowed;
    if (cpu < 0 || sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return 0;
    CPU_CLR(cpu, &allowed);
    if (CPU_COUNT(&allowed) == 0) return 0;
    for (; started_ < helpers; ++started_) {
      if (!start(helpers_[started_], started_)) break;
    }
    for (int64_t i = 0; i < started_; ++i) {
      const pid_t thread = helpers_[i].thread.load(std::memory_order_acquire);
      if (thread != 0) sched_setaffinity(thread, sizeof(allowed), &allowed);
      if (thread == 0) return std::min(started_, helpers);  // it has not run yet: placed by a later call
    }
    cpu_ = cpu;
    placed_ = started_;
    return std::min(started_, helpers);
  }

  bool start(Helper& helper, int64_t place) {
    helper.pool = this;
    helper.place = place;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    pthread_t thread;
    const int error = pthread_create(
        &thread, nullptr, [](void* helper) -> void* { return static_cast<Helper*>(helper)->pool->help(helper); },
        &helper);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (error != 0) return false;
    pthread_setname_np(thread, "pymtl");
    pthread_detach(thread);
    return true;
  }

  void* help(void* itself) {
    Helper& helper = *static_cast<Helper*>(itself);
    helper.thread.store(static_cast<pid_t>(syscall(SYS_gettid)), std::memory_order_release);
    Work work{};
    for (;;) {
      for (Patience patience(kHelperSpins); !patience.is_over();) {
        if (!claim(work, helper.place)) continue;
        do {
          work.task(work.state, work.index);
          done_.fetch_add(1, std::memory_order_seq_cst);
          if (caller_sleeps_.load(std::memory_order_seq_cst)) wake(done_);
        } while (claim(work, helper.place));
        patience = Patience(kHelperSpins);
      }
      const uint32_t signal = helper.signal.load(std::memory_order_acquire);
      helper.asleep.store(true, std::memory_order_seq_cst);
      if (!has_task(helper.place)) sleep_while(helper.signal, signal);
      helper.asleep.store(false, std::memory_order_relaxed);
    }
  }

  bool has_task(int64_t place) const {
    const uint64_t next = next_.load(std::memory_order_seq_cst);
    return place < wanted_.load(std::memory_order_acquire) &&
           static_cast<int64_t>(next & kClosed) < count_.load(std::memory_order_acquire);
  }
};

// Never destroyed: helpers outlive main(). A forked process has none of them, and so begins with a pool of its own.
std::atomic<Pool*> the_pool{nullptr};
std::atomic<bool> is_forked{false};

void notice_forks() {
  const auto in_child = [] {
    the_pool.store(nullptr);
    is_forked.store(true);
  };
  static const int registered = pthread_atfork(nullptr, nullptr, in_child);
  static_cast<void>(registered);
}

Pool& pool() {
  Pool* found = the_pool.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  notice_forks();
  Pool* made = new Pool;
  if (the_pool.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return *made;
  delete made;
  return *found;
}

struct Asked {
  int64_t threads = 1;
  Executor::ForEach otherwise = serially;
};

thread_local Asked asked;

// Until when the machine counts as busy: for a second after a late call, and longer each time that the call after it is
// late again.
class Busy {
  static constexpr milliseconds kLeast{1000}, kMost{16000}, kAgain{200};

 public:
  static bool is_on() { return Clock::now().time_since_epoch().count() < until_.load(std::memory_order_relaxed); }

  static void begin(Clock::time_point now) {
    const Clock::duration since = now.time_since_epoch() - Clock::duration(until_.load(std::memory_order_relaxed));
    const Clock::rep before = length_.load(std::memory_order_relaxed);
    const Clock::rep least = Clock::duration(kLeast).count();
    const Clock::rep length =
        since < kAgain && before > 0 ? std::min(2 * before, Clock::duration(kMost).count()) : least;
    length_.store(length, std::memory_order_relaxed);
    until_.store(now.time_since_epoch().count() + length, std::memory_order_relaxed);
  }

 private:
  static inline std::atomic<Clock::rep> until_{0}, length_{0};
};

// Runs the tasks, and notes when the caller's own share of them was done.
void run_timed(Executor::ForEach for_each, int64_t count, Executor::Task task, void* state) {
  struct Timed {
    Executor::Task task;
    void* state;
    pthread_t caller;
    Clock::time_point alone;
  };
  const Clock::time_point start = Clock::now();
  Timed timed{task, state, pthread_self(), start};
  for_each(
      count,
      [](void* given, int64_t index) {
        Timed& own = *static_cast<Timed*>(given);
        own.task(own.state, index);
        if (pthread_equal(pthread_self(), own.caller)) own.alone = Clock::now();
      },
      &timed);
  const Clock::time_point end = Clock::now();
  if (is_late(start, timed.alone, end, 1)) Busy::begin(end);
}

}  // namespace

Executor steady_executor(int64_t threads, Executor::ForEach otherwise) {
  notice_forks();
  asked = {threads, otherwise};
  const auto for_each = [](int64_t count, Executor::Task task, void* state) {
    const Asked now = asked;
    const bool forked = is_forked.load(std::memory_order_relaxed);
    const bool by_pool = now.threads > 1 && (forked || Busy::is_on());
    if (by_pool && pool().run(now.threads, count, task, state)) return;
    run_timed(forked ? serially : now.otherwise, count, task, state);
  };
  return {for_each, threads};
}

Executor pool_executor(int64_t threads, Executor::ForEach otherwise) {
  asked = {threads, otherwise};
  const auto for_each = [](int64_t count, Executor::Task task, void* state) {
    const Asked now = asked;
    if (!pool().run(now.threads, count, task, state)) now.otherwise(count, task, state);
  };
  return {for_each, threads};
}

}  // namespace pymtl
