// The forward recurrence in 16-bit types, by groups of blocks: gates [4H, rows] = W_hh [4H, H] h [H, rows].
//
// The warps of a block share the sum over k: each has all 64 rows of W_hh of the block's units, in four tiles, by an
// eighth of the columns, in registers. Tiles 0 and 1 are gates i and f, g and o of the first 8 units, 2 and 3 of the
// others. The parts are added up through shared memory by the warps that own the cells, a thread (lane 4 r + j) those
// of unit r and the rows 2j and 2j + 1 of the batch.
#include "kernels/cuda/rnn/launch.h"
#include "kernels/cuda/rnn/mma.h"
#include "kernels/cuda/rnn/plans.h"

namespace pymtl::cuda {
namespace {

constexpr int kQuads = 4;  // of 32 units, that a warp sums over

template <typename T>
using Forward = GroupLaunch<RnnForward<T>, T>;

template <typename T, int kColumns>
__global__ void __launch_bounds__(kGroupWarps* kWarp, 1) forward(const __grid_constant__ Forward<T> launch) {
  const RnnForward<T>& args = launch.args;
  const RnnShape& shape = args.shape;
  const GroupPlan& plan = launch.plan;
  const int64_t buffer_words = plan.forward_words();
  const GroupPlace place(launch, buffer_words);
  const int64_t G = shape.recurrences;
  const int64_t B = shape.batch;
  const int64_t H = shape.hidden_size;
  const int64_t g = place.g;
  const int warp = thread_index() / kWarp;
  const int lane = thread_index() % kWarp;
  const int r = lane / 4;
  const int j = lane % 4;
  const int quads = (plan.blocks + 1) / 2;
  auto* const parts = reinterpret_cast<float4*>(shared_memory()) + lane;  // [warps][4 tiles][columns][lane]

  // The weights, once. Along k, quad q is the units 32 q + 8 i for i = 0..3, in two steps of 16.
  uint32_t w[4][2 * kQuads][4];
#pragma unroll
  for (int k = 0; k < 2 * kQuads; ++k) {
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      const int64_t unit = place.rank * kGroupUnits + tile / 2 * 8 + r;
      load_weights(w[tile][k], place.weights->w_hh, H, tile % 2 * 2, unit, (2 * kQuads * warp + k) * 16 + 2 * j);
    }
  }

  // The cells of this thread: of unit tile item % 2 and column item / 2.
  constexpr int kOwn = kItems<kColumns>;
  float bias[kOwn][4];
  float h[kOwn][2];
  float c[kOwn][2];
  const auto item_of = [&](int i) { return warp + i * kGroupWarps; };
  const auto unit_of = [&](int i) { return static_cast<int64_t>(place.rank) * kGroupUnits + item_of(i) % 2 * 8 + r; };
  const auto row_of = [&](int i, int e) { return place.first_row + item_of(i) / 2 * 8 + 2 * j + e; };
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t unit = unit_of(i);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      bias[i][q] = 0.0F;
      if (unit < H && place.weights->b_ih != nullptr) bias[i][q] = to_float(place.weights->b_ih[q * H + unit]);
      if (unit < H && place.weights->b_hh != nullptr) bias[i][q] += to_float(place.weights->b_hh[q * H + unit]);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool there = item_of(i) < 2 * kColumns && row_of(i, e) < B && unit < H;
      const int64_t at = (g * B + row_of(i, e)) * H + unit;
      h[i][e] = there && args.h0 != nullptr ? to_float(args.h0[at]) : 0.0F;
      c[i][e] = there && args.c0 != nullptr ? to_float(args.c0[at]) : 0.0F;
    }
  }

  // A pair of h, of row r of the batch and the units 2j and 2j + 1, goes to its place in the quad's words.
  const auto write_h = [&](int s, int item, uint32_t pair) {
    const int tile = 2 * place.rank + item % 2;
    const int64_t at = ((static_cast<int64_t>(item / 2) * quads + tile / 4) * kWarp + lane) * 4 + tile % 4;
    place.words[s % 2 * buffer_words + at] = pair;
  };
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t pair = transpose_tile(pair_of<T>(h[i][0], h[i][1]));
    if (item_of(i) < 2 * kColumns) write_h(1, item_of(i), pair);
  }
  publish(place.arrived);

  TimeLoop loop(shape, place.first_row, place.weights->reverse);
  const int steps = loop.steps();
  const float* const projected = args.projected + g * 4 * H;
  const int64_t projected_stride = G * 4 * H;
  const auto load_projected = [&](float (&gates)[4][kOwn][2]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool there = item_of(i) < 2 * kColumns && row_of(i, e) < loop.sequences() && unit_of(i) < H;
        const float* const at = projected + (loop.token() + row_of(i, e)) * projected_stride + unit_of(i);
#pragma unroll
        for (int q = 0; q < 4; ++q) gates[q][i][e] = there ? at[q * H] : 0.0F;
      }
    }
  };
  float next[4][kOwn][2];
  if (steps > 0) load_projected(next);

  for (int s = 0; s < steps; ++s) {
    const int sequences = loop.sequences();
    const int64_t token = loop.token();
    float sums[kOwn][4][2];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int e = 0; e < 2; ++e) sums[i][q][e] = next[q][i][e] + bias[i][q];
      }
    }
    if (s + 1 < steps) {
      loop.advance();
      load_projected(next);  // while this step computes
    }

    wait_for_group(place.arrived, static_cast<uint32_t>(plan.blocks) * static_cast<uint32_t>(s + 1));
    const auto* const words = reinterpret_cast<const uint4*>(place.words + (s + 1) % 2 * buffer_words) + lane;
    [[maybe_unused]] constexpr int kAtOnce =
        kColumns <= 2 ? kColumns : 1;  // all columns' loads would take the weights' registers
#pragma unroll kAtOnce
    for (int column = 0; column < kColumns; ++column) {
      uint4 b[kQuads];
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        const int q = kQuads * warp + quad;
        b[quad] = q < quads ? load_fresh(words + (column * quads + q) * kWarp) : uint4{0, 0, 0, 0};
      }
      float acc[4][4] = {};
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) {
          multiply_tile<T>(acc[tile], w[tile][2 * quad], b[quad].x, b[quad].y);
          multiply_tile<T>(acc[tile], w[tile][2 * quad + 1], b[quad].z, b[quad].w);
        }
      }
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        parts[((warp * 4 + tile) * kColumns + column) * kWarp] =
            float4{acc[tile][0], acc[tile][1], acc[tile][2], acc[tile][3]};
      }
    }
    sync_threads();

    float gates[kOwn][4][2];
    uint32_t pairs[kOwn] = {};
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int item = item_of(i);
      if (item >= 2 * kColumns) continue;
#pragma unroll
      for (int part = 0; part < kGroupWarps; ++part) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 four = parts[((part * 4 + item % 2 * 2 + half) * kColumns + item / 2) * kWarp];
          sums[i][2 * half][0] += four.x;
          sums[i][2 * half][1] += four.y;
          sums[i][2 * half + 1][0] += four.z;
          sums[i][2 * half + 1][1] += four.w;
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        gates[i][0][e] = sigmoid(sums[i][0][e]);
        gates[i][1][e] = sigmoid(sums[i][1][e]);
        gates[i][2][e] = hyperbolic_tangent(sums[i][2][e]);
        gates[i][3][e] = sigmoid(sums[i][3][e]);
        const float new_c = gates[i][1][e] * c[i][e] + gates[i][0][e] * gates[i][2][e];
        const float new_h = gates[i][3][e] * hyperbolic_tangent(new_c);
        const bool active = row_of(i, e) < sequences;  // selects cost less than branches
        c[i][e] = active ? new_c : c[i][e];
        h[i][e] = active ? new_h : h[i][e];
      }
      // From here on a thread has row r of the batch and the units 2j and 2j + 1 of the tile.
      pairs[i] = transpose_tile(pair_of<T>(h[i][0], h[i][1]));
      write_h(s, item, pairs[i]);
    }
    publish(place.arrived);  // before the results, which the others need not wait for
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int item = item_of(i);
      if (item >= 2 * kColumns) continue;
      const int row = place.first_row + item / 2 * 8 + r;
      const int64_t first_unit = place.rank * kGroupUnits + item % 2 * 8 + 2 * j;
      const int valid = row < sequences && first_unit < H ? (first_unit + 1 < H ? 2 : 1) : 0;
      store_pair(args.output + (token + row) * G * H + g * H + first_unit, pairs[i], valid, H % 2 == 0);
      if (args.gates == nullptr) continue;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const uint32_t gate = transpose_tile(pair_of<T>(gates[i][q][0], gates[i][q][1]));
        T* const at = args.gates + ((g * shape.tokens + token + row) * 4 + q) * H + first_unit;
        store_pair(at, gate, valid, H % 2 == 0);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (row_of(i, e) >= sequences || unit_of(i) >= H) continue;
        args.cells[(g * shape.tokens + token + row_of(i, e)) * H + unit_of(i)] = c[i][e];
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (item_of(i) >= 2 * kColumns || row_of(i, e) >= B || unit_of(i) >= H) continue;
      args.h_n[(g * B + row_of(i, e)) * H + unit_of(i)] = from_float<T>(h[i][e]);
      args.c_n[(g * B + row_of(i, e)) * H + unit_of(i)] = from_float<T>(c[i][e]);
    }
  }
}

template <typename T>
GroupKernel<Forward<T>> kernel_for(int rows) {
  return with_least<1, 2, 4, 8>(rows / 8, []<int kColumns>() -> GroupKernel<Forward<T>> {
    return {forward<T, kColumns>, sizeof(float4) * kGroupWarps * 4 * kColumns * kWarp};
  });
}

}  // namespace

template <typename T>
int forward_blocks_at_once(int rows) {
  return blocks_at_once(kernel_for<T>(rows));
}

template <typename T>
void run_forward(const RnnForward<T>& args, const GroupPlan& plan, void* workspace, Stream stream) {
  run_in_groups(kernel_for<T>(plan.rows), args, plan, plan.forward_words(), workspace, stream);
}

template int forward_blocks_at_once<BFloat16>(int);
template int forward_blocks_at_once<Float16>(int);
template void run_forward(const RnnForward<BFloat16>&, const GroupPlan&, void*, Stream);
template void run_forward(const RnnForward<Float16>&, const GroupPlan&, void*, Stream);

}  // namespace pymtl::cuda
