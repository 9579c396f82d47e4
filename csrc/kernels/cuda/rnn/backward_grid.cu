// The backward recurrence in 16-bit types, by groups of blocks: grad_h [H, rows] = W_hh^T [H, 4H] grad_gates [4H,
// rows].
//
// A block sums over the gates of all units for its own 16 units of h: one tile of rows, along k for each block of the
// group 4 steps of 16, its two unit tiles by gates i and f, then g and o. The warps share the sum over k, an eighth of
// the blocks each, in registers, and add up their parts through shared memory. The cells are a thread's (lane 4 r + j)
// of row r of the batch and the units 2j and 2j + 1 of a tile of 8.
#include "kernels/cuda/rnn/launch.h"
#include "kernels/cuda/rnn/mma.h"
#include "kernels/cuda/rnn/plans.h"

namespace pymtl::cuda {
namespace {

constexpr int kBlocksOfWarp = kGroupBlocks / kGroupWarps;

template <typename T>
using Backward = GroupLaunch<RnnBackward<T>, T>;

template <typename T, int kColumns>
__global__ void __launch_bounds__(kGroupWarps* kWarp, 1) backward(const __grid_constant__ Backward<T> launch) {
  const RnnBackward<T>& args = launch.args;
  const RnnShape& shape = args.shape;
  const GroupPlan& plan = launch.plan;
  const int64_t buffer_words = plan.backward_words();
  const GroupPlace place(launch, buffer_words);
  const int64_t G = shape.recurrences;
  const int64_t B = shape.batch;
  const int64_t H = shape.hidden_size;
  const int64_t g = place.g;
  const int warp = thread_index() / kWarp;
  const int lane = thread_index() % kWarp;
  const int r = lane / 4;
  const int j = lane % 4;
  const bool aligned = H % 2 == 0;
  auto* const parts = reinterpret_cast<float*>(shared_memory());  // [warps], see part_index

  uint32_t w[kBlocksOfWarp][4][4];
#pragma unroll
  for (int block = 0; block < kBlocksOfWarp; ++block) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t from = (static_cast<int64_t>(kBlocksOfWarp) * warp + block) * kGroupUnits + k / 2 * 8 + 2 * j;
      load_weights_across(w[block][k], place.weights->w_hh, H, place.rank * kGroupUnits + r, k % 2, from);
    }
  }

  constexpr int kOwn = kItems<kColumns>;
  const auto item_of = [&](int i) { return warp + i * kGroupWarps; };
  const auto unit_of = [&](int i) {
    return static_cast<int64_t>(place.rank) * kGroupUnits + item_of(i) % 2 * 8 + 2 * j;
  };
  const auto units_there = [&](int i) {
    if (item_of(i) >= 2 * kColumns || unit_of(i) >= H) return 0;
    return unit_of(i) + 1 < H ? 2 : 1;
  };
  const auto row_of = [&](int i) { return place.first_row + item_of(i) / 2 * 8 + r; };
  float grad_h[kOwn][2];
  float grad_c[kOwn][2];
  float c0[kOwn][2];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t at = (g * B + row_of(i)) * H + unit_of(i);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool there = row_of(i) < B && e < units_there(i);
      grad_h[i][e] = there && args.grad_h_n != nullptr ? to_float(args.grad_h_n[at + e]) : 0.0F;
      grad_c[i][e] = there && args.grad_c_n != nullptr ? to_float(args.grad_c_n[at + e]) : 0.0F;
      c0[i][e] = there && args.c0 != nullptr ? to_float(args.c0[at + e]) : 0.0F;
    }
  }

  TimeLoop loop(shape, place.first_row, !place.weights->reverse);
  const int steps = loop.steps();
  const auto load_all = [&](Reserve(&reserve)[kOwn]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int valid = row_of(i) < loop.sequences() ? units_there(i) : 0;
      load_reserve(reserve[i], args, g, loop.token() + row_of(i), unit_of(i), valid, aligned);
    }
  };
  const auto load_all_cells = [&](float (&cells)[kOwn][2]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int valid = row_of(i) < loop.sequences() ? units_there(i) : 0;
      load_cells(cells[i], args, g, loop.token() + row_of(i), unit_of(i), valid, c0[i]);
    }
  };

  // The gradient of h before step s: what the gates of all units at that step give.
  bool active[kOwn] = {};
  const auto receive = [&](int s) {
    wait_for_group(place.arrived, static_cast<uint32_t>(plan.blocks) * static_cast<uint32_t>(s + 1));
    const auto* const words = reinterpret_cast<const uint4*>(place.words + s % 2 * buffer_words) + 2 * lane;
#pragma unroll 1
    for (int column = 0; column < kColumns; ++column) {
      float acc[2][4] = {};
#pragma unroll
      for (int block = 0; block < kBlocksOfWarp; ++block) {
        const int from = kBlocksOfWarp * warp + block;
        if (from >= plan.blocks) continue;
        const uint4 low = load_fresh(words + (column * plan.blocks + from) * kWarp * 2);
        const uint4 high = load_fresh(words + (column * plan.blocks + from) * kWarp * 2 + 1);
        multiply_tile<T>(acc[0], w[block][0], low.x, low.y);
        multiply_tile<T>(acc[1], w[block][1], low.z, low.w);
        multiply_tile<T>(acc[0], w[block][2], high.x, high.y);
        multiply_tile<T>(acc[1], w[block][3], high.z, high.w);
        if (block % 4 == 3) order_loads();  // all of them in flight would take the weights' registers
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = part_index<kColumns>(half * 8 + r, column, 2 * j);
        reinterpret_cast<float2*>(parts + warp * kGroupUnits * 8 * kColumns + at)[0] =
            float2{acc[0][2 * half] + acc[1][2 * half], acc[0][2 * half + 1] + acc[1][2 * half + 1]};
      }
    }
    sync_threads();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int item = item_of(i);
      if (item >= 2 * kColumns) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = part_index<kColumns>(item % 2 * 8 + 2 * j + e, item / 2, r);
        float sum = 0.0F;
#pragma unroll
        for (int part = 0; part < kGroupWarps; ++part) {
          sum += parts[part * kGroupUnits * 8 * kColumns + at];
        }
        if (active[i]) grad_h[i][e] = sum;
      }
    }
  };

  // c is loaded a step sooner than all else, since a step needs c before it, too.
  Reserve next[kOwn];
  float next_c[kOwn][2];
  float c_behind[kOwn][2];  // of the step behind the next one
  int64_t next_token = 0;
  if (steps > 0) {
    next_token = loop.token();
    load_all(next);
    load_all_cells(next_c);
  }
#pragma unroll
  for (int i = 0; i < 2 * kOwn; ++i) c_behind[i / 2][i % 2] = c0[i / 2][i % 2];
  if (steps > 1) {
    loop.advance();
    load_all_cells(c_behind);
  }

  for (int s = 0; s < steps; ++s) {
    const int64_t first_token = next_token;
    Reserve reserve[kOwn];
    float c[kOwn][2];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      reserve[i] = next[i];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        c[i][e] = next_c[i][e];
        next_c[i][e] = c_behind[i][e];
        c_behind[i][e] = c0[i][e];
      }
    }
    if (s + 1 < steps) {  // while this step computes
      next_token = loop.token();
      load_all(next);
    }
    if (s + 2 < steps) {
      loop.advance();
      load_all_cells(c_behind);
    }
    if (s > 0) receive(s - 1);
    uint32_t pairs[kOwn][4];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int item = item_of(i);
      if (item >= 2 * kColumns) continue;
      gate_gradients<T>(pairs[i], reserve[i], c[i], next_c[i], grad_h[i], grad_c[i]);
      active[i] = reserve[i].valid > 0;
      const int64_t at = (static_cast<int64_t>(item / 2) * plan.blocks + place.rank) * kWarp + lane;
      reinterpret_cast<uint4*>(place.words + s % 2 * buffer_words)[2 * at + item % 2] =
          uint4{pairs[i][0], pairs[i][1], pairs[i][2], pairs[i][3]};
    }
    publish(place.arrived);  // before the results, which the others need not wait for
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (item_of(i) >= 2 * kColumns) continue;
      const int64_t token = first_token + row_of(i);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        T* const to = args.grad_gates + ((token * G + g) * 4 + q) * H + unit_of(i);
        store_pair(to, pairs[i][q], reserve[i].valid, aligned);
      }
    }
  }
  if (steps > 0) receive(steps - 1);

#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t at = (g * B + row_of(i)) * H + unit_of(i);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (row_of(i) >= B || e >= units_there(i)) continue;
      if (args.grad_h0 != nullptr) args.grad_h0[at + e] = from_float<T>(grad_h[i][e]);
      if (args.grad_c0 != nullptr) args.grad_c0[at + e] = from_float<T>(grad_c[i][e]);
    }
  }
}

template <typename T>
GroupKernel<Backward<T>> kernel_for(int rows) {
  return with_least<1, 2, 4, 8>(rows / 8, []<int kColumns>() -> GroupKernel<Backward<T>> {
    return {backward<T, kColumns>, sizeof(float4) * kGroupWarps * kColumns * kWarp};
  });
}

}  // namespace

template <typename T>
int backward_blocks_at_once(int rows) {
  return blocks_at_once(kernel_for<T>(rows));
}

template <typename T>
void run_backward(const RnnBackward<T>& args, const GroupPlan& plan, void* workspace, Stream stream) {
  run_in_groups(kernel_for<T>(plan.rows), args, plan, plan.backward_words(), workspace, stream);
}

template int backward_blocks_at_once<BFloat16>(int);
template int backward_blocks_at_once<Float16>(int);
template void run_backward(const RnnBackward<BFloat16>&, const GroupPlan&, void*, Stream);
template void run_backward(const RnnBackward<Float16>&, const GroupPlan&, void*, Stream);

}  // namespace pymtl::cuda
