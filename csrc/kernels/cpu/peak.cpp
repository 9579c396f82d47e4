#include "../peak.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace pymtl {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

template <typename T>
double peak_gflops(int runs) {
  constexpr int64_t kRounds = 500'000;
  double best = 0;
  Accum<T> sink = 1;
  for (int run = 0; run < runs; ++run) {
    const Clock::time_point start = Clock::now();
    const int64_t operations = active_layers<T>().multiply_adds(kRounds, &sink);
    best = std::max(best, static_cast<double>(operations) / seconds_since(start) * 1e-9);
  }
  return best;
}

template double peak_gflops<float>(int);
template double peak_gflops<double>(int);
template double peak_gflops<BFloat16>(int);

double read_gigabytes(int64_t bytes, int runs) {
  if (bytes <= 0) throw std::invalid_argument("bytes: expected a number above 0, got " + std::to_string(bytes));
  constexpr int64_t kAtOnce = 128;  // floats: eight of the widest vectors
  constexpr int64_t kBytesOfARun = 32 << 20;
  const int64_t count = std::max<int64_t>(1, bytes / (kAtOnce * 4)) * kAtOnce;
  const int64_t rounds = std::max<int64_t>(1, kBytesOfARun / (count * 4));
  const std::vector<float> memory(static_cast<size_t>(count), 1.0f);
  double best = 0;
  float sink = 0;
  for (int run = 0; run < runs; ++run) {
    const Clock::time_point start = Clock::now();
    for (int64_t round = 0; round < rounds; ++round) active_kernels().f32.read_all(memory.data(), count, &sink);
    best = std::max(best, static_cast<double>(rounds * count * 4) / seconds_since(start) * 1e-9);
  }
  return best;
}

}  // namespace pymtl
