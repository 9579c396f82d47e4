// A vector of the widest registers this file is compiled for, as a small value type. Included only by
// the per-instruction-set translation units: everything is in an anonymous namespace, because a function
// compiled with AVX that the linker shares with other files is an illegal instruction on an older CPU.
//
// Multiplications and additions fuse only where `fma` says so (the build turns contraction off), so that
// an expression gives the same bits wherever it is inlined. Baseline x86-64 has no fused operation; there
// `fma` rounds twice.
#pragma once

#ifndef PYMTL_ISA
#error "csrc/kernels/cpu/simd is for what is compiled once per instruction set: see add_isa in CMakeLists.txt"
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#include "../../bfloat16.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#else
#error "no vector registers known for this architecture"
#endif

#define PYMTL_INLINE inline __attribute__((always_inline))
#define PYMTL_INLINE_LAMBDA __attribute__((always_inline))

namespace pymtl {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 6;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 3;  // 12 accumulators of 16 registers
#elif defined(__SSE2__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 3;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;
#endif

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};
// What a bfloat16 becomes in a register.
template <>
struct VectorOf<BFloat16> : VectorOf<float> {};
template <typename T>
using Vec = typename VectorOf<T>::Type;
template <typename T>
using IntVec = typename VectorOf<T>::Int;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Accum<T>));

// How many numbers of consecutive depth lie side by side in a lane of a panel (see panels.h).
template <typename T>
constexpr int kDepthGroup = static_cast<int>(sizeof(Accum<T>) / sizeof(T));
template <typename T>
constexpr int64_t padded_depth(int64_t depth) {
  return (depth + kDepthGroup<T> - 1) / kDepthGroup<T> * kDepthGroup<T>;
}

template <typename T>
PYMTL_INLINE Vec<T> load(const T* from) {
  Vec<T> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
PYMTL_INLINE void store(T* to, Vec<T> value) {
  std::memcpy(to, &value, sizeof value);
}

PYMTL_INLINE Vec<float> broadcast(float x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_set1_ps(x);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_set1_ps(x);
#else
  return (Vec<float>)vdupq_n_f32(x);
#endif
}

PYMTL_INLINE Vec<double> broadcast(double x) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_set1_pd(x);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_set1_pd(x);
#elif defined(__SSE2__)
  return (Vec<double>)_mm_set1_pd(x);
#else
  return (Vec<double>)vdupq_n_f64(x);
#endif
}

// a * b + c
PYMTL_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__SSE2__)
  return a * b + c;
#else
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}

PYMTL_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__SSE2__)
  return a * b + c;
#else
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#endif
}

#if defined(__AVX512F__)
PYMTL_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
#elif defined(__AVX2__)
// All bits of the first `count` lanes.
template <typename T>
PYMTL_INLINE __m256i first_lanes(int64_t count) {
  if constexpr (sizeof(T) == 4) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  } else {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  }
}
#endif

// The first `count` lanes (count >= 0) from memory, the others `fill`. Reads nothing past them.
template <typename T>
PYMTL_INLINE Vec<T> load_part(const T* from, int64_t count, T fill = T(0)) {
  if (count >= kLanes<T>) return load(from);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_mask_loadu_ps((__m512)broadcast(fill), first_lanes(count), from);
  } else {
    return (Vec<T>)_mm512_mask_loadu_pd((__m512d)broadcast(fill), static_cast<__mmask8>(first_lanes(count)), from);
  }
#elif defined(__AVX2__)
  const __m256i mask = first_lanes<T>(count);
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_blendv_ps((__m256)broadcast(fill), _mm256_maskload_ps(from, mask), (__m256)mask);
  } else {
    return (Vec<T>)_mm256_blendv_pd((__m256d)broadcast(fill), _mm256_maskload_pd(from, mask), (__m256d)mask);
  }
#else
  T lanes[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = fill;
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
#endif
}

// Stores the first `count` lanes; touches nothing past them.
template <typename T>
PYMTL_INLINE void store_part(T* to, Vec<T> value, int64_t count) {
  if (count >= kLanes<T>) return store(to, value);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)value);
  } else {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(first_lanes(count)), (__m512d)value);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    _mm256_maskstore_ps(to, first_lanes<T>(count), (__m256)value);
  } else {
    _mm256_maskstore_pd(to, first_lanes<T>(count), (__m256d)value);
  }
#else
  T lanes[kLanes<T>];
  store(lanes, value);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
#endif
}

template <typename T>
PYMTL_INLINE Vec<T> select(IntVec<T> condition, Vec<T> yes, Vec<T> no) {
  return condition ? yes : no;
}

// The product of a row's and a panel's next depth group, in kSteps<T> steps (bfloat16.h has its own).
template <typename T>
constexpr int kSteps = 1;

template <int Step, typename T>
PYMTL_INLINE Vec<T> row_operand(const T* row) {
  return broadcast(*row);
}

template <int Step, typename T>
PYMTL_INLINE Vec<T> panel_operand(const T* panel) {
  return load(panel);
}

template <typename T>
PYMTL_INLINE Vec<T> multiply_add(Vec<T> x, Vec<T> w, Vec<T> acc) {
  return fma(x, w, acc);
}

// The larger and the smaller of x and a limit; NaN where x is.
PYMTL_INLINE Vec<float> at_least(Vec<float> x, Vec<float> limit) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)limit, (__m512)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)limit, (__m256)x);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_max_ps((__m128)limit, (__m128)x);
#else
  return (Vec<float>)vmaxq_f32((float32x4_t)limit, (float32x4_t)x);
#endif
}

PYMTL_INLINE Vec<double> at_least(Vec<double> x, Vec<double> limit) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_max_pd((__m512d)limit, (__m512d)x);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_max_pd((__m256d)limit, (__m256d)x);
#elif defined(__SSE2__)
  return (Vec<double>)_mm_max_pd((__m128d)limit, (__m128d)x);
#else
  return (Vec<double>)vmaxq_f64((float64x2_t)limit, (float64x2_t)x);
#endif
}

PYMTL_INLINE Vec<float> at_most(Vec<float> x, Vec<float> limit) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)limit, (__m512)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_min_ps((__m256)limit, (__m256)x);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_min_ps((__m128)limit, (__m128)x);
#else
  return (Vec<float>)vminq_f32((float32x4_t)limit, (float32x4_t)x);
#endif
}

PYMTL_INLINE Vec<double> at_most(Vec<double> x, Vec<double> limit) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_min_pd((__m512d)limit, (__m512d)x);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_min_pd((__m256d)limit, (__m256d)x);
#elif defined(__SSE2__)
  return (Vec<double>)_mm_min_pd((__m128d)limit, (__m128d)x);
#else
  return (Vec<double>)vminq_f64((float64x2_t)limit, (float64x2_t)x);
#endif
}

// The lanes moved down by `By`, around the end.
template <typename T, int By, int... Lane>
PYMTL_INLINE Vec<T> rotated(Vec<T> value, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(value, value, ((Lane + By) % kLanes<T>)...);
}

// The sum and the maximum of the lanes: halves on halves, in one fixed order.
template <typename T, int By = kLanes<T> / 2>
PYMTL_INLINE T sum_lanes(Vec<T> value) {
  if constexpr (By == 0) {
    return value[0];
  } else {
    return sum_lanes<T, By / 2>(value + rotated<T, By>(value, std::make_integer_sequence<int, kLanes<T>>{}));
  }
}

// sum += x with the rounding error carried along in `error` (Kahan 1965): long sums keep their accuracy.
template <typename T>
PYMTL_INLINE void add_compensated(Vec<T> x, Vec<T>& sum, Vec<T>& error) {
  const Vec<T> corrected = x - error;
  const Vec<T> next = sum + corrected;
  error = (next - sum) - corrected;
  error = select<T>(error == error, error, Vec<T>{});  // an infinite sum has no error, and stays infinite
  sum = next;
}

// NaN, if any lane is.
template <typename T>
PYMTL_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return select<T>((a > b) | (a != a), a, b);
}

template <typename T, int By = kLanes<T> / 2>
PYMTL_INLINE T max_lanes(Vec<T> value) {
  if constexpr (By == 0) {
    return value[0];
  } else {
    return max_lanes<T, By / 2>(maximum<T>(value, rotated<T, By>(value, std::make_integer_sequence<int, kLanes<T>>{})));
  }
}

template <typename T, int... Lane>
PYMTL_INLINE void interleave(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high, std::integer_sequence<int, Lane...>) {
  constexpr int n = kLanes<T>;
  low = __builtin_shufflevector(a, b, (Lane / 2 + (Lane % 2) * n)...);
  high = __builtin_shufflevector(a, b, (n / 2 + Lane / 2 + (Lane % 2) * n)...);
}

// Transposes a square of lanes x lanes: log2(lanes) rounds of a perfect shuffle of the rows.
template <typename T>
PYMTL_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
#pragma GCC unroll 8
  for (int round = 1; round < n; round *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      interleave<T>(rows[i], rows[i + n / 2], next[2 * i], next[2 * i + 1], std::make_integer_sequence<int, n>{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

}  // namespace
}  // namespace pymtl
