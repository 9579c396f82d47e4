// The forward recurrence in 16-bit types, on tensor cores: gates [4H, rows] = W_hh [4H, H] h [H, rows].
//
// A warp owns 8 units: 32 rows of W_hh in two tiles, rows i and f of the units in the first, g and o in the second, so
// that a thread (lane 4 r + j) ends up with all four gates of unit r for the rows 2j and 2j + 1 of the batch. The first
// kResident of the tiles along k are in registers for the whole sequence, the others in shared memory. h stands in
// shared memory as the instruction takes it: [units / 8][rows / 8][lane] pairs of units, so that what a warp sends is
// one piece of 128 bytes.
//
// With kParts = 2, two warps have the same units, and each sums over half of k, all of it in registers. They add up
// their sums through shared memory, both compute the cells, and each sends h to half of the blocks and writes half of
// the results.
#include "kernels/cuda/rnn/launch.h"
#include "kernels/cuda/rnn/mma.h"
#include "kernels/cuda/rnn/plans.h"

namespace pymtl::cuda {
namespace {

// The offsets of a block's shared memory, in bytes.
struct Memory {
  int tiles;     // units / 8
  int columns;   // rows / 8
  int h_words;   // of one of the two buffers
  int weights;   // [tiles / 2 - kResident][warps][2][lane] fragments of 16 bytes
  int sums;      // [2][warps of all parts][2][rows / 8][lane] of 16 bytes, where there are several parts
  int barriers;  // two
  int bytes;

  __host__ __device__ Memory(const Plan& plan, int resident, int parts) {
    tiles = plan.units() / 8;
    columns = plan.rows / 8;
    h_words = tiles * columns * kWarp;
    weights = 2 * h_words * 4;
    const int overflow = tiles / 2 > parts * resident ? tiles / 2 - parts * resident : 0;
    sums = weights + overflow * plan.warps * 2 * kWarp * 16;
    barriers = sums + (parts > 1 ? 2 * parts * plan.warps * 2 * columns * kWarp * 16 : 0);
    bytes = barriers + 2 * static_cast<int>(sizeof(ArrivalBarrier));
  }
};

template <typename T>
using Forward = Launch<RnnForward<T>, T>;

template <typename T, int kResident, int kColumns, int kParts>
__global__ void __launch_bounds__(256, 1) forward(const __grid_constant__ Forward<T> launch) {
  const RnnForward<T>& args = launch.args;
  const RnnShape& shape = args.shape;
  const Plan& plan = launch.plan;
  const Place place(launch);
  const Memory memory(plan, kResident, kParts);
  const int64_t G = shape.recurrences;
  const int64_t B = shape.batch;
  const int64_t H = shape.hidden_size;
  const int64_t g = place.g;
  const int rank = cluster_rank();
  const int part = kParts == 1 ? 0 : thread_index() / (plan.warps * kWarp);  // of the sum over k
  const int warp = thread_index() / kWarp - part * plan.warps;
  const int lane = thread_index() % kWarp;
  const int r = lane / 4;
  const int j = lane % 4;
  const int tile = rank * plan.warps + warp;  // of this warp's units
  const int64_t unit = 8 * tile + r;
  const int first_k = part * kResident;  // of the tiles along k; with several parts there are kParts * kResident
  const int k_tiles = memory.tiles / 2;

  unsigned char* const shared = shared_memory();
  auto* const buffers = reinterpret_cast<uint32_t*>(shared);
  auto* const overflow = reinterpret_cast<uint4*>(shared + memory.weights) + warp * 2 * kWarp + lane;
  const int overflow_stride = plan.warps * 2 * kWarp;
  [[maybe_unused]] auto* const all_sums = reinterpret_cast<float4*>(shared + memory.sums) + lane;
  auto* const barriers = reinterpret_cast<ArrivalBarrier*>(shared + memory.barriers);

  // The weights, once.
  const T* const w_hh = place.weights->w_hh;
  uint32_t w[2][kResident][4];
#pragma unroll
  for (int k = 0; k < kResident; ++k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) load_weights(w[half][k], w_hh, H, 2 * half, unit, 16 * (first_k + k) + 2 * j);
  }
#pragma unroll 4  // so that many loads are under way at the same time
  for (int k = kResident; k < k_tiles && kParts == 1; ++k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[4];
      load_weights(a, w_hh, H, 2 * half, unit, 16 * k + 2 * j);
      overflow[(k - kResident) * overflow_stride + half * kWarp] = uint4{a[0], a[1], a[2], a[3]};
    }
  }
  float bias[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    bias[q] = 0.0F;
    if (part > 0) continue;  // the first one's sums begin with it
    if (unit < H && place.weights->b_ih != nullptr) bias[q] = to_float(place.weights->b_ih[q * H + unit]);
    if (unit < H && place.weights->b_hh != nullptr) bias[q] += to_float(place.weights->b_hh[q * H + unit]);
  }

  // The state before the first step: h of all units into the buffer that step 0 reads, own h and c into registers.
  for (int i = thread_index(); i < memory.h_words; i += block_threads()) {
    const int64_t row = place.first_row + i / kWarp % kColumns * 8 + i % kWarp / 4;
    const int64_t column = i / kWarp / kColumns * 8 + i % 4 * 2;
    const int64_t left = row < B && args.h0 != nullptr ? H - column : 0;
    const T* const at = args.h0 + (g * B + row) * H + column;
    buffers[memory.h_words + i] = load_pair(at, left < 0 ? 0 : static_cast<int>(left < 2 ? left : 2), H % 2 == 0);
  }
  float h[kColumns][2];
  float c[kColumns][2];
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = place.first_row + column * 8 + 2 * j + i;
      const bool there = row < B && unit < H;
      const int64_t at = (g * B + row) * H + unit;
      h[column][i] = there && args.h0 != nullptr ? to_float(args.h0[at]) : 0.0F;
      c[column][i] = there && args.c0 != nullptr ? to_float(args.c0[at]) : 0.0F;
    }
  }

  TimeLoop loop(shape, place.first_row, place.weights->reverse);
  const int steps = loop.steps();
  const auto bytes = static_cast<uint32_t>(memory.h_words * 4);
  if (thread_index() == 0) Arrivals::start(barriers, steps - 1, bytes);
  sync_cluster();

  // What the input gives to this thread's gates at a step; of several parts to the first one's.
  const float* const projected = args.projected + g * 4 * H + unit;
  const int64_t projected_stride = G * 4 * H;
  const auto load_projected = [&](float (&gates)[4][kColumns][2]) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = place.first_row + column * 8 + 2 * j + i;
        const bool there = row < loop.sequences() && unit < H && part == 0;
        const float* const at = projected + (loop.token() + row) * projected_stride;
#pragma unroll
        for (int q = 0; q < 4; ++q) gates[q][column][i] = there ? at[q * H] : 0.0F;
      }
    }
  };
  float next[4][kColumns][2];
  if (steps > 0) load_projected(next);

  for (int s = 0; s < steps; ++s) {
    const int sequences = loop.sequences();
    const int64_t token = loop.token();
    // [chain][tile]: with one column two chains hide each other's latency.
    constexpr int kChains = kColumns == 1 ? 2 : 1;
    float acc[kChains][2][kColumns][4] = {};
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int q = 0; q < 4; ++q) acc[0][q / 2][column][q % 2 * 2 + i] = next[q][column][i] + bias[q];
      }
    }
    if (s + 1 < steps) {
      loop.advance();
      load_projected(next);  // while this step computes
    }

    if (s > 0) Arrivals::wait(barriers, s - 1, steps - 1, bytes);
    const uint32_t* const h_before = buffers + (s + 1) % 2 * memory.h_words + lane + first_k * 2 * kColumns * kWarp;
    const auto multiply = [&](int k, const uint32_t (&low)[4], const uint32_t (&high)[4], int chain) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const uint32_t b0 = h_before[(2 * k * kColumns + column) * kWarp];
        const uint32_t b1 = h_before[((2 * k + 1) * kColumns + column) * kWarp];
        multiply_tile<T>(acc[chain][0][column], low, b0, b1);
        multiply_tile<T>(acc[chain][1][column], high, b0, b1);
      }
    };
#pragma unroll
    for (int k = 0; k < kResident; ++k) multiply(k, w[0][k], w[1][k], k % kChains);
#pragma unroll 2
    for (int k = kResident; k < k_tiles && kParts == 1; ++k) {
      const uint4 low = overflow[(k - kResident) * overflow_stride];
      const uint4 high = overflow[(k - kResident) * overflow_stride + kWarp];
      multiply(k, {low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}, 0);
    }

    // All sums over k, of the thread's gates: the other part's are added through shared memory, two buffers in turn.
    if constexpr (kChains == 2) {
#pragma unroll
      for (int e = 0; e < 8; ++e) acc[0][e / 4][0][e % 4] += acc[kChains - 1][e / 4][0][e % 4];
    }
    if constexpr (kParts == 2) {
      const auto sums_of = [&](int of_part, int half, int column) -> float4& {
        return all_sums[(((s % 2 * kParts + of_part) * plan.warps + warp) * 2 + half) * kColumns * kWarp +
                        column * kWarp];
      };
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float (&own)[4] = acc[0][half][column];
          sums_of(part, half, column) = float4{own[0], own[1], own[2], own[3]};
        }
      }
      sync_threads();
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 other = sums_of(1 - part, half, column);
          float (&own)[4] = acc[0][half][column];
          own[0] += other.x;
          own[1] += other.y;
          own[2] += other.z;
          own[3] += other.w;
        }
      }
    }

    const uint32_t target = shared_address(buffers + s % 2 * memory.h_words + tile * kColumns * kWarp + lane);
    const uint32_t barrier = shared_address(&barriers[s % 2]);
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      float gates[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        gates[0][i] = sigmoid(acc[0][0][column][i]);
        gates[1][i] = sigmoid(acc[0][0][column][2 + i]);
        gates[2][i] = hyperbolic_tangent(acc[0][1][column][i]);
        gates[3][i] = sigmoid(acc[0][1][column][2 + i]);
        const float new_c = gates[1][i] * c[column][i] + gates[0][i] * gates[2][i];
        const float new_h = gates[3][i] * hyperbolic_tangent(new_c);
        const bool active = place.first_row + column * 8 + 2 * j + i < sequences;  // selects cost less than branches
        c[column][i] = active ? new_c : c[column][i];
        h[column][i] = active ? new_h : h[column][i];
      }
      // From here on a thread has row r of the batch and the units 2j and 2j + 1 of the warp.
      const uint32_t pair = transpose_tile(pair_of<T>(h[column][0], h[column][1]));
      if (s + 1 < steps) {
        for (int i = part; i < plan.blocks; i += kParts) {
          const int to = rank + i < plan.blocks ? rank + i : rank + i - plan.blocks;
          send(address_in(target + column * kWarp * 4, to), pair, address_in(barrier, to));
        }
      }
      const int row = place.first_row + column * 8 + r;
      const int first_unit = 8 * tile + 2 * j;
      const int valid = row < sequences && first_unit < H ? (first_unit + 1 < H ? 2 : 1) : 0;
      if (part == 0) store_pair(args.output + (token + row) * G * H + g * H + first_unit, pair, valid, H % 2 == 0);
      if (args.gates != nullptr && part == kParts - 1) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const uint32_t gate = transpose_tile(pair_of<T>(gates[q][0], gates[q][1]));
          T* const at = args.gates + ((g * shape.tokens + token + row) * 4 + q) * H + first_unit;
          store_pair(at, gate, valid, H % 2 == 0);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int own = place.first_row + column * 8 + 2 * j + i;
          if (own < sequences && unit < H) {
            args.cells[(g * shape.tokens + token + own) * H + unit] = c[column][i];
          }
        }
      }
    }
  }

#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = place.first_row + column * 8 + 2 * j + i;
      if (row >= B || unit >= H || part > 0) continue;
      args.h_n[(g * B + row) * H + unit] = from_float<T>(h[column][i]);
      args.c_n[(g * B + row) * H + unit] = from_float<T>(c[column][i]);
    }
  }
  sync_cluster();  // no block leaves while another sends to it
}

template <typename T, int kResident, int kColumns, int kParts>
ClusterKernel<Forward<T>> kernel(const Plan& plan) {
  return {forward<T, kResident, kColumns, kParts>, kParts * plan.threads(), Memory(plan, kResident, kParts).bytes};
}

template <typename T>
ClusterKernel<Forward<T>> kernel_for(const Plan& plan) {
  if (plan.warps == 6) return kernel<T, 20, 1, 1>(plan);
  return with_least<1, 2>(plan.rows / 8, [&]<int kColumns>() {
    if (plan.warps == 4) {
      return with_least<12, 16>(plan.blocks, [&]<int kResident>() { return kernel<T, kResident, kColumns, 2>(plan); });
    }
    return with_least<4, 8, 12, 16>(plan.units() / 16,
                                    [&]<int kResident>() { return kernel<T, kResident, kColumns, 1>(plan); });
  });
}

}  // namespace

template <typename T>
int forward_clusters_at_once(const Plan& plan) {
  return clusters_at_once(kernel_for<T>(plan), plan);
}

template <typename T>
void run_forward(const RnnForward<T>& args, const Plan& plan, Stream stream) {
  run_on_clusters(kernel_for<T>(plan), args, plan, stream);
}

template int forward_clusters_at_once<BFloat16>(const Plan&);
template int forward_clusters_at_once<Float16>(const Plan&);
template void run_forward(const RnnForward<BFloat16>&, const Plan&, Stream);
template void run_forward(const RnnForward<Float16>&, const Plan&, Stream);

}  // namespace pymtl::cuda
