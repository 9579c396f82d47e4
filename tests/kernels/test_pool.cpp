// The pool's threads: every task once, whoever takes it; with helpers that come late or not at all, from several
// callers, from within a task, and after a fork.
#include <sched.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "kernels/pool.h"

namespace pymtl::test {
namespace {

// Whether each of `count` tasks ran once, and all had when for_each returned. Each takes `microseconds`.
bool each_runs_once(const Executor& executor, int64_t count, int64_t microseconds = 0) {
  std::vector<int> runs(static_cast<size_t>(count));  // plain memory: the caller reads it without more ado
  const auto task = [&](int64_t i) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
    while (std::chrono::steady_clock::now() < end) {
    }
    ++runs[static_cast<size_t>(i)];
  };
  for_each(executor, count, task);
  return std::all_of(runs.begin(), runs.end(), [](int each) { return each == 1; });
}

void every_task_runs_once() {
  for (const int64_t threads : {1, 2, 3, 5, 9}) {
    const Executor executor = pool_executor(threads, serially);
    CHECK(executor.threads == threads);
    for (const int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
      Context context("threads ", threads, ", tasks ", count);
      for (int turn = 0; turn < 50; ++turn) CHECK(each_runs_once(executor, count));
    }
  }
}

void calls_at_any_distance() {
  Random random(1);
  const Executor executor = pool_executor(3, serially);
  for (int turn = 0; turn < 300; ++turn) {
    CHECK(each_runs_once(executor, 1 + random.below(9), random.below(60)));
    std::this_thread::sleep_for(std::chrono::microseconds(random.below(120)));  // helpers spin, or sleep
  }
}

void several_callers_at_once() {
  std::atomic<int64_t> wrong{0};
  std::vector<std::thread> callers;
  for (int64_t caller = 0; caller < 5; ++caller) {
    callers.emplace_back([&wrong, caller] {
      for (int turn = 0; turn < 200; ++turn) {
        wrong += !each_runs_once(pool_executor(1 + (caller + turn) % 4, serially), turn % 11, caller);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0);
}

void a_task_may_call() {
  std::atomic<int64_t> wrong{0};
  const auto task = [&](int64_t) { wrong += !each_runs_once(pool_executor(2, serially), 5); };
  for (int turn = 0; turn < 50; ++turn) for_each(pool_executor(3, serially), 7, task);
  CHECK(wrong == 0);
}

int cores() {
  cpu_set_t allowed;
  return sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
}

// What was late before is forgotten.
void have_a_quiet_time() {
  std::this_thread::sleep_for(std::chrono::milliseconds(700));
  for (int turn = 0; turn < 100; ++turn) CHECK(each_runs_once(steady_executor(2, serially), 4));
}

// On the thread's own core, however long that takes on a busy machine.
void work_for(std::chrono::nanoseconds length) {
  const auto now = [] {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
  };
  const auto end = now() + length;
  while (now() < end) continue;
}

// A wait that is shorter than the caller's own share of a long call is none that the pool would spare.
void unequal_shares_are_not_late() {
  using std::chrono::milliseconds;
  static std::atomic<int64_t> calls;
  calls = 0;
  const auto unequal = [](int64_t, Executor::Task task, void* state) {
    ++calls;
    std::thread other([&] {
      std::this_thread::sleep_for(milliseconds(10));
      task(state, 1);
    });
    task(state, 0);
    other.join();
  };
  have_a_quiet_time();
  for (int turn = 0; turn < 5; ++turn) {
    for_each(steady_executor(2, unequal), 2, [](int64_t) { work_for(milliseconds(40)); });
  }
  CHECK(calls == 5, calls.load());
}

// An executor that keeps its caller waiting is left for the pool, and tried again later.
void a_late_executor_is_left_for_the_pool() {
  static std::atomic<int64_t> calls;
  calls = 0;
  const auto late = [](int64_t count, Executor::Task task, void* state) {
    ++calls;
    std::thread other([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      task(state, 1);
    });
    for (int64_t i = 0; i < count; ++i) {
      if (i != 1) task(state, i);
    }
    other.join();
  };
  have_a_quiet_time();
  const Executor executor = steady_executor(2, late);
  CHECK(executor.threads == 2);
  CHECK(each_runs_once(executor, 4));
  CHECK(calls == 1);
  for (int turn = 0; turn < 20; ++turn) CHECK(each_runs_once(executor, 4));
  CHECK(calls == 2 || cores() == 1, calls.load());         // once may happen on a quiet machine
  CHECK(each_runs_once(steady_executor(1, serially), 4));  // one thread has nobody to wait for
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  CHECK(each_runs_once(steady_executor(2, late), 4));
  CHECK(calls == 3 || cores() == 1, calls.load());
}

// So is one whose caller has to wait before its own tasks, as if it had lost its core to one of the executor's threads.
void an_executor_that_takes_the_callers_core_is_left_for_the_pool() {
  static std::atomic<int64_t> calls;
  calls = 0;
  const auto late = [](int64_t count, Executor::Task task, void* state) {
    ++calls;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    serially(count, task, state);
  };
  have_a_quiet_time();
  for (int turn = 0; turn < 20; ++turn) CHECK(each_runs_once(steady_executor(2, late), 4));
  CHECK(calls == 3 || cores() == 1, calls.load());  // the first is not measured, and two late ones begin a rest
}

// Helpers take part; one that is held up in its task keeps the caller waiting, and the calls after it do without.
void a_helper_comes_late() {
  using Clock = std::chrono::steady_clock;
  const std::thread::id caller = std::this_thread::get_id();
  const Executor executor = pool_executor(2, serially);
  int64_t with_helper = 0, without = 0;
  for (int turn = 0; turn < 20000 && (with_helper < 2 || without < 2); ++turn) {
    std::atomic<int64_t> runs{0}, helped{0};
    const auto task = [&](int64_t) {
      const bool helps = std::this_thread::get_id() != caller;
      const auto end = Clock::now() + std::chrono::microseconds(helps ? 5000 : 50);
      while (Clock::now() < end) {
      }
      helped += helps;
      ++runs;
    };
    for_each(executor, 8, task);
    CHECK(runs == 8);
    ++(helped > 0 ? with_helper : without);
  }
  CHECK(cores() == 1 || with_helper >= 2, with_helper);
  CHECK(without >= 2, without);
}

void a_thread_with_one_core_goes_elsewhere() {
  cpu_set_t before, one;
  CHECK(sched_getaffinity(0, sizeof(before), &before) == 0);
  std::thread bound([&] {
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    CHECK(sched_setaffinity(0, sizeof(one), &one) == 0);
    static int64_t elsewhere;
    elsewhere = 0;
    const auto otherwise = [](int64_t count, Executor::Task task, void* state) {
      ++elsewhere;
      serially(count, task, state);
    };
    for (int turn = 0; turn < 200 && elsewhere == 0; ++turn) {  // the pool may rest from the test before
      CHECK(each_runs_once(pool_executor(64, otherwise), 100));
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    CHECK(elsewhere == 1);
  });
  bound.join();
}

void a_forked_process_has_a_pool_of_its_own() {
  const Executor executor = pool_executor(2, serially);
  CHECK(each_runs_once(executor, 10));
  for (int turn = 0; turn < 5; ++turn) {
    const pid_t child = fork();
    if (child == 0) {
      bool right = true;
      const auto gone = [](int64_t, Executor::Task, void*) { _exit(2); };
      for (int call = 0; call < 50; ++call) {
        right &= each_runs_once(pool_executor(3, serially), 10, 2);
        right &= each_runs_once(steady_executor(3, gone), 10, 2);
      }
      _exit(right ? 0 : 1);
    }
    CHECK(each_runs_once(executor, 10));
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests({
      {"every task runs once", every_task_runs_once},
      {"calls at any distance", calls_at_any_distance},
      {"several callers at once", several_callers_at_once},
      {"a task may call", a_task_may_call},
      {"a helper comes late", a_helper_comes_late},
      {"unequal shares are not late", unequal_shares_are_not_late},
      {"a late executor is left for the pool", a_late_executor_is_left_for_the_pool},
      {"an executor that takes the caller's core is left for the pool",
       an_executor_that_takes_the_callers_core_is_left_for_the_pool},
      {"a thread with one core goes elsewhere", a_thread_with_one_core_goes_elsewhere},
      {"a forked process has a pool of its own", a_forked_process_has_a_pool_of_its_own},
  });
}
