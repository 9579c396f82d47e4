// How the recurrence is shared out among blocks.
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels/cuda/rnn.h"
#include "kernels/cuda/rnn/plans.h"

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

// What ask() returns, asked once for each device and kernel: the driver takes microseconds to answer. A process asks
// few different questions, so all answers are kept.
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

// The clusters that hold a hidden size in products of 16-bit numbers, with so many rows of the batch.
//
// A block's registers hold 64 units' rows of W_hh for H up to 256, its shared memory as much again. Blocks of 32 units,
// where two warps share a sum, hold all of theirs in registers, but a device runs fewer clusters of so many blocks at
// the same time. Above 512 less than 64 units fit, and 48 have to do.
std::vector<Plan> clusters_of_16_bits(int64_t hidden_size, int rows) {
  std::vector<Plan> plans;
  const int wide = rounded_up(hidden_size, 64);
  if (wide <= 8) plans.push_back({wide, 8, 8, rows});
  if (hidden_size > 256 && hidden_size <= 512) plans.push_back({hidden_size <= 384 ? 12 : 16, 4, 8, rows});
  const int narrow = rounded_up(hidden_size, 48);
  if (wide > 8 && narrow <= kClusterBlocks && rows == 8) plans.push_back({narrow, 6, 8, rows});
  return plans;
}

// In float a block's registers hold 32 units' rows of W_hh for H up to 256, its shared memory as much again.
std::vector<Plan> clusters_of_float(int64_t hidden_size, int rows, bool tf32) {
  const int blocks = rounded_up(hidden_size, 32);
  if (blocks > kClusterBlocks) return {};
  return {{blocks, 8, 4, rows, tf32}};
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
  if (plan.warps == 4) return plan.rows == 8 ? 0.65 : 0.9;
  // Above 256 units the weights in shared memory are read at every step, 128 bytes a cycle.
  const int overflow = plan.units() > 256 ? plan.units() - 256 : 0;
  return (plan.rows == 8 ? 0.6 : 0.8) + 2.0 * 4 * plan.units_of_block() * overflow / (128 * 1750.0);
}
double step_time(Pass pass, const GroupPlan& plan) {
  return 1.5 + plan.rows * plan.blocks * (pass == Pass::forward ? 0.0007 : 0.0027);
}

// A way to share out a call: a cluster or a group for each recurrence and slice of the batch.
struct Choice {
  Plan cluster{};
  GroupPlan group{};
  int at_once = 0;     // how many clusters or groups run at the same time
  double step = 0.0;   // microseconds, estimated
  double waves = 0.0;  // that run one after the other

  bool found() const { return at_once > 0; }
  double time() const { return waves * step; }  // of each step

  std::string name() const {
    if (group.blocks > 0) {
      return "group of " + std::to_string(group.blocks) + "x" + std::to_string(kGroupUnits) + ", rows " +
             std::to_string(group.rows);
    }
    return "cluster of " + std::to_string(cluster.blocks) + "x" + std::to_string(cluster.units_of_block()) + ", rows " +
           std::to_string(cluster.rows) + (cluster.tf32 ? ", tf32" : "");
  }
};

// Calls consider(choice) with every way there is.
template <typename T, typename Consider>
void for_each_choice(Pass pass, const RnnShape& shape, const Consider& consider) {
  constexpr bool kWide = std::is_same_v<T, float>;
  const auto waves = [&](int rows, int at_once) {
    const int64_t all = shape.recurrences * rounded_up(shape.batch, rows);
    return static_cast<double>((all + at_once - 1) / at_once);
  };
  const auto consider_cluster = [&](const Plan& wanted) {
    const Plan plan = runnable<T>(pass, wanted);
    if (plan.blocks == 0) return;
    const int at_once = clusters_at_once<T>(pass, plan);
    consider(Choice{plan, {}, at_once, step_time<T>(plan), waves(plan.rows, at_once)});
  };
  if constexpr (kWide) {
    for (const bool tf32 : {false, true}) {
      if (tf32 && !shape.tf32) continue;
      for (const int rows : {1, 2, 4, 8, 16, 32}) {
        if (tf32 ? rows < 8 : rows > 8) continue;
        for (const Plan& plan : clusters_of_float(shape.hidden_size, rows, tf32)) consider_cluster(plan);
      }
    }
  } else {
    for (const int rows : {8, 16}) {
      for (const Plan& plan : clusters_of_16_bits(shape.hidden_size, rows)) consider_cluster(plan);
    }
    const int blocks = rounded_up(shape.hidden_size, kGroupUnits);
    for (const int rows : {8, 16, 32, 64}) {
      if (blocks > kGroupBlocks) break;
      const int at_once = blocks_at_once<T>(pass, rows) / blocks;
      if (at_once == 0) continue;
      const int64_t all = shape.recurrences * rounded_up(shape.batch, rows);
      const GroupPlan plan{blocks, rows, static_cast<int>(all < at_once ? all : at_once)};
      consider(Choice{{}, plan, at_once, step_time(pass, plan), waves(rows, at_once)});
    }
  }
}

// The name of the one way that calls may take, for measurements; empty: any.
struct Forced {
  std::mutex mutex;
  std::atomic<bool> any{false};
  std::string name;

  std::string get() {
    if (!any.load(std::memory_order_acquire)) return {};
    const std::lock_guard lock(mutex);
    return name;
  }
  void set(const std::string& given) {
    const std::lock_guard lock(mutex);
    name = given;
    any.store(!given.empty(), std::memory_order_release);
  }
};

Forced& forced() {
  static Forced instance;
  return instance;
}

// The choice with the least estimated time, among those called `name` unless that is empty. Of equals, the first: so a
// slice has few rows of the batch, unless the slices then run in several waves and more rows are faster.
template <typename T>
Choice choose(Pass pass, const RnnShape& shape, const std::string& name) {
  Choice best;
  for_each_choice<T>(pass, shape, [&](const Choice& choice) {
    if (!name.empty() && choice.name() != name) return;
    if (!best.found() || choice.time() < best.time()) best = choice;
  });
  return best;
}

template <typename T>
Choice chosen(Pass pass, const RnnShape& shape) {
  const std::string name = forced().get();
  const Choice choice = choose<T>(pass, shape, name);
  if (!choice.found()) {
    throw std::runtime_error("hidden_size: this device has no kernel for " + std::to_string(shape.hidden_size) +
                             (name.empty() ? "" : " that is a " + name));
  }
  return choice;
}

}  // namespace

template <typename T>
int64_t rnn_hidden_size_limit() {
  return answer(Pass::forward, 0, 0, 0, kType<T>, [] {
    RnnShape shape{1, 1, 1, 1, 0, nullptr};
    int limit = 0;
    for (shape.hidden_size = 16; shape.hidden_size <= kGroupBlocks * kGroupUnits; shape.hidden_size += 16) {
      if (!choose<T>(Pass::forward, shape, "").found() || !choose<T>(Pass::backward, shape, "").found()) break;
      limit = static_cast<int>(shape.hidden_size);
    }
    return limit;
  });
}

template <typename T>
std::vector<RnnChoice> rnn_choices(const RnnShape& shape, bool backward) {
  const Pass pass = backward ? Pass::backward : Pass::forward;
  const std::string best = choose<T>(pass, shape, forced().get()).name();
  std::vector<RnnChoice> choices;
  for_each_choice<T>(pass, shape, [&](const Choice& choice) {
    choices.push_back(
        {choice.name(), choice.at_once, static_cast<int64_t>(choice.waves), choice.step, choice.name() == best});
  });
  return choices;
}

void rnn_force_choice(const std::string& name) { forced().set(name); }

template <typename T>
size_t rnn_forward_workspace(const RnnShape& shape) {
  const GroupPlan group = chosen<T>(Pass::forward, shape).group;
  return group.blocks > 0 ? group_workspace(group, group.forward_words()) : 0;
}

template <typename T>
size_t rnn_backward_workspace(const RnnShape& shape) {
  const GroupPlan group = chosen<T>(Pass::backward, shape).group;
  return group.blocks > 0 ? group_workspace(group, group.backward_words()) : 0;
}

template <typename T>
void rnn_forward(const RnnForward<T>& args, [[maybe_unused]] void* workspace, void* stream) {
  const Choice choice = chosen<T>(Pass::forward, args.shape);
  if constexpr (std::is_same_v<T, float>) {
    if (choice.cluster.tf32) return run_forward_tf32(args, choice.cluster, static_cast<Stream>(stream));
  }
  if (choice.cluster.blocks > 0) return run_forward(args, choice.cluster, static_cast<Stream>(stream));
  if constexpr (!std::is_same_v<T, float>) run_forward(args, choice.group, workspace, static_cast<Stream>(stream));
}

template <typename T>
void rnn_backward(const RnnBackward<T>& args, [[maybe_unused]] void* workspace, void* stream) {
  const Choice choice = chosen<T>(Pass::backward, args.shape);
  if constexpr (std::is_same_v<T, float>) {
    if (choice.cluster.tf32) return run_backward_tf32(args, choice.cluster, static_cast<Stream>(stream));
  }
  if (choice.cluster.blocks > 0) return run_backward(args, choice.cluster, static_cast<Stream>(stream));
  if constexpr (!std::is_same_v<T, float>) run_backward(args, choice.group, workspace, static_cast<Stream>(stream));
}

#define PYMTL_INSTANTIATE(T)                                             \
  template int64_t rnn_hidden_size_limit<T>();                           \
  template std::vector<RnnChoice> rnn_choices<T>(const RnnShape&, bool); \
  template size_t rnn_forward_workspace<T>(const RnnShape&);             \
  template size_t rnn_backward_workspace<T>(const RnnShape&);            \
  template void rnn_forward(const RnnForward<T>&, void*, void*);         \
  template void rnn_backward(const RnnBackward<T>&, void*, void*);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(BFloat16)
PYMTL_INSTANTIATE(Float16)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl::cuda
