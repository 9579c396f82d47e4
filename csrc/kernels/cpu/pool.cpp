#include "../pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "pause.h"
#include "rest.h"
#include "system.h"

namespace pymtl {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

Clock::duration thread_time() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

// How long a caller is at its own tasks, and then waits for the others. After a call of more than a millisecond the
// next ones of the same thread measure what their own tasks take of a core's time, too, which costs each a quarter of a
// microsecond: a caller that lost its core was long at them.
class CallTime {
 public:
  void own_tasks_done() {
    alone_ = Clock::now();
    if (measured_) worked_ = thread_time() - begun_;
  }

  void done() {
    end_ = Clock::now();
    if (length() > milliseconds(1)) to_measure = kMeasured;
  }

  // Whether so much time was lost to a thread without a core: more than to do the shares of `others` by itself would
  // have taken. The shares of a long call may be unequal, and one thread less costs a long call more than a wait.
  bool is_late(Clock::duration lost, int64_t others) const {
    return lost > milliseconds(1) && lost > (measured_ ? worked_ : alone_ - start_) * others;
  }

  Clock::time_point start() const { return start_; }
  Clock::time_point end() const { return end_; }
  Clock::duration length() const { return end_ - start_; }
  Clock::duration waited() const { return end_ - alone_; }
  Clock::duration lost() const { return measured_ ? length() - worked_ : waited(); }

 private:
  static constexpr int kMeasured = 64;
  static thread_local int to_measure;  // so many of the thread's next calls

  const bool measured_ = to_measure > 0 && to_measure-- > 0;
  const Clock::duration begun_ = measured_ ? thread_time() : Clock::duration(0);
  Clock::duration worked_{0};
  const Clock::time_point start_ = Clock::now();
  Clock::time_point alone_ = start_;
  Clock::time_point end_ = start_;
};

thread_local int CallTime::to_measure = 0;

// For how long to spin.
class Patience {
 public:
  explicit Patience(microseconds length) : end_(Clock::now() + length) {}

  bool is_over() {
    pause_a_moment();
    return ++spins_ % 64 == 0 && Clock::now() > end_;
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
    if (helpers < 1 || count >= static_cast<int64_t>(kClosed) || rest_.covers_call() ||
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
    std::atomic<int32_t> thread{0};
    std::atomic<uint32_t> signal{0};  // changes when there is work; what the helper sleeps on
    std::atomic<bool> asleep{false};
  };

  static constexpr uint64_t kClosed = 0xffffffff;
  static constexpr microseconds kHelperSpins{50}, kHelperSpinsMost{500};
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
  Rest rest_{128};       // without helpers
  int64_t started_ = 0;  // helpers
  int core_ = -1;        // that the helpers are kept off
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
    CallTime time;
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
    time.own_tasks_done();
    wait_for(static_cast<uint32_t>(count) - own);
    time.done();
    if (time.is_late(time.waited(), helpers)) rest_.note(time.start(), time.end());
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

  // Starts helpers, and keeps them off the core that the caller is on, where they would only interrupt it. Returns how
  // many there are.
  int64_t prepare(int64_t helpers) {
    const int core = current_core();
    if (started_ >= helpers && placed_ >= helpers && core == core_) return helpers;
    Cores others;
    if (core < 0 || others.count() == 0) return 0;
    others.remove(core);
    if (others.count() == 0) return 0;
    for (; started_ < helpers; ++started_) {
      if (!start(helpers_[started_], started_)) break;
    }
    for (int64_t i = 0; i < started_; ++i) {
      const int32_t thread = helpers_[i].thread.load(std::memory_order_acquire);
      if (thread != 0) others.place(thread);
      if (thread == 0) return std::min(started_, helpers);  // it has not run yet: placed by a later call
    }
    core_ = core;
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
    name_thread(thread, "pymtl");
    pthread_detach(thread);
    return true;
  }

  void* help(void* itself) {
    Helper& helper = *static_cast<Helper*>(itself);
    helper.thread.store(this_thread(), std::memory_order_release);
    Work work{};
    for (;;) {
      while (finds_task(work, helper.place)) {
        work.task(work.state, work.index);
        done_.fetch_add(1, std::memory_order_seq_cst);
        if (caller_sleeps_.load(std::memory_order_seq_cst)) wake(done_);
      }
      const uint32_t signal = helper.signal.load(std::memory_order_acquire);
      helper.asleep.store(true, std::memory_order_seq_cst);
      if (!has_task(helper.place)) sleep_while(helper.signal, signal);
      helper.asleep.store(false, std::memory_order_relaxed);
    }
  }

  // Spins. As long as a call goes on the next one may be near: a helper that woke up too late for a short call, and
  // slept before the next, would be late for all of them.
  bool finds_task(Work& work, int64_t place) {
    const Clock::time_point latest = Clock::now() + kHelperSpinsMost;
    for (Patience patience(kHelperSpins); !claim(work, place);) {
      if (!patience.is_over()) continue;
      if (!busy_.load(std::memory_order_relaxed) || Clock::now() > latest) return false;
      sched_yield();  // there may be more helpers than cores
      patience = Patience(kHelperSpins);
    }
    return true;
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

// From OpenMP's threads, while the machine counts as busy. It may be long: of a hundred calls beside a busy process
// less than one is to try OpenMP again.
Rest openmp_rest(512);

// Runs the tasks, and notes whether that took the caller much longer than its own share of them.
void run_timed(Executor::ForEach for_each, int64_t count, Executor::Task task, void* state) {
  struct Timed {
    Executor::Task task;
    void* state;
    pthread_t caller;
    CallTime time;
  };
  Timed timed{task, state, pthread_self(), {}};
  for_each(
      count,
      [](void* given, int64_t index) {
        Timed& own = *static_cast<Timed*>(given);
        own.task(own.state, index);
        if (pthread_equal(pthread_self(), own.caller)) own.time.own_tasks_done();
      },
      &timed);
  timed.time.done();
  // A thread of OpenMP that wakes up on the caller's core, and then spins there, keeps the caller from its own tasks.
  // The shares are about equal: after its own a caller waits for no more than one other, whatever their number.
  if (timed.time.is_late(timed.time.lost(), 1)) openmp_rest.note(timed.time.start(), timed.time.end());
}

}  // namespace

Executor steady_executor(int64_t threads, Executor::ForEach otherwise) {
  notice_forks();
  asked = {threads, otherwise};
  const auto for_each = [](int64_t count, Executor::Task task, void* state) {
    const Asked now = asked;
    const bool forked = is_forked.load(std::memory_order_relaxed);
    const bool by_pool = now.threads > 1 && (forked || openmp_rest.covers_call());
    if (by_pool && pool().run(now.threads, count, task, state)) return;
    if (forked || now.threads == 1) return (forked ? serially : now.otherwise)(count, task, state);
    run_timed(now.otherwise, count, task, state);
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

int64_t available_cores() {
  const int64_t count = Cores().count();
  return std::max<int64_t>(count > 0 ? count : std::thread::hardware_concurrency(), 1);
}

}  // namespace pymtl
