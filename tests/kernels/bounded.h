// Arithmetic in long double that knows how far the same steps in T may be from it: a running error bound
// (Higham, Accuracy and Stability of Numerical Algorithms, section 3.3). A reference written with it, in the
// order of the kernel's own sums, says both what is right and how much error is rounding. Nothing is tuned.
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"

namespace pymtl::test {

template <typename T>
struct Bounded {
  static constexpr double kUnit = std::numeric_limits<T>::epsilon() / 2;  // of one rounding, relative
  static constexpr double kTiny = std::numeric_limits<T>::denorm_min();   // of one rounding that underflows

  long double value = 0;
  double error = 0;

  Bounded() = default;
  Bounded(T exact) : value(exact) {}

  // A result computed from values that were `inherited` away from theirs, within `roundings` of rounding.
  static Bounded rounded(long double value, double inherited, double roundings = 1) {
    Bounded result;
    result.value = value;
    result.error = inherited + roundings * kUnit * (std::abs(static_cast<double>(value)) + inherited) + kTiny;
    return result;
  }
};

template <typename T>
Bounded<T> operator-(Bounded<T> a) {
  a.value = -a.value;
  return a;
}
template <typename T>
Bounded<T> operator+(const Bounded<T>& a, const Bounded<T>& b) {
  return Bounded<T>::rounded(a.value + b.value, a.error + b.error);
}
template <typename T>
Bounded<T> operator-(const Bounded<T>& a, const Bounded<T>& b) {
  return a + (-b);
}
template <typename T>
Bounded<T> operator*(const Bounded<T>& a, const Bounded<T>& b) {
  const double from_a = std::abs(static_cast<double>(b.value)) * a.error;
  const double from_b = std::abs(static_cast<double>(a.value)) * b.error;
  return Bounded<T>::rounded(a.value * b.value, from_a + from_b + a.error * b.error);
}
template <typename T>
Bounded<T> operator/(const Bounded<T>& a, T exact) {
  return Bounded<T>::rounded(a.value / exact, a.error / std::abs(static_cast<double>(exact)));
}

// The functions are within 2 ulp, which is at most 4 units of rounding. Their second derivatives are below
// 0.1 and 0.8, so the first derivative and the square of the error bound what is inherited.
template <typename T>
Bounded<T> sigmoid_of(const Bounded<T>& x) {
  const long double y = 1 / (1 + std::exp(-x.value));
  return Bounded<T>::rounded(y, static_cast<double>(y * (1 - y)) * x.error + 0.05 * x.error * x.error, 4);
}
template <typename T>
Bounded<T> tanh_of(const Bounded<T>& x) {
  const long double y = std::tanh(x.value);
  return Bounded<T>::rounded(y, static_cast<double>(1 - y * y) * x.error + 0.4 * x.error * x.error, 4);
}

template <typename T>
Bounded<T> exponential_of(const Bounded<T>& x) {
  const long double y = std::exp(x.value);
  return Bounded<T>::rounded(y, static_cast<double>(y) * std::expm1(x.error), 4);
}

template <typename T>
Bounded<T> quotient(const Bounded<T>& a, const Bounded<T>& b) {
  const double size = std::abs(static_cast<double>(b.value));
  const double inherited = (a.error + std::abs(static_cast<double>(a.value)) / size * b.error) / (size - b.error);
  return Bounded<T>::rounded(a.value / b.value, inherited);
}

template <typename T>
Bounded<T> sum_of(const std::vector<Bounded<T>>& values) {
  Bounded<T> sum(T(0));
  for (const Bounded<T>& value : values) sum = sum + value;
  return sum;
}

template <typename T>
Bounded<T> largest(const Bounded<T>& a, const Bounded<T>& b) {
  Bounded<T> result;
  result.value = std::max(a.value, b.value);
  result.error = std::max(a.error, b.error);
  return result;
}

// sum + weights[0] x[0] + weights[1] x[1] + ..., in this order; products may or may not be fused.
template <typename T>
Bounded<T> add_products(Bounded<T> sum, const T* weights, const Bounded<T>* x, int64_t count) {
  constexpr double kUnit = Bounded<T>::kUnit;
  double roundings = 0;  // sizes of all that was rounded
  double inherited = 0;
  for (int64_t k = 0; k < count; ++k) {
    const long double product = static_cast<long double>(weights[k]) * x[k].value;
    sum.value += product;
    roundings += std::abs(static_cast<double>(product)) + std::abs(static_cast<double>(sum.value));
    inherited += std::abs(static_cast<double>(weights[k])) * x[k].error;
  }
  // What the inherited errors add to a partial sum is rounded at most once per product and sum behind it.
  const double n = static_cast<double>(count);
  sum.error += inherited;
  sum.error += 2 * n * kUnit * sum.error + (1 + 2 * n * kUnit) * kUnit * roundings + n * Bounded<T>::kTiny;
  return sum;
}

// The mean, summed with compensation: the sum is then off by 2 units of the sizes of all that is added, to
// first order, however many those are (Higham, section 4.3).
template <typename T>
Bounded<T> mean_of(const std::vector<Bounded<T>>& values) {
  constexpr double kUnit = Bounded<T>::kUnit;
  const double count = static_cast<double>(values.size());
  Bounded<T> sum;
  double size = 0;
  for (const Bounded<T>& x : values) {
    sum.value += x.value;
    sum.error += x.error;
    size += std::abs(static_cast<double>(x.value)) + x.error;
  }
  sum.error += (2 * kUnit + 4 * count * kUnit * kUnit) * size;
  return sum / static_cast<T>(count);
}

// The same names for plain numbers, so that a reference can be written once.
template <std::floating_point R>
R sigmoid_of(R x) {
  return 1 / (1 + std::exp(-x));
}
template <std::floating_point R>
R tanh_of(R x) {
  return std::tanh(x);
}
template <std::floating_point R>
R largest(R a, R b) {
  return std::max(a, b);
}
template <std::floating_point R>
R mean_of(const std::vector<R>& values) {
  R sum = 0;
  for (const R x : values) sum += x;
  return sum / static_cast<R>(values.size());
}
template <typename T, std::floating_point R>
R add_products(R sum, const T* weights, const R* x, int64_t count) {
  for (int64_t k = 0; k < count; ++k) sum += weights[k] * x[k];
  return sum;
}

// The largest error seen, in parts of its bound: how tight the bounds are.
inline double largest_part_of_bound = 0;

// Every element of `actual` is within its bound. A null array was not wanted.
template <typename T>
void check_within(const char* array, const Buffer<T>& actual, const std::vector<Bounded<T>>& expected) {
  if (!actual) return;
  CHECK(actual.size() == static_cast<int64_t>(expected.size()), array, actual.size(), expected.size());
  for (int64_t i = 0; i < actual.size(); ++i) {
    const Bounded<T>& truth = expected[static_cast<size_t>(i)];
    const double error = std::abs(static_cast<double>(static_cast<long double>(actual[i]) - truth.value));
    CHECK(error <= truth.error, array, i, actual[i], truth.value, error, truth.error);
    if (truth.error > 0) largest_part_of_bound = std::max(largest_part_of_bound, error / truth.error);
  }
}

}  // namespace pymtl::test
