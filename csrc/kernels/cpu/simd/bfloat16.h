// Vectors of bfloat16 numbers in memory, of floats in registers; and the operands of a product of two.
//
// A panel of weights holds two consecutive k side by side in each lane ("a pair"): AVX512-BF16 multiplies and adds
// both at once, with one rounding for each. Elsewhere the two halves are taken one after the other.
#pragma once

#include "vector.h"

namespace pymtl {
namespace {

typedef uint32_t WordVec __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));

PYMTL_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

PYMTL_INLINE Vec<float> widen(HalfVec halves) { return (Vec<float>)(__builtin_convertvector(halves, WordVec) << 16); }

// To the nearest, ties to even; NaN stays NaN.
PYMTL_INLINE HalfVec narrow(Vec<float> value) {
  const WordVec bits = (WordVec)value;
  const WordVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const WordVec quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector((WordVec)(value == value) ? rounded : quiet, HalfVec);
}

PYMTL_INLINE Vec<float> load(const BFloat16* from) {
  HalfVec halves;
  std::memcpy(&halves, from, sizeof halves);
  return widen(halves);
}

PYMTL_INLINE void store(BFloat16* to, Vec<float> value) {
  const HalfVec halves = narrow(value);
  std::memcpy(to, &halves, sizeof halves);
}

PYMTL_INLINE Vec<float> load_part(const BFloat16* from, int64_t count) {
  if (count >= kLanes<BFloat16>) return load(from);
#if defined(__AVX512F__)
  return widen((HalfVec)_mm256_maskz_loadu_epi16(first_lanes(count), from));
#else
  BFloat16 lanes[kLanes<BFloat16>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
#endif
}

PYMTL_INLINE void store_part(BFloat16* to, Vec<float> value, int64_t count) {
  if (count >= kLanes<BFloat16>) return store(to, value);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)narrow(value));
#else
  BFloat16 lanes[kLanes<BFloat16>];
  store(lanes, value);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
#endif
}

// Lanes' pairs (first, second), both of them bfloat16 numbers.
PYMTL_INLINE Vec<float> pair(Vec<float> first, Vec<float> second) {
  return (Vec<float>)(((WordVec)first >> 16) | ((WordVec)second & 0xffff0000u));
}

// The product of a row's and a panel's next pair.
#if defined(__AVX512BF16__)
template <int Step>
PYMTL_INLINE Vec<float> row_operand(const BFloat16* row) {
  int32_t both;
  std::memcpy(&both, row, sizeof both);
  return (Vec<float>)_mm512_set1_epi32(both);
}

template <int Step>
PYMTL_INLINE Vec<float> panel_operand(const BFloat16* panel) {
  return load(reinterpret_cast<const float*>(panel));
}

template <>
PYMTL_INLINE Vec<float> multiply_add<BFloat16>(Vec<float> x, Vec<float> w, Vec<float> acc) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
}
#else
template <>
constexpr int kSteps<BFloat16> = 2;

template <int Step>
PYMTL_INLINE Vec<float> row_operand(const BFloat16* row) {
  return broadcast(widen(row[Step]));
}

template <int Step>
PYMTL_INLINE Vec<float> panel_operand(const BFloat16* panel) {
  const WordVec pairs = (WordVec)load(reinterpret_cast<const float*>(panel));
  return (Vec<float>)(Step == 0 ? pairs << 16 : pairs & 0xffff0000u);
}

template <>
PYMTL_INLINE Vec<float> multiply_add<BFloat16>(Vec<float> x, Vec<float> w, Vec<float> acc) {
  return fma(x, w, acc);
}
#endif

}  // namespace
}  // namespace pymtl
