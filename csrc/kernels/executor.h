// How a kernel runs its independent tasks in parallel. The caller passes an executor in: torch's threads from the ops,
// or those of pool.h; plain threads or none from anyone else. The kernels start no threads themselves.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pymtl {

struct Executor {
  // Calls task(state, index) once for every index in [0, count), in any order and on any thread, and
  // returns when all calls have returned. A task never throws.
  using Task = void (*)(void* state, int64_t index);
  using ForEach = void (*)(int64_t count, Task task, void* state);

  ForEach for_each;
  int64_t threads;  // how many tasks can make progress at once; results never depend on it
};

// All tasks on the calling thread, in order.
inline void serially(int64_t count, Executor::Task task, void* state) {
  for (int64_t i = 0; i < count; ++i) task(state, i);
}

template <typename Function>
void for_each(const Executor& executor, int64_t count, Function&& function) {
  using Plain = std::remove_reference_t<Function>;
  const Executor::Task call = [](void* state, int64_t index) { (*static_cast<Plain*>(state))(index); };
  if (count == 1) {
    function(int64_t{0});
  } else if (count > 1) {
    executor.for_each(count, call, const_cast<std::remove_const_t<Plain>*>(&function));
  }
}

}  // namespace pymtl
