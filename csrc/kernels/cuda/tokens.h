// Where a token of a batch stands, and how the warps of a launch share out rows.
#pragma once

#include "kernels/cuda/device.h"

namespace pymtl::cuda {

inline constexpr int kRowThreads = 256;  // of a block of a kernel that works on rows

// The layout of a batch on the device; without batch_sizes and ends every step has all sequences.
struct Tokens {
  int64_t steps;               // T
  int64_t batch;               // B
  int64_t count;               // N
  const int64_t* batch_sizes;  // [T] or null
  const int64_t* ends;         // [T] sums of batch_sizes up to and with each step, or null

  __device__ int64_t size(int64_t step) const { return batch_sizes == nullptr ? batch : batch_sizes[step]; }
  __device__ int64_t start(int64_t step) const {
    return batch_sizes == nullptr ? step * batch : ends[step] - batch_sizes[step];
  }

  // The first step for which `past` holds, which then holds for all that follow; or T.
  template <typename Past>
  __device__ int64_t first_step(const Past& past) const {
    int64_t low = 0;
    int64_t high = steps;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (past(middle)) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  // A token's step; T behind the last one.
  __device__ int64_t step_of(int64_t token) const {
    if (batch_sizes == nullptr) return token / batch;
    return first_step([&](int64_t step) { return ends[step] > token; });
  }

  __device__ int64_t length(int64_t sequence) const {
    if (batch_sizes == nullptr) return steps;
    return first_step([&](int64_t step) { return batch_sizes[step] <= sequence; });
  }
};

// The rows that a warp of a launch works on are first_row(), and every row_stride()-th after it.
__device__ __forceinline__ int64_t first_row() { return (block_index() * block_threads() + thread_index()) / kWarp; }
__device__ __forceinline__ int64_t row_stride() { return block_count() * block_threads() / kWarp; }
__device__ __forceinline__ int lane_index() { return thread_index() % kWarp; }

// Each warp takes one row, or several where there are very many rows.
inline Grid grid_of_rows(int64_t rows) {
  constexpr int64_t kMostBlocks = 8192;
  const int64_t blocks = (rows * kWarp + kRowThreads - 1) / kRowThreads;
  return {blocks < kMostBlocks ? blocks : kMostBlocks, kRowThreads, 0, 0};
}

}  // namespace pymtl::cuda
