// How the recurrence is shared out among blocks.
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>

#include "kernels/cuda/rnn.h"
#include "kernels/cuda/rnn_plans.h"

namespace pymtl::cuda {
namespace {

constexpr int kClusterBlocks = 16;  // of the largest cluster

enum class Pass { forward, backward };

int rounded_up(int64_t size, int64_t step) { return static_cast<int>((size + step - 1) / step); }

int rounded_to_power(int number) {
  int power = 1;
  while (power < number) power *= 2;
  return power;
}

// Asking the driver takes microseconds, so each answer to a question `ask` is kept. A process has few of them.
template <typename Ask>
int answer(Pass pass, int blocks, int warps, int rows, int type, const Ask& ask) {
  using Key = std::tuple<int, Pass, int, int, int, int>;
  static std::mutex mutex;
  static std::map<Key, int> known;
  const std::lock_guard lock(mutex);
  const Key key{current_device(), pass, blocks, warps, rows, type};
  const auto found = known.find(key);
  return found != known.end() ? found->second : known[key] = ask();
}

template <typename T>
constexpr int kType = std::is_same_v<T, float>      ? 0
                      : std::is_same_v<T, BFloat16> ? 1
                                                    : 2;
constexpr int kTypeTf32 = 3;

template <typename T>
int clusters_at_once(Pass pass, const Plan& plan) {
  if (plan.tf32) {
    return answer(pass, plan.blocks, plan.warps, plan.rows, kTypeTf32, [&] {
      return pass == Pass::forward ? forward_clusters_at_once_tf32(plan) : backward_clusters_at_once_tf32(plan);
    });
  }
  return answer(pass, plan.blocks, plan.warps, plan.rows, kType<T>, [&] {
    return pass == Pass::forward ? forward_clusters_at_once<T>(plan) : backward_clusters_at_once<T>(plan);
  });
}

template <typename T>
int blocks_at_once(Pass pass, int rows) {
  return answer(pass, 0, 0, rows, kType<T>, [&] {
    return pass == Pass::forward ? forward_blocks_at_once<T>(rows) : backward_blocks_at_once<T>(rows);
  });
}

// The cluster for a hidden size, with so many rows of the batch; 0 blocks if no cluster is large enough.
template <typename T>
Plan cluster_for(int64_t hidden_size, int rows, bool tf32) {
  if constexpr (std::is_same_v<T, float>) {
    // A block's registers hold 32 units' rows of W_hh for H up to 256, its shared memory as much again.
    const int blocks = rounded_up(hidden_size, 32);
    return {blocks <= kClusterBlocks ? blocks : 0, 8, 4, rows, tf32};
  }
  // Of 16-bit weights a block's registers hold 64 units' rows for H up to 256, its shared memory as much again. Above
  // 512 less fits, and 48 units have to do.
  const Plan wide{rounded_up(hidden_size, 64), 8, 8, rows};
  if (wide.blocks <= 8) return wide;
  const Plan narrow{rounded_up(hidden_size, 48), 6, 8, rows};
  return {narrow.blocks <= kClusterBlocks && rows == 8 ? narrow.blocks : 0, narrow.warps, narrow.units_of_warp, rows};
}

// The plan, or one with more blocks if the device has no cluster of just as many; units too many do nothing.
template <typename T>
Plan runnable(Pass pass, Plan plan) {
  for (int blocks = plan.blocks; blocks > 0 && blocks <= kClusterBlocks; blocks = rounded_to_power(blocks + 1)) {
    plan.blocks = blocks;
    if (clusters_at_once<T>(pass, plan) > 0) return plan;
  }
  plan.blocks = 0;
  return plan;
}

// About how long a step takes, in microseconds: meeting the other blocks, and multiplying. Only ratios matter.
template <typename T>
double step_time(const Plan& plan) {
  if (plan.tf32) {  // every warp reads all of h from shared memory, and weights that registers do not hold
    const int overflow = plan.units() > 256 ? plan.units() - 256 : 0;
    return 0.6 + (32.0 * plan.rows * plan.units() + 512.0 * overflow) / 2.2e5;
  }
  if constexpr (std::is_same_v<T, float>) return 0.5 + plan.rows * plan.units() / 1700.0;
  return plan.rows == 8 ? 0.6 : 0.8;
}
double step_time(Pass pass, const TeamPlan& plan) {
  return 1.5 + plan.rows * plan.blocks * (pass == Pass::forward ? 0.0007 : 0.0027);
}

// What takes the least time, if there is anything: clusters or teams, with as few rows of the batch each as there are,
// unless they then have to queue and are done earlier with more rows.
struct Choice {
  Plan cluster{};
  TeamPlan team{};
  double time = 0.0;

  bool found() const { return cluster.blocks > 0 || team.blocks > 0; }

  void consider(const Plan& plan, double of_plan) {
    if (!found() || of_plan < time) *this = {plan, {}, of_plan};
  }
  void consider(const TeamPlan& plan, double of_plan) {
    if (!found() || of_plan < time) *this = {{}, plan, of_plan};
  }
};

template <typename T>
Choice choose(Pass pass, const RnnShape& shape) {
  constexpr bool kWide = std::is_same_v<T, float>;
  Choice best;
  const auto waves = [](int64_t all, int64_t at_once) { return static_cast<double>((all + at_once - 1) / at_once); };
  const auto consider_clusters = [&](int rows, bool tf32) {
    const Plan plan = runnable<T>(pass, cluster_for<T>(shape.hidden_size, rows, tf32));
    if (plan.blocks == 0) return;
    const int at_once = clusters_at_once<T>(pass, plan);
    const int64_t all = shape.recurrences * rounded_up(shape.batch, rows);
    best.consider(plan, waves(all, at_once) * step_time<T>(plan));
  };
  for (const int rows : {1, 2, 4, 8, 16}) {
    if (kWide ? rows <= 8 : rows >= 8) consider_clusters(rows, false);
  }
  if (kWide && shape.tf32) {
    for (const int rows : {8, 16, 32}) consider_clusters(rows, true);
  }
  if constexpr (!kWide) {
    const int blocks = rounded_up(shape.hidden_size, kTeamUnits);
    for (const int rows : {8, 16, 32, 64}) {
      if (best.cluster.blocks > 0 || blocks > kTeamBlocks) break;  // a cluster, where there is one, meets sooner
      const int at_once = blocks_at_once<T>(pass, rows) / blocks;
      if (at_once == 0) continue;
      const int64_t all = shape.recurrences * rounded_up(shape.batch, rows);
      const TeamPlan plan{blocks, rows, static_cast<int>(all < at_once ? all : at_once)};
      best.consider(plan, waves(all, at_once) * step_time(pass, plan));
    }
  }
  return best;
}

template <typename T>
Choice chosen(Pass pass, const RnnShape& shape) {
  const Choice choice = choose<T>(pass, shape);
  if (!choice.found()) {
    throw std::runtime_error("hidden_size: this device has no kernel for " + std::to_string(shape.hidden_size));
  }
  return choice;
}

}  // namespace

template <typename T>
int64_t rnn_hidden_size_limit() {
  return answer(Pass::forward, 0, 0, 0, kType<T>, [] {
    RnnShape shape{1, 1, 1, 1, 0, nullptr};
    int limit = 0;
    for (shape.hidden_size = 16; shape.hidden_size <= kTeamBlocks * kTeamUnits; shape.hidden_size += 16) {
      if (!choose<T>(Pass::forward, shape).found() || !choose<T>(Pass::backward, shape).found()) break;
      limit = static_cast<int>(shape.hidden_size);
    }
    return limit;
  });
}

template <typename T>
size_t rnn_forward_workspace(const RnnShape& shape) {
  const TeamPlan team = chosen<T>(Pass::forward, shape).team;
  return team.blocks > 0 ? team_workspace(team, team.forward_words()) : 0;
}

template <typename T>
size_t rnn_backward_workspace(const RnnShape& shape) {
  const TeamPlan team = chosen<T>(Pass::backward, shape).team;
  return team.blocks > 0 ? team_workspace(team, team.backward_words()) : 0;
}

template <typename T>
void rnn_forward(const RnnForward<T>& args, [[maybe_unused]] void* workspace, void* stream) {
  const Choice choice = chosen<T>(Pass::forward, args.shape);
  if constexpr (std::is_same_v<T, float>) {
    if (choice.cluster.tf32) return run_forward_tf32(args, choice.cluster, static_cast<Stream>(stream));
  }
  if (choice.cluster.blocks > 0) return run_forward(args, choice.cluster, static_cast<Stream>(stream));
  if constexpr (!std::is_same_v<T, float>) run_forward(args, choice.team, workspace, static_cast<Stream>(stream));
}

template <typename T>
void rnn_backward(const RnnBackward<T>& args, [[maybe_unused]] void* workspace, void* stream) {
  const Choice choice = chosen<T>(Pass::backward, args.shape);
  if constexpr (std::is_same_v<T, float>) {
    if (choice.cluster.tf32) return run_backward_tf32(args, choice.cluster, static_cast<Stream>(stream));
  }
  if (choice.cluster.blocks > 0) return run_backward(args, choice.cluster, static_cast<Stream>(stream));
  if constexpr (!std::is_same_v<T, float>) run_backward(args, choice.team, workspace, static_cast<Stream>(stream));
}

#define PYMTL_INSTANTIATE(T)                                     \
  template int64_t rnn_hidden_size_limit<T>();                   \
  template size_t rnn_forward_workspace<T>(const RnnShape&);     \
  template size_t rnn_backward_workspace<T>(const RnnShape&);    \
  template void rnn_forward(const RnnForward<T>&, void*, void*); \
  template void rnn_backward(const RnnBackward<T>&, void*, void*);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(BFloat16)
PYMTL_INSTANTIATE(Float16)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl::cuda
