// The speed limits of one core, to set measured speeds against.
#pragma once

#include <cstdint>

#include "bfloat16.h"

namespace pymtl {

// GFLOP/s of independent fused multiply-adds (multiplications and additions where there is none) on the
// calling thread, under the instruction set in use: the best of `runs` of some milliseconds each.
template <typename T>
double peak_gflops(int runs);

// GB/s at which the calling thread reads `bytes` (about) again and again: the best of `runs`, each of 32 MiB at least.
double read_gigabytes(int64_t bytes, int runs);

}  // namespace pymtl
