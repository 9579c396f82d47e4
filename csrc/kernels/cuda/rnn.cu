// How the recurrence is shared out among clusters.
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>

#include "kernels/cuda/rnn.h"
#include "kernels/cuda/rnn_plans.h"

namespace pymtl::cuda {
namespace {

constexpr int kBlocks = 16;  // of the largest cluster

int rounded_up(int64_t size, int64_t step) { return static_cast<int>((size + step - 1) / step); }

// The cluster for a hidden size, with so many rows of the batch; 0 blocks if no cluster is large enough.
template <typename T>
Plan plan_for(int64_t hidden_size, int rows) {
  if constexpr (std::is_same_v<T, float>) {
    // A block's registers hold 32 units' rows of W_hh for H up to 256, its shared memory as much again.
    const int blocks = rounded_up(hidden_size, 32);
    return {blocks <= kBlocks ? blocks : 0, 8, 4, rows};
  }
  // 16-bit weights: a block's registers hold 64 units' rows of W_hh for H up to 256, its shared memory as much again.
  // Above 512 less fits, and 48 units have to do.
  const Plan wide{rounded_up(hidden_size, 64), 8, 8, rows};
  if (wide.blocks <= 8) return wide;
  const Plan narrow{rounded_up(hidden_size, 48), 6, 8, rows};
  return {narrow.blocks <= kBlocks ? narrow.blocks : 0, narrow.warps, narrow.units_of_warp, narrow.rows};
}

enum class Pass { forward, backward };

// Asking the driver takes microseconds, so each answer is kept. A process has few of them.
template <typename T>
int clusters_at_once(Pass pass, const Plan& plan) {
  using Key = std::tuple<int, Pass, int, int, int>;
  static std::mutex mutex;
  static std::map<Key, int> known;
  const std::lock_guard lock(mutex);
  const Key key{current_device(), pass, plan.blocks, plan.warps, plan.rows};
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const int count = pass == Pass::forward ? forward_clusters_at_once<T>(plan) : backward_clusters_at_once<T>(plan);
  return known[key] = count;
}

// About how long a step takes, in microseconds: meeting the other blocks, and multiplying. Only ratios matter.
template <typename T>
double step_time(const Plan& plan) {
  if constexpr (std::is_same_v<T, float>) return 0.5 + plan.rows * plan.units() / 1700.0;
  return plan.rows == 8 ? 0.6 : 0.8;
}

// Rows of the batch for a cluster: as few as there are, unless the clusters then have to queue and are done earlier
// with more rows each.
template <typename T>
Plan choose(Pass pass, const RnnShape& shape) {
  const bool wide = std::is_same_v<T, float>;
  Plan best{};
  double least = 0.0;
  for (const int rows : {1, 2, 4, 8, 16}) {
    if (wide ? rows > 8 : rows < 8) continue;
    const Plan plan = plan_for<T>(shape.hidden_size, rows);
    if (plan.blocks == 0 || (rows == 16 && plan.warps == 6)) continue;
    const int at_once = clusters_at_once<T>(pass, plan);
    if (at_once == 0) continue;
    const int64_t clusters = shape.recurrences * rounded_up(shape.batch, rows);
    const double time = static_cast<double>((clusters + at_once - 1) / at_once) * step_time<T>(plan);
    if (best.blocks == 0 || time < least) {
      best = plan;
      least = time;
    }
  }
  if (best.blocks == 0) {
    throw std::runtime_error("hidden_size: this device has no cluster for " + std::to_string(shape.hidden_size));
  }
  return best;
}

}  // namespace

template <typename T>
int64_t rnn_hidden_size_limit() {
  int64_t limit = 0;
  for (int64_t size = 64; plan_for<T>(size, 8).blocks > 0; size += 16) {
    const Plan plan = plan_for<T>(size, 8);
    if (clusters_at_once<T>(Pass::forward, plan) == 0 || clusters_at_once<T>(Pass::backward, plan) == 0) break;
    limit = size;
  }
  return limit;
}

template <typename T>
void rnn_forward(const RnnForward<T>& args, void* stream) {
  run_forward(args, choose<T>(Pass::forward, args.shape), static_cast<Stream>(stream));
}

template <typename T>
void rnn_backward(const RnnBackward<T>& args, void* stream) {
  run_backward(args, choose<T>(Pass::backward, args.shape), static_cast<Stream>(stream));
}

#define PYMTL_INSTANTIATE(T)                              \
  template int64_t rnn_hidden_size_limit<T>();            \
  template void rnn_forward(const RnnForward<T>&, void*); \
  template void rnn_backward(const RnnBackward<T>&, void*);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(BFloat16)
PYMTL_INSTANTIATE(Float16)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl::cuda
