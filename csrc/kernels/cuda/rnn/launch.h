// The host's side of the recurrence's kernels: which instance of a kernel a plan takes, and its launches.
#pragma once

#include "kernels/cuda/rnn/cluster.h"
#include "kernels/cuda/rnn/grid.h"

namespace pymtl::cuda {

// What make returns for the first of these numbers that is at least `wanted`, or for the last: kernels are compiled for
// some sizes each.
template <int kFirst, int... kRest, typename Make>
auto with_least(int wanted, const Make& make) {
  if constexpr (sizeof...(kRest) > 0) {
    if (wanted > kFirst) return with_least<kRest...>(wanted, make);
  }
  return make.template operator()<kFirst>();
}

// Gives a launch the recurrences from `first` on, as many as it takes.
template <typename Launch, typename Args>
void take_recurrences(Launch& launch, const Args& args, int64_t first) {
  const int64_t left = args.shape.recurrences - first;
  launch.args = args;
  launch.args.weights = nullptr;
  launch.first = first;
  launch.count = left < kRecurrences ? left : kRecurrences;
  for (int64_t i = 0; i < launch.count; ++i) launch.weights[i] = args.weights[first + i];
}

inline int64_t slices_of(const RnnShape& shape, int rows) { return (shape.batch + rows - 1) / rows; }

// A kernel on clusters, and what a block of it needs.
template <typename Params>
struct ClusterKernel {
  void (*run)(Params);
  int threads;
  int shared_bytes;

  Grid grid(const Plan& plan, int64_t blocks) const {
    return {blocks, threads, plan.blocks, static_cast<size_t>(shared_bytes)};
  }
};

template <typename Params>
int clusters_at_once(const ClusterKernel<Params>& kernel, const Plan& plan) {
  return clusters_at_once(kernel.run, kernel.grid(plan, plan.blocks));
}

template <typename Args, typename T>
void run_on_clusters(const ClusterKernel<Launch<Args, T>>& kernel, const Args& args, const Plan& plan, Stream stream) {
  for (int64_t first = 0; first < args.shape.recurrences; first += kRecurrences) {
    Launch<Args, T> params{};
    take_recurrences(params, args, first);
    params.plan = plan;
    const int64_t blocks = slices_of(args.shape, plan.rows) * params.count * plan.blocks;
    launch(kernel.run, kernel.grid(plan, blocks), stream, params);
  }
}

// A kernel across the grid.
template <typename Params>
struct GroupKernel {
  void (*run)(Params);
  size_t shared_bytes;  // of a block

  Grid grid(int64_t blocks) const { return {blocks, kGroupWarps * kWarp, 0, shared_bytes}; }
};

template <typename Params>
int blocks_at_once(const GroupKernel<Params>& kernel) {
  return blocks_at_once(kernel.run, kernel.grid(1));
}

// words_of_buffer: what a group's blocks read of each other, see GroupPlan.
template <typename Args, typename T>
void run_in_groups(const GroupKernel<GroupLaunch<Args, T>>& kernel, const Args& args, const GroupPlan& plan,
                   int64_t words_of_buffer, void* workspace, Stream stream) {
  for (int64_t first = 0; first < args.shape.recurrences; first += kRecurrences) {
    GroupLaunch<Args, T> params{};
    take_recurrences(params, args, first);
    params.arrived = static_cast<uint32_t*>(workspace);
    params.words = params.arrived + plan.groups * kGroupCounter;
    const int64_t groups = slices_of(args.shape, plan.rows) * params.count;
    for (params.first_group = 0; params.first_group < groups; params.first_group += plan.groups) {
      const int64_t left = groups - params.first_group;
      params.plan = plan;
      params.plan.groups = left < plan.groups ? static_cast<int>(left) : plan.groups;
      // Counters start at zero, and units that are not there are zeros too.
      clear(workspace, group_workspace(plan, words_of_buffer), stream);
      launch_together(kernel.run, kernel.grid(params.plan.groups * plan.blocks), stream, params);
    }
  }
}

}  // namespace pymtl::cuda
