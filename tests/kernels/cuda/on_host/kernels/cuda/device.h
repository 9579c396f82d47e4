// Stands in for csrc/kernels/cuda/device.h where the CUDA kernels are compiled for the host: the same names, each
// thread a coroutine. It shows that a kernel's arithmetic, indices and protocol are right, whatever the order in which
// threads run and messages arrive; it says nothing about speed, nor about the memory model of a GPU.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"
#include "kernels/bfloat16.h"
#include "kernels/cuda/float16.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__

namespace pymtl::cuda {

using emulator::announce_bytes;
using emulator::ArrivalBarrier;
using emulator::block_count;
using emulator::block_index;
using emulator::block_threads;
using emulator::cluster_rank;
using emulator::kWarp;
inline int64_t block_row() { return emulator::block_row_of_grid; }
using emulator::shared_memory;
using emulator::start_barrier;
using emulator::sync_cluster;
using emulator::sync_threads;
using emulator::thread_index;
using emulator::wait_for_bytes;

inline void order_loads() {}

inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

inline float shuffle_xor(float value, int mask) {
  return float_of(static_cast<uint32_t>(emulator::exchange(bits_of(value), mask)));
}
inline double shuffle_xor(double value, int mask) {
  return std::bit_cast<double>(emulator::exchange(std::bit_cast<uint64_t>(value), mask));
}
inline int shuffle_xor(int value, int mask) {
  return static_cast<int>(emulator::exchange(static_cast<uint32_t>(value), mask));
}
inline int64_t shuffle_xor(int64_t value, int mask) {
  return static_cast<int64_t>(emulator::exchange(static_cast<uint64_t>(value), mask));
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
// Faster than the compiler's own conversion, which without F16C is a call.
inline float to_float(Float16 x) {
  const uint32_t size = (x.bits & 0x7fffU) << 13;
  const bool finite = (x.bits & 0x7c00U) != 0x7c00U;
  const float value =
      finite ? float_of(size) * 0x1p112F : float_of(size | 0x7f800000U);  // the exponents' biases differ
  return (x.bits & 0x8000U) != 0 ? -value : value;
}

template <typename T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = bits_of(x);
    if (std::isnan(x)) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    const _Float16 half = static_cast<_Float16>(x);
    T result;
    std::memcpy(&result.bits, &half, sizeof half);
    return result;
  }
}

template <typename T>
Accum<T> to_accum(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return to_float(x);
  }
}
template <typename T>
T from_accum(Accum<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

template <typename T>
uint32_t pair_of(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}
template <typename T>
float first_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <typename T>
float second_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

inline float sigmoid(float x) { return 1.0F / (1.0F + std::exp(-x)); }
inline float hyperbolic_tangent(float x) { return 1.0F - 2.0F / (1.0F + std::exp(2.0F * x)); }

inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }
template <typename R>
R exact_sigmoid(R x) {
  return R(1) / (R(1) + exponential(-x));
}
inline float exact_hyperbolic_tangent(float x) { return std::tanh(x); }
inline double exact_hyperbolic_tangent(double x) { return std::tanh(x); }

template <typename T>
void multiply_tile(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  float sums[4];
  emulator::collect(words, 6, [&](const emulator::Words* lanes, int lane) {
    const int r = lane / 4;
    for (int element = 0; element < 4; ++element) {
      const int row = r + 8 * (element / 2);
      const int column = 2 * (lane % 4) + element % 2;
      float sum = 0.0F;
      for (int k = 0; k < 16; ++k) {
        const int pair = k % 8 / 2;
        const uint32_t of_a = lanes[4 * (row % 8) + pair].word[row / 8 + 2 * (k / 8)];
        const uint32_t of_b = lanes[4 * column + pair].word[4 + k / 8];
        sum += k % 2 == 0 ? first_of<T>(of_a) * first_of<T>(of_b) : second_of<T>(of_a) * second_of<T>(of_b);
      }
      sums[element] = sum;
    }
  });
  for (int element = 0; element < 4; ++element) acc[element] += sums[element];
}

inline uint32_t rounded_to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  return std::isfinite(x) ? (bits + 0x1000) & ~uint32_t{0x1fff} : bits;
}

inline void multiply_tile_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  float sums[4];
  emulator::collect(words, 6, [&](const emulator::Words* lanes, int lane) {
    const int r = lane / 4;
    for (int element = 0; element < 4; ++element) {
      const int row = r + 8 * (element / 2);
      const int column = 2 * (lane % 4) + element % 2;
      float sum = 0.0F;
      for (int k = 0; k < 8; ++k) {
        const uint32_t of_a = lanes[4 * (row % 8) + k % 4].word[row / 8 + 2 * (k / 4)];
        const uint32_t of_b = lanes[4 * column + k % 4].word[4 + k / 4];
        constexpr uint32_t kRead = ~uint32_t{0x1fff};  // the other bits do not count
        sum += float_of(of_a & kRead) * float_of(of_b & kRead);
      }
      sums[element] = sum;
    }
  });
  for (int element = 0; element < 4; ++element) acc[element] += sums[element];
}

inline uint32_t transpose_tile(uint32_t pair) {
  uint32_t result = 0;
  emulator::collect(&pair, 1, [&](const emulator::Words* lanes, int lane) {
    const int row = lane / 4;
    for (int i = 0; i < 2; ++i) {
      const int column = 2 * (lane % 4) + i;
      const uint32_t source = lanes[4 * column + row / 2].word[0];
      result |= (row % 2 == 0 ? source & 0xffff : source >> 16) << (16 * i);
    }
  });
  return result;
}

struct uint4 {
  uint32_t x, y, z, w;
};

inline void count_arrival(uint32_t* counter) { ++*counter; }
inline void wait_for_arrivals(const uint32_t* counter, uint32_t count) { emulator::wait_for_arrivals(counter, count); }
inline uint4 load_fresh(const uint4* at) { return *at; }

inline uint32_t shared_address(const void* memory) { return emulator::address_of(memory); }
inline uint32_t address_in(uint32_t address, int rank) { return emulator::address_in(address, rank); }

inline void send(uint32_t address, uint32_t value, uint32_t barrier) {
  emulator::send(address, &value, sizeof value, barrier);
}
inline void send(uint32_t address, float value, uint32_t barrier) { send(address, bits_of(value), barrier); }
inline void send(uint32_t address, float first, float second, uint32_t barrier) {
  const float values[2] = {first, second};
  emulator::send(address, values, sizeof values, barrier);
}

inline void send(uint32_t address, const float (&values)[4], uint32_t barrier) {
  emulator::send(address, values, sizeof values, barrier);
}

using Stream = void*;

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
using std::fmaf;

inline bool stream_is_recorded(Stream) { return false; }
inline int current_device() { return 0; }

struct Grid {
  int64_t blocks;
  int threads;
  int cluster;
  size_t shared_bytes;
  int64_t rows = 1;
};

template <typename Args>
void launch(void (*kernel)(Args), const Grid& grid, Stream, const Args& args) {
  for (emulator::block_row_of_grid = 0; emulator::block_row_of_grid < grid.rows; ++emulator::block_row_of_grid) {
    emulator::run(grid.blocks, grid.threads, grid.cluster, grid.shared_bytes, [&] { kernel(args); });
  }
}

template <typename Args>
int clusters_at_once(void (*)(Args), const Grid& grid) {
  const bool refused = grid.cluster > 16 || grid.cluster == emulator::refused_cluster;
  return grid.shared_bytes <= emulator::kSharedBytes && !refused ? emulator::clusters_at_once : 0;
}

template <typename Args>
void launch_together(void (*kernel)(Args), const Grid& grid, Stream, const Args& args) {
  emulator::run(grid.blocks, grid.threads, static_cast<int>(grid.blocks), grid.shared_bytes, [&] { kernel(args); });
}

template <typename Args>
int blocks_at_once(void (*)(Args), const Grid&) {
  return emulator::blocks_at_once;
}

inline void clear(void* memory, size_t bytes, Stream) { std::memset(memory, 0, bytes); }

}  // namespace pymtl::cuda
