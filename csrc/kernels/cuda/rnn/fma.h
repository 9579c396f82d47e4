// What the recurrence in float shares forward and backward: products by fused multiply-adds.
//
// A warp multiplies a matrix by the rows of the batch in 8 slices along k: lane 8 m + s has slice s, k = s, s + 8, ...,
// of four rows of the matrix, and their products with all kRows rows of the batch. Then the slices are added up, and
// share the rows of the batch among them: lane 8 m + s ends up with row s / (8 / kRows).
#pragma once

#include "kernels/cuda/rnn/cluster.h"

namespace pymtl::cuda {

inline constexpr int kSlices = 8;

// An operand [k, kRows] in shared memory, four rows of the batch side by side.
template <int kRows>
__device__ __forceinline__ int operand_index(int k, int row, int k_size) {
  if constexpr (kRows <= 4) return k * kRows + row;
  return (row / 4 * k_size + k) * 4 + row % 4;
}

template <int kRows>
__device__ __forceinline__ void load_operand(float (&rows)[kRows], const float* operand, int k, int k_size) {
  if constexpr (kRows == 1) {
    rows[0] = operand[k];
  } else if constexpr (kRows == 2) {
    const float2 both = reinterpret_cast<const float2*>(operand)[k];
    rows[0] = both.x;
    rows[1] = both.y;
  } else {
#pragma unroll
    for (int four = 0; four < kRows / 4; ++four) {
      const float4 all = reinterpret_cast<const float4*>(operand)[four * k_size + k];
      rows[4 * four] = all.x;
      rows[4 * four + 1] = all.y;
      rows[4 * four + 2] = all.z;
      rows[4 * four + 3] = all.w;
    }
  }
}

template <int kRows>
__device__ __forceinline__ void multiply_add(float (&acc)[4][kRows], const float (&w)[4], const float (&rows)[kRows]) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) acc[q][row] = fmaf(w[q], rows[row], acc[q][row]);
  }
}

// Adds the slices up, halving the rows that a lane looks after as long as there are several.
template <int kRows>
__device__ __forceinline__ void add_slices(float (&sums)[4], const float (&acc)[4][kRows], int slice) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    float rows[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) rows[row] = acc[q][row];
    int count = kRows;
#pragma unroll
    for (int mask = kSlices / 2; mask > 0; mask /= 2) {
      if (count == 1) {
        rows[0] += shuffle_xor(rows[0], mask);
        continue;
      }
      count /= 2;
      const bool upper = (slice & mask) != 0;
#pragma unroll
      for (int row = 0; row < kRows / 2; ++row) {
        if (row >= count) continue;
        const float mine = upper ? rows[row + count] : rows[row];
        const float other = upper ? rows[row] : rows[row + count];
        rows[row] = mine + shuffle_xor(other, mask);
      }
    }
    sums[q] = rows[0];
  }
}

}  // namespace pymtl::cuda
