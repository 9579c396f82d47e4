#include "../peak.h"

#include <algorithm>
#include <chrono>

#include "kernels.h"

namespace pymtl {

template <typename T>
double peak_gflops(int runs) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 500'000;
  double best = 0;
  T sink = T(1);
  for (int run = 0; run < runs; ++run) {
    const Clock::time_point start = Clock::now();
    const int64_t operations = active_kernels().of<T>().multiply_adds(kRounds, &sink);
    const std::chrono::duration<double> seconds = Clock::now() - start;
    best = std::max(best, static_cast<double>(operations) / seconds.count() * 1e-9);
  }
  return best;
}

template double peak_gflops<float>(int);
template double peak_gflops<double>(int);

}  // namespace pymtl
