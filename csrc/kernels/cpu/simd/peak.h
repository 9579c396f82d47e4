// What limits a kernel: multiply-adds that depend on nothing but registers, and reading.
#pragma once

#include "panels.h"

namespace pymtl {
namespace {

// Returns the number of floating-point operations done; *sink keeps the compiler from leaving them out.
template <typename T>
int64_t multiply_adds(int64_t rounds, Accum<T>* sink) {
  constexpr int kChains = 12;  // more than latency times throughput, fewer than the registers
  Vec<T> acc[kChains];
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) acc[c] = broadcast(Accum<T>(c));
  const Vec<T> x = broadcast(Accum<T>(0.5));
  const Vec<T> w = broadcast(*sink);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) acc[c] = multiply_add<T>(x, w, acc[c]);
    asm volatile("");
  }
  Vec<T> sum = acc[0];
  for (int c = 1; c < kChains; ++c) sum = sum + acc[c];
  *sink = sum_lanes<Accum<T>>(sum);
  return 2 * rounds * kChains * kLanes<T> * kDepthGroup<T> / kSteps<T>;
}

// Reads `count` numbers, a multiple of eight vectors.
template <typename T>
void read_all(const T* from, int64_t count, T* sink) {
  constexpr int kStreams = 8;
  Vec<T> sum[kStreams] = {};
  for (int64_t i = 0; i < count; i += kStreams * kLanes<T>) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) sum[s] = sum[s] + load(from + i + s * kLanes<T>);
  }
  for (int s = 1; s < kStreams; ++s) sum[0] = sum[0] + sum[s];
  *sink = sum_lanes<T>(sum[0]);
}

}  // namespace
}  // namespace pymtl
