// The speed limit of one core's arithmetic, to set measured speeds against.
#pragma once

namespace pymtl {

// GFLOP/s of independent fused multiply-adds (multiplications and additions where there is none) on the
// calling thread, under the instruction set in use: the best of `runs` of some milliseconds each.
template <typename T>
double peak_gflops(int runs);

}  // namespace pymtl
