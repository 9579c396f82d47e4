// exp, sigmoid and tanh: within 2 ulp of the truth wherever a number can be, and what is not a number.
#include <bit>
#include <cmath>
#include <type_traits>

#include "check.h"
#include "kernels/activation.h"

namespace pymtl::test {
namespace {

// A step in the last place at `truth`, which is finite: of its binade, or of the subnormal numbers.
template <typename T, typename Wide>
Wide unit_at(Wide truth) {
  using Limits = std::numeric_limits<T>;
  if constexpr (std::is_same_v<Wide, double>) {  // std::ilogb is slow, and there are many numbers
    const int exponent = static_cast<int>(std::bit_cast<uint64_t>(truth) >> 52 & 0x7ff) - 1023;
    const int last = std::max(exponent, Limits::min_exponent - 1) - (Limits::digits - 1);
    return std::bit_cast<double>(static_cast<uint64_t>(last + 1023) << 52);
  } else {
    const int exponent = truth == 0 ? Limits::min_exponent - 1 : std::ilogb(truth);
    return std::ldexp(Wide(1), std::max(exponent, Limits::min_exponent - 1) - (Limits::digits - 1));
  }
}

// How many steps in the last place `got` is from the truth. Infinity stands for the first power of two that
// T does not hold, and is right for every truth beyond it.
template <typename T, typename Wide>
double ulps(T got, Wide truth) {
  constexpr double kWrong = std::numeric_limits<double>::infinity();
  if (std::isnan(truth)) return std::isnan(got) ? 0 : kWrong;
  if (std::isnan(got)) return kWrong;
  if (std::isinf(truth)) return got == static_cast<T>(truth) ? 0 : kWrong;
  Wide value = got;
  if (std::isinf(got)) {
    value = std::copysign(std::ldexp(Wide(1), std::numeric_limits<T>::max_exponent), static_cast<Wide>(got));
    if (std::abs(truth) >= std::abs(value) && (truth > 0) == (value > 0)) return 0;
  }
  return static_cast<double>(std::abs(value - truth) / unit_at<T>(truth));
}

template <typename Wide>
Wide true_exp(Wide x) {
  return std::exp(x);
}
template <typename Wide>
Wide true_sigmoid(Wide x) {
  const Wide e = std::exp(-std::abs(x));
  return (x < 0 ? e : 1) / (1 + e);
}
template <typename Wide>
Wide true_tanh(Wide x) {
  return std::tanh(x);
}

template <typename T, typename Wide>
struct Function {
  const char* name;
  void (*kernel)(const T*, T*, int64_t);
  Wide (*truth)(Wide);
  T low, high;  // of the results
};

template <typename T, typename Wide>
const std::vector<Function<T, Wide>> kFunctions = {
    {"exponential", exponential<T>, true_exp<Wide>, 0, std::numeric_limits<T>::infinity()},
    {"sigmoid", sigmoid<T>, true_sigmoid<Wide>, 0, 1},
    {"hyperbolic_tangent", hyperbolic_tangent<T>, true_tanh<Wide>, -1, 1},
};

template <typename T, typename Wide>
class Worst {
 public:
  void add(const T* x, int64_t count) {
    for (size_t f = 0; f < 3; ++f) {
      const Function<T, Wide>& function = kFunctions<T, Wide>[f];
      y_.resize(static_cast<size_t>(count));
      function.kernel(x, y_.data(), count);
      for (int64_t i = 0; i < count; ++i) {
        const T y = y_[static_cast<size_t>(i)];
        const double error = ulps(y, function.truth(x[i]));
        if (error > error_[f]) {
          error_[f] = error;
          at_[f] = x[i];
        }
        outside_[f] += y < function.low || y > function.high;
      }
    }
  }

  void check() const {
    for (size_t f = 0; f < 3; ++f) {
      const char* const name = kFunctions<T, Wide>[f].name;
      CHECK(error_[f] <= 2, name, error_[f], at_[f]);
      CHECK(outside_[f] == 0, name, outside_[f]);
      std::printf("         %-18s %.3f ulp, at x = %.17g\n", name, error_[f], static_cast<double>(at_[f]));
    }
  }

 private:
  std::vector<T> y_;
  double error_[3] = {};
  T at_[3] = {};
  int64_t outside_[3] = {};
};

// A prime stride visits every exponent, and every pattern of low mantissa bits. Double's own functions
// are the truth: they are off by 2^-29 ulp of float.
void float_everywhere() {
  constexpr uint64_t kStride = PYMTL_SANITIZED ? 1009 : 67;
  constexpr int64_t kBlock = 4096;
  Worst<float, double> worst;
  std::vector<float> x;
  const auto add = [&](uint32_t bits) {
    x.push_back(std::bit_cast<float>(bits));
    if (static_cast<int64_t>(x.size()) < kBlock) return;
    worst.add(x.data(), kBlock);
    x.clear();
  };
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += kStride) add(static_cast<uint32_t>(bits));

  // Every number of both signs between two sizes.
  const auto add_window = [&](float from, float to) {
    const uint32_t stride = PYMTL_SANITIZED ? 101 : 1;
    const uint32_t last = std::bit_cast<uint32_t>(to);
    for (uint32_t bits = std::bit_cast<uint32_t>(from); bits <= last; bits += stride) {
      add(bits);
      add(bits | 0x80000000u);
    }
  };
  add_window(0.0f, 0x1p-133f);               // the smallest subnormal numbers
  add_window(0x1.fffp-127f, 0x1.001p-126f);  // where they end
  add_window(0x1.ffp-13f, 0x1.01p-12f);      // where exp leaves 1
  for (const float branch : {0.3f, 0.34657359f, 0.55f, 1.0f}) add_window(branch - 1e-4f, branch + 1e-4f);
  add_window(9.0f, 10.01f);   // where tanh becomes one
  add_window(16.5f, 17.5f);   // where sigmoid becomes one
  add_window(87.0f, 105.0f);  // subnormal and zero results, overflow
  add_window(std::numeric_limits<float>::max(), std::numeric_limits<float>::infinity());
  while (!x.empty()) add(0);
  worst.check();
}

void double_everywhere() {
  constexpr int64_t kCount = PYMTL_SANITIZED ? 1 << 12 : 1 << 16;
  Random random(1);
  Worst<double, long double> worst;
  std::vector<double> x(kCount);
  const auto add_window = [&](double from, double to) {
    for (double& value : x) value = std::copysign(random.uniform(from, to), random.flip() ? 1.0 : -1.0);
    worst.add(x.data(), kCount);
  };
  for (double& value : x) value = std::bit_cast<double>(random.bits());
  worst.add(x.data(), kCount);
  for (double& value : x) {  // every exponent that matters alike
    value = std::copysign(std::exp2(random.uniform(-60, 10)), random.flip() ? 1.0 : -1.0);
  }
  worst.add(x.data(), kCount);
  for (const double size : {1e-310, 1e-300, 1e-16, 1e-8, 1e-3, 0.1, 1.0, 2.0, 5.0, 25.0, 40.0, 750.0}) {
    add_window(0, size);
  }
  for (const double branch : {0.3, 0.34657359027997264, 0.55, 1.0}) add_window(branch - 1e-6, branch + 1e-6);
  add_window(18.5, 20.01);  // where tanh becomes one
  add_window(36.5, 38);     // where sigmoid becomes one
  add_window(707, 712);     // subnormal results, overflow
  add_window(740, 747);     // the smallest results, zero
  add_window(1e300, 1.7e308);
  x.clear();
  for (const double edge : {0.0, 0.3, 0.55, 1.0, 20.0, 708.3964185322641, 709.782712893384, 709.9, 745.1332191019411}) {
    double above = edge;
    double below = edge;
    for (int i = 0; i < 50; ++i) {
      x.insert(x.end(), {above, -above, below, -below});
      above = std::nextafter(above, 1000.0);
      below = std::nextafter(below, -1000.0);
    }
  }
  worst.add(x.data(), static_cast<int64_t>(x.size()));
  worst.check();
}

template <typename T>
void special_values() {
  using Limits = std::numeric_limits<T>;
  const T infinity = Limits::infinity();
  const auto one = [](void (*kernel)(const T*, T*, int64_t), T x) {
    T y = -7;
    kernel(&x, &y, 1);
    return y;
  };
  CHECK(one(exponential<T>, infinity) == infinity);
  CHECK(one(exponential<T>, -infinity) == 0);
  CHECK(one(exponential<T>, Limits::max()) == infinity);
  CHECK(one(exponential<T>, Limits::lowest()) == 0);
  CHECK(one(exponential<T>, T(0)) == 1);
  CHECK(one(exponential<T>, T(-0.0)) == 1);
  CHECK(one(exponential<T>, Limits::denorm_min()) == 1);
  CHECK(one(sigmoid<T>, infinity) == 1);
  CHECK(one(sigmoid<T>, -infinity) == 0);
  CHECK(one(sigmoid<T>, Limits::max()) == 1);
  CHECK(one(sigmoid<T>, Limits::lowest()) == 0);
  CHECK(one(sigmoid<T>, T(0)) == T(0.5));
  CHECK(one(sigmoid<T>, T(-0.0)) == T(0.5));
  CHECK(one(hyperbolic_tangent<T>, infinity) == 1);
  CHECK(one(hyperbolic_tangent<T>, -infinity) == -1);
  CHECK(one(hyperbolic_tangent<T>, Limits::max()) == 1);
  CHECK(one(hyperbolic_tangent<T>, Limits::lowest()) == -1);
  const T plus = one(hyperbolic_tangent<T>, T(0));
  const T minus = one(hyperbolic_tangent<T>, T(-0.0));
  CHECK(plus == 0 && !std::signbit(plus), plus);
  CHECK(minus == 0 && std::signbit(minus), minus);
  CHECK(one(hyperbolic_tangent<T>, Limits::denorm_min()) == Limits::denorm_min());
  CHECK(one(hyperbolic_tangent<T>, -Limits::denorm_min()) == -Limits::denorm_min());
  for (const T nan : {Limits::quiet_NaN(), -Limits::quiet_NaN()}) {
    CHECK(std::isnan(one(exponential<T>, nan)));
    CHECK(std::isnan(one(sigmoid<T>, nan)));
    CHECK(std::isnan(one(hyperbolic_tangent<T>, nan)));
  }
}

// An element's result depends on neither its place nor its neighbours, nothing past the end is touched,
// and an array may be its own result. tanh is odd to the bit.
template <typename T>
void places() {
  constexpr int64_t kMost = 67;
  Random random(2);
  for (const Function<T, long double>& function : kFunctions<T, long double>) {
    for (int64_t count = 0; count <= kMost; ++count) {
      const Context context(function.name, " of ", count);
      Buffer<T> x = uniform<T>(count, random, -20, 20);
      if (count > 3) x[3] = std::numeric_limits<T>::quiet_NaN();
      if (count > 4) x[4] = std::numeric_limits<T>::infinity();
      Buffer<T> y(count);
      function.kernel(x.data(), y.data(), count);
      for (int64_t i = 0; i < count; ++i) {
        T alone;
        function.kernel(&x[i], &alone, 1);
        CHECK(same_bits(&alone, &y[i], 1), i, x[i], alone, y[i]);
      }
      function.kernel(x.data(), x.data(), count);
      CHECK(same_bits(x.data(), y.data(), count));
    }
  }
  Buffer<T> x = uniform<T>(10000, random, 0, 22);
  Buffer<T> y(x.size());
  hyperbolic_tangent(x.data(), y.data(), x.size());
  for (T& value : x) value = -value;
  hyperbolic_tangent(x.data(), x.data(), x.size());
  for (T& value : x) value = -value;
  CHECK(same_bits(x.data(), y.data(), x.size()));
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests({
      {"special values, float", special_values<float>},
      {"special values, double", special_values<double>},
      {"places, float", places<float>},
      {"places, double", places<double>},
      {"everywhere, double", double_everywhere},
      {"everywhere, float", float_everywhere},
  });
}
