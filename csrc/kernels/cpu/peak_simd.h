// Multiply-adds that depend on nothing but registers.
#pragma once

#include "simd.h"

namespace pymtl {
namespace {

// Returns the number of floating-point operations done; *sink keeps the compiler from leaving them out.
template <typename T>
int64_t multiply_adds(int64_t rounds, T* sink) {
  constexpr int kChains = 12;  // more than latency times throughput, fewer than the registers
  Vec<T> acc[kChains];
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) acc[c] = broadcast(T(c));
  const Vec<T> x = broadcast(T(0.5));
  const Vec<T> y = broadcast(*sink);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) acc[c] = fma(acc[c], x, y);
    asm volatile("");
  }
  Vec<T> sum = acc[0];
  for (int c = 1; c < kChains; ++c) sum = sum + acc[c];
  *sink = sum_lanes<T>(sum);
  return 2 * rounds * kChains * kLanes<T>;
}

}  // namespace
}  // namespace pymtl
