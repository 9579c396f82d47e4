// What the backward recurrences on tensor cores share: a warp's tiles of W_hh^T, 16 units of h by all gates of the
// block, times the block's gradients of gates.
#pragma once

#include "kernels/cuda/rnn/cluster.h"

namespace pymtl::cuda {

inline constexpr int kTileWarps = 8;  // that multiply, of a block

// w: the warp's first kResident tiles, each kSteps fragments along k; overflow: this lane's fragments of its other
// tiles, [tile][kSteps][kTileWarps][lane]; gradients: this lane's words, [kSteps][2][kColumns][lane]. multiply(acc, a,
// b0, b1) is one instruction; send(i, acc, column) takes a tile's sums.
template <int kResident, int kSteps, int kColumns, typename Multiply, typename Send>
__device__ __forceinline__ void multiply_tiles(const uint32_t (&w)[kResident][kSteps][4], const uint4* overflow,
                                               const uint32_t* gradients, int warp, int tiles, const Multiply& multiply,
                                               const Send& send) {
  const auto operand = [&](int k, int half, int column) {
    return gradients[((2 * k + half) * kColumns + column) * kWarp];
  };
  // [chain]: of sums that depend on nothing of each other four hide each other's latency.
  {
    constexpr int kChains = kResident * kColumns < 4 ? 2 : 1;
    float acc[kChains][kResident][kColumns][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const uint32_t b0 = operand(k, 0, column);
        const uint32_t b1 = operand(k, 1, column);
#pragma unroll
        for (int i = 0; i < kResident; ++i) multiply(acc[k % kChains][i][column], w[i][k], b0, b1);
      }
    }
#pragma unroll
    for (int i = 0; i < kResident; ++i) {
      if (warp + i * kTileWarps >= tiles) continue;
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        float (&sums)[4] = acc[0][i][column];
        if constexpr (kChains == 2) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[e] += acc[kChains - 1][i][column][e];
        }
        send(i, sums, column);
      }
    }
  }
  for (int i = kResident; warp + i * kTileWarps < tiles; ++i) {
    constexpr int kChains = 2;
    float acc[kChains][kColumns][4] = {};
#pragma unroll 4  // all of them would take the registers that hold the other tiles
    for (int k = 0; k < kSteps; ++k) {
      const uint4 a = overflow[((i - kResident) * kSteps + k) * kTileWarps * kWarp];
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        multiply(acc[k % kChains][column], {a.x, a.y, a.z, a.w}, operand(k, 0, column), operand(k, 1, column));
      }
    }
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      float (&sums)[4] = acc[0][column];
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] += acc[1][column][e];
      send(i, sums, column);
    }
  }
}

}  // namespace pymtl::cuda
