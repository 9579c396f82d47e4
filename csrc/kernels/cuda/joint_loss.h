// The losses of K tasks and their gradients on a GPU; the formulas are those of kernels/joint_loss.h.
//
// T is float, double, BFloat16 or Float16; exponentials are Accum<T>, sums float64 over blocks of fixed size, so that
// results repeat bit for bit. A class target that is neither in [0, C) nor ignore_index makes its task's loss and
// gradient NaN, and its row is written down: nothing outside an array is read, and nobody waits to raise an error.
// Pointers are to memory of the current device, all work goes to `stream`.
#pragma once

#include <cstdint>

#include "kernels/bfloat16.h"
#include "kernels/cuda/float16.h"
#include "kernels/joint_loss.h"

namespace pymtl::cuda {

using pymtl::LossTask;

// Numbers of scratch memory for the call with these tasks.
template <typename T>
int64_t joint_loss_workspace(const LossTask<T>* tasks, int64_t count);

// tasks: on the host. bad_rows [count]: becomes each task's first row whose class is out of range, or -1.
template <typename T>
void joint_loss(const LossTask<T>* tasks, int64_t count, int64_t* bad_rows, double* workspace, void* stream);

}  // namespace pymtl::cuda
