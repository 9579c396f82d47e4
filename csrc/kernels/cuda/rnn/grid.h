// What the kernels of the recurrence across the grid share: for hidden sizes that no cluster holds, and for devices
// without clusters. A group of blocks, 16 units each, works on a recurrence and a slice of the batch; its blocks meet
// in global memory at every step, so all blocks of a launch have to run at the same time.
#pragma once

#include "kernels/cuda/rnn/cluster.h"

namespace pymtl::cuda {

inline constexpr int kGroupUnits = 16;    // of a block
inline constexpr int kGroupWarps = 8;     // of a block
inline constexpr int kGroupBlocks = 64;   // of the largest group: what the registers' weights reach
inline constexpr int kGroupCounter = 32;  // words between two groups' counters, a cache line

struct GroupPlan {
  int blocks;  // of a group
  int rows;    // of the batch that a group works on
  int groups;  // of a launch

  // What the blocks of a group read of each other: words of four bytes, two buffers in turn.
  __host__ __device__ int64_t forward_words() const {  // [rows / 8][units / 32][lane][4] pairs of h
    return static_cast<int64_t>(rows / 8) * ((blocks + 1) / 2) * kWarp * 4;
  }
  __host__ __device__ int64_t backward_words() const {  // [rows / 8][blocks][lane][8] pairs of gradients of gates
    return static_cast<int64_t>(rows / 8) * blocks * kWarp * 8;
  }
};

// Of the unit tiles of a block (8 units each) and the columns of 8 rows, those that a warp computes the cells of.
template <int kColumns>
inline constexpr int kItems = (2 * kColumns + kGroupWarps - 1) / kGroupWarps;

template <typename Args, typename T>
struct GroupLaunch {
  Args args;
  RnnWeights<T> weights[kRecurrences];  // of recurrences first, first + 1, ...
  int64_t first;
  int64_t count;
  int64_t first_group;  // of all slices by all these recurrences; slices with the longest sequences come first
  GroupPlan plan;
  uint32_t* arrived;  // [groups, kGroupCounter] how many blocks have published a step, all steps together
  uint32_t* words;    // [groups][2][forward_words or backward_words]
};

template <typename Args, typename T>
struct GroupPlace {
  int64_t g;
  const RnnWeights<T>* weights;
  int first_row;
  int rank;  // of the block within the group
  uint32_t* arrived;
  uint32_t* words;

  __device__ GroupPlace(const GroupLaunch<Args, T>& launch, int64_t words_of_buffer) {
    const int64_t own = block_index() / launch.plan.blocks;
    const int64_t group = launch.first_group + own;
    rank = static_cast<int>(block_index() % launch.plan.blocks);
    g = launch.first + group % launch.count;
    weights = &launch.weights[group % launch.count];
    first_row = static_cast<int>(group / launch.count) * launch.plan.rows;
    arrived = launch.arrived + own * kGroupCounter;
    words = launch.words + own * 2 * words_of_buffer;
  }
};

// All threads of a block call this: it publishes what they wrote to the blocks that wait_for_group().
__device__ __forceinline__ void publish(uint32_t* arrived) {
  sync_threads();
  if (thread_index() == 0) count_arrival(arrived);
}

__device__ __forceinline__ void wait_for_group(const uint32_t* arrived, uint32_t count) {
  if (thread_index() == 0) wait_for_arrivals(arrived, count);
  sync_threads();
}

// Bytes that the launches of a plan need.
inline size_t group_workspace(const GroupPlan& plan, int64_t words_of_buffer) {
  // The counters on cache lines of their own.
  return (static_cast<size_t>(plan.groups) * (kGroupCounter + 2 * static_cast<size_t>(words_of_buffer))) * 4;
}

}  // namespace pymtl::cuda
