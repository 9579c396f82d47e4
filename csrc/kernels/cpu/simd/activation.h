// exp, sigmoid and tanh on vectors, within 2 units in the last place over the whole range.
//
// All three reduce x = n ln2 + r with |r| <= ln2/2 and use exp(r) - 1 = r + r^2 q(r), q a polynomial
// fitted to the relative error of exp(r) - 1.
//
// V is a Vec<T>, or several in lockstep.
#pragma once

#include "lockstep.h"

namespace pymtl {
namespace {

template <typename T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504088896341f;
  static constexpr float ln2_high = 0.693359375f;  // 9 bits: n * ln2_high is exact without fma too
  static constexpr float ln2_low = -2.12194440054690583e-4f;
  static constexpr float shifter = 0x1.8p23f;  // adding and subtracting it rounds to an integer
  static constexpr float overflow = 88.8f;     // exp of more is infinite
  static constexpr float underflow = -104.0f;  // exp of less is zero
  static constexpr float sigmoid_one = 20.0f;  // sigmoid of more rounds to one
  static constexpr float tanh_one = 10.0f;     // so does tanh
  static constexpr int32_t exponent_bias = 127;
  static constexpr int mantissa_bits = 23;
  static constexpr int32_t subnormal_bits = 25;      // results reach 2^-150, a normal number has 2^-126
  static constexpr float smallest_power = 0x1p-25f;  // 2^-subnormal_bits
  static constexpr int32_t sigmoid_scale_bits = 30;
  static constexpr float sigmoid_scale = 0x1p-30f;
  static constexpr int tanh_terms = 4;  // of (tanh(x) - x) / x^3 in x^2 for |x| < 0.3
  static constexpr float tanh_cubic[tanh_terms] = {0x1.4d6cdap-6f, -0x1.b96b30p-5f, 0x1.111048p-3f, -0x1.555556p-2f};
  static constexpr int terms = 5;
  static constexpr float q[terms] = {0x1.6bebfep-10f, 0x1.1227b0p-7f, 0x1.555674p-5f, 0x1.5554b0p-3f, 0x1.fffffep-2f};
};

template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.44269504088896340736;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1;  // 33 bits, likewise
  static constexpr double ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double shifter = 0x1.8p52;
  static constexpr double overflow = 709.9;
  static constexpr double underflow = -746.0;
  static constexpr double sigmoid_one = 40.0;
  static constexpr double tanh_one = 20.0;
  static constexpr int64_t exponent_bias = 1023;
  static constexpr int mantissa_bits = 52;
  static constexpr int64_t subnormal_bits = 54;
  static constexpr double smallest_power = 0x1p-54;
  static constexpr int64_t sigmoid_scale_bits = 60;
  static constexpr double sigmoid_scale = 0x1p-60;
  static constexpr int tanh_terms = 8;
  static constexpr double tanh_cubic[tanh_terms] = {
      0x1.0bde36fa6aaeap-11, -0x1.7ab0a4361f5b7p-10, 0x1.d6b777f23d264p-9, -0x1.226de96b8522ap-7,
      0x1.664f47a5129dap-6,  -0x1.ba1ba1b8dd473p-5,  0x1.1111111110b9ep-3, -0x1.5555555555555p-2};
  static constexpr int terms = 10;
  static constexpr double q[terms] = {
      0x1.af38d53857513p-26, 0x1.2891a8c1d838dp-22, 0x1.71de0d9c145d0p-19, 0x1.a019b8ef67c6cp-16, 0x1.a01a01a7c8d47p-13,
      0x1.6c16c17893833p-10, 0x1.11111111109adp-7,  0x1.5555555553d4fp-5,  0x1.5555555555556p-3,  0x1.0000000000001p-1};
};

// exp(r) - 1 of x = n ln2 + r, and n in the low bits of `shifted`; x within [underflow, overflow] or NaN.
template <typename T, typename V>
PYMTL_INLINE V reduced_expm1(const V& x, V& shifted) {
  using K = ExpConstants<T>;
  shifted = fma(x, broadcast(K::log2e), broadcast(K::shifter));
  const V n = shifted - broadcast(K::shifter);
  V r = fma(n, broadcast(-K::ln2_high), x);
  r = fma(n, broadcast(-K::ln2_low), r);
  V q = fma(broadcast(K::q[0]), r, broadcast(K::q[1]));
#pragma GCC unroll 16
  for (int i = 2; i < K::terms; ++i) q = fma(q, r, broadcast(K::q[i]));
  return fma(r * r, q, r);
}

// 2^n for integers n in the low bits; the shift drops all other bits.
template <typename T, typename Integers>
PYMTL_INLINE auto power_of_two(const Integers& n) {
  return from_bits<T>((n + ExpConstants<T>::exponent_bias) << ExpConstants<T>::mantissa_bits);
}

// exp(x) for x <= 0 or NaN. Scaled up while it is built, so that a subnormal result is rounded once.
template <typename T>
PYMTL_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  using K = ExpConstants<T>;
  x = at_least(x, broadcast(K::underflow));
  Vec<T> shifted;
  const Vec<T> p = reduced_expm1<T>(x, shifted);
  const Vec<T> power = power_of_two<T>((IntVec<T>)shifted + K::subnormal_bits);
  return fma(power, p, power) * broadcast(K::smallest_power);
}

template <typename T>
PYMTL_INLINE Vec<T> exp(Vec<T> x) {
  using K = ExpConstants<T>;
  x = at_most(at_least(x, broadcast(K::underflow)), broadcast(K::overflow));
  Vec<T> shifted;
  const Vec<T> p = reduced_expm1<T>(x, shifted);
  const IntVec<T> n = (IntVec<T>)shifted - (IntVec<T>)broadcast(K::shifter);
  const IntVec<T> half = n >> 1;
  const Vec<T> power = power_of_two<T>(half);
  return fma(power, p, power) * power_of_two<T>(n - half);
}

template <typename T, typename V>
PYMTL_INLINE V negated_absolute(const V& x) {
  return from_bits<T>(bits_of<T>(x) | bits_of<T>(broadcast(T(-0.0))));
}

// 1 / (1 + exp(-x)) = 1 / (2^n (1 + p + 2^-n)), with both sides of the fraction scaled down: exp(-x) reaches far
// beyond the largest number before the quotient is zero, and so only the division rounds a subnormal result.
template <typename T, typename V>
PYMTL_INLINE V sigmoid(const V& x) {
  using K = ExpConstants<T>;
  const V negated = at_most(at_least(-x, broadcast(-K::sigmoid_one)), broadcast(-K::underflow));
  V shifted;
  const V p = reduced_expm1<T>(negated, shifted);
  const auto n = bits_of<T>(shifted) - bits_of<T>(broadcast(K::shifter));
  const V power = power_of_two<T>(n - K::sigmoid_scale_bits);
  const auto biased =
      each([](auto bias) PYMTL_INLINE_LAMBDA { return bias > 0 ? bias : IntVec<T>{}; }, K::exponent_bias - n);
  const V inverse = from_bits<T>(biased << K::mantissa_bits);  // 2^-n, in the end zero
  return broadcast(K::sigmoid_scale) / fma(power, p + inverse, power);
}

// Near zero an odd polynomial; further out expm1(2|x|) / (expm1(2|x|) + 2), where nothing cancels and the
// exponential's error counts the less the larger it is.
template <typename T, typename V>
PYMTL_INLINE V tanh(const V& x) {
  using K = ExpConstants<T>;
  const V negated = negated_absolute<T>(x);
  const V size = at_least(negated, broadcast(-K::tanh_one));
  V shifted;
  const V p = reduced_expm1<T>(V(size * broadcast(T(-2))), shifted);
  const V power = power_of_two<T>(bits_of<T>(shifted));
  const V expm1 = fma(power, p, power - broadcast(T(1)));
  const V outer = expm1 / (expm1 + broadcast(T(2)));

  const V square = x * x;
  V cubic = fma(broadcast(K::tanh_cubic[0]), square, broadcast(K::tanh_cubic[1]));
#pragma GCC unroll 16
  for (int i = 2; i < K::tanh_terms; ++i) cubic = fma(cubic, square, broadcast(K::tanh_cubic[i]));
  const V inner = fma(x * square, cubic, x);
  const V result = select<T>(negated > broadcast(T(-0.3)), inner, outer);
  return from_bits<T>(bits_of<T>(result) | (bits_of<T>(x) & bits_of<T>(broadcast(T(-0.0)))));  // the sign of zero too
}

// Slopes, of the activations' values. The square is rounded: a fused operation would be more exact near 1, and would
// change the gradients' bits.
template <typename T>
PYMTL_INLINE Vec<T> slope_of_tanh(Vec<T> value) {
  return broadcast(T(1)) - value * value;
}

template <typename T>
PYMTL_INLINE Vec<T> slope_of_sigmoid(Vec<T> value) {
  return value * (broadcast(T(1)) - value);
}

}  // namespace
}  // namespace pymtl
