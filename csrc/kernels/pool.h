// Threads of this library's own that take part in a caller's tasks, for short calls on a busy machine.
//
// A parallel region of OpenMP ends when the last of its threads has run, and beside another busy process that thread
// may wait for its core for milliseconds. Here nobody waits for a thread that has not begun: the caller works too, all
// take the next task from one counter, and the caller waits only for tasks that a helper is in the middle of.
#pragma once

#include "executor.h"

namespace pymtl {

// The caller and up to `threads` - 1 helpers, which are started when they are first needed and then stay, asleep. One
// call at a time has the helpers: calls from other threads meanwhile, and from within a task, run on their own thread
// alone. Where the calling thread may run on one core only, helpers would have none: its tasks go to `otherwise`.
Executor pool_executor(int64_t threads, Executor::ForEach otherwise);

// `otherwise` while the machine is quiet, the pool while it is busy: once `otherwise` has twice in short succession
// kept its caller waiting for a thread that had lost its core, or from its own core. In a forked process it is never
// `otherwise`: the threads of OpenMP are not there, and whoever waits for them waits for ever. OpenMP's threads spin
// for a while after each region of theirs, and in a model that has such regions between the layers they would take the
// core from the pool's.
Executor steady_executor(int64_t threads, Executor::ForEach otherwise);

// How many cores the calling thread may run on, at least 1.
int64_t available_cores();

}  // namespace pymtl
