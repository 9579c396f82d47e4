// dropout against its definition, element by element.
#include <cmath>

#include "check.h"
#include "kernels/dropout.h"

namespace pymtl::test {
namespace {

template <typename T>
void check_case(int64_t count, double p, Random& random) {
  const Context context(kTypeName<T>, " count=", count, " p=", p);
  Buffer<T> input = uniform<T>(count, random, -3, 3);
  if (count > 5) {
    input[1] = std::numeric_limits<T>::infinity();
    input[4] = std::numeric_limits<T>::quiet_NaN();
  }
  Buffer<uint16_t> bits(count);
  for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint16_t>(random.below(1 << 16));
  Buffer<T> output(count);
  const NamedExecutor executor = any_executor(random);
  const Context how(executor.name);
  dropout(Dropout<T>{count, p, input.data(), bits.data(), output.data()}, executor.executor);

  const double drop = std::nearbyint(p * 65536);
  const T scale = drop < 65536 ? static_cast<T>(65536 / (65536 - drop)) : T(0);
  for (int64_t i = 0; i < count; ++i) {
    const T expected = input[i] * (bits[i] >= drop ? scale : T(0));
    CHECK(same_bits(&output[i], &expected, 1) || (std::isnan(output[i]) && std::isnan(expected)), i, output[i],
          expected);
  }
}

template <typename T>
void all_cases() {
  Random random(17);
  for (const int64_t count : {1, 2, 15, 16, 17, 100, 16384, 16385, 70000}) {
    for (const double p : {0.0, 1e-6, 0.1, 0.3, 0.5, 0.999, 1 - 1e-6, 1.0}) check_case<T>(count, p, random);
  }
}

template <typename T>
void nothing() {
  dropout(Dropout<T>{0, 0.5, nullptr, nullptr, nullptr}, serial());
  CHECK(true);
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests({
      {"against its definition, float", all_cases<float>},
      {"against its definition, double", all_cases<double>},
      {"no elements, float", nothing<float>},
      {"no elements, double", nothing<double>},
  });
}
