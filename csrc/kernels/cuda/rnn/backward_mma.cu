// The backward recurrence in 16-bit types, on tensor cores: grad_h [H, rows] = W_hh^T [H, 4H] grad_gates [4H, rows].
//
// A block has the gradients of its own units' gates, and multiplies them by those rows of W_hh, transposed: that is its
// part of the gradient of every unit's h, which it sends to the unit's owner, who adds the parts up in the order of the
// blocks. A warp's tiles of W_hh^T are 16 units of h by all gates of the block; the first kResident are in registers,
// the others in shared memory. All kWarps warps multiply; those that own units of the plan also compute gradients of
// gates, each thread (lane 4 r + j of a warp) of row r of the batch and the units 2j and 2j + 1 of its warp's 8.
#include "kernels/cuda/rnn/launch.h"
#include "kernels/cuda/rnn/mma.h"
#include "kernels/cuda/rnn/plans.h"
#include "kernels/cuda/rnn/tiles.h"

namespace pymtl::cuda {
namespace {

constexpr int kWarps = kTileWarps;

// The offsets of a block's shared memory, in bytes.
struct Memory {
  int tiles;           // of 16 units
  int tiles_of_warp;   // at most
  int weights;         // [tiles_of_warp - kResident][k tiles][kWarps][lane] fragments of 16 bytes
  int gradients;       // [2][k tiles][2][rows / 8][lane] pairs of 4 bytes
  int gradient_words;  // of one of the two
  int parts;           // [2][blocks] floats, see part_index
  int part_bytes;      // of one of the two
  int barriers;        // two
  int bytes;

  __host__ __device__ Memory(const Plan& plan, int resident) {
    tiles = plan.units() / 16;
    tiles_of_warp = (tiles + kWarps - 1) / kWarps;
    const int overflow = tiles_of_warp > resident ? tiles_of_warp - resident : 0;
    weights = 0;
    gradients = weights + overflow * 2 * plan.warps * kWarps * kWarp * 16;
    gradient_words = 2 * plan.warps * 2 * (plan.rows / 8) * kWarp;
    parts = gradients + 2 * gradient_words * 4;
    part_bytes = plan.units() * plan.rows * 4;
    barriers = parts + 2 * part_bytes;
    bytes = barriers + 2 * static_cast<int>(sizeof(ArrivalBarrier));
  }
};

template <typename T>
using Backward = Launch<RnnBackward<T>, T>;

template <typename T, int kResident, int kSteps, int kColumns>
__global__ void __launch_bounds__(kWarps* kWarp, 1) backward(const __grid_constant__ Backward<T> launch) {
  constexpr int kUnits = 8 * kSteps / 2;  // of a block
  constexpr int kRows = 8 * kColumns;
  const RnnBackward<T>& args = launch.args;
  const RnnShape& shape = args.shape;
  const Plan& plan = launch.plan;
  const Place place(launch);
  const Memory memory(plan, kResident);
  const int64_t G = shape.recurrences;
  const int64_t B = shape.batch;
  const int64_t H = shape.hidden_size;
  const int64_t g = place.g;
  const int rank = cluster_rank();
  const int warp = thread_index() / kWarp;
  const int lane = thread_index() % kWarp;
  const int r = lane / 4;
  const int j = lane % 4;
  const int own_unit = 8 * warp + 2 * j;  // the first of the two, within the block
  const int64_t unit = rank * kUnits + own_unit;
  const bool owner = own_unit < kUnits;
  const int units_there = owner && unit < H ? (unit + 1 < H ? 2 : 1) : 0;
  const bool aligned = H % 2 == 0;

  unsigned char* const shared = shared_memory();
  auto* const overflow = reinterpret_cast<uint4*>(shared + memory.weights) + warp * kWarp + lane;
  auto* const all_gradients = reinterpret_cast<uint32_t*>(shared + memory.gradients) + lane;
  auto* const parts = reinterpret_cast<float*>(shared + memory.parts);
  auto* const barriers = reinterpret_cast<ArrivalBarrier*>(shared + memory.barriers);
  const int part_size = memory.part_bytes / 4;

  // The weights, once. Along k stand, for each warp, gates i and f of its units, then g and o.
  const T* const w_hh = place.weights->w_hh;
  const auto load_tile = [&](uint32_t (&a)[4], int i, int k) {
    const int64_t row = 16 * (warp + i * kWarps) + r;
    load_weights_across(a, w_hh, H, row, k % 2, static_cast<int64_t>(rank) * kUnits + k / 2 * 8 + 2 * j);
  };
  uint32_t w[kResident][kSteps][4];
#pragma unroll
  for (int i = 0; i < kResident; ++i) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) load_tile(w[i][k], i, k);
  }
  for (int i = kResident; i < memory.tiles_of_warp; ++i) {
#pragma unroll 4  // so that many loads are under way at the same time
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      load_tile(a, i, k);
      overflow[((i - kResident) * kSteps + k) * kWarps * kWarp] = uint4{a[0], a[1], a[2], a[3]};
    }
  }

  // The gradients of the last states, and c before each sequence's first step.
  float grad_h[kColumns][2];
  float grad_c[kColumns][2];
  float c0[kColumns][2];
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const int64_t row = place.first_row + column * 8 + r;
    const int64_t at = (g * B + row) * H + unit;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = row < B && i < units_there;
      grad_h[column][i] = there && args.grad_h_n != nullptr ? to_float(args.grad_h_n[at + i]) : 0.0F;
      grad_c[column][i] = there && args.grad_c_n != nullptr ? to_float(args.grad_c_n[at + i]) : 0.0F;
      c0[column][i] = there && args.c0 != nullptr ? to_float(args.c0[at + i]) : 0.0F;
    }
  }

  TimeLoop loop(shape, place.first_row, !place.weights->reverse);
  const int steps = loop.steps();
  const auto bytes = static_cast<uint32_t>(memory.part_bytes);
  if (thread_index() == 0) Arrivals::start(barriers, steps, bytes);
  sync_cluster();

  const auto load_all = [&](Reserve(&reserve)[kColumns]) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const int row = place.first_row + column * 8 + r;
      const int valid = row < loop.sequences() ? units_there : 0;
      load_reserve(reserve[column], args, g, loop.token() + row, unit, valid, aligned);
    }
  };
  const auto load_all_cells = [&](float (&cells)[kColumns][2]) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const int row = place.first_row + column * 8 + r;
      const int valid = row < loop.sequences() ? units_there : 0;
      load_cells(cells[column], args, g, loop.token() + row, unit, valid, c0[column]);
    }
  };
  // What was sent during step s, added to nothing else: the gradient of h before that step.
  bool active[kColumns] = {};
  const auto receive = [&](int s) {
    Arrivals::wait(barriers, s, steps, bytes);
    const float* const part = parts + s % 2 * part_size;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      float sums[2] = {};
      for (int from = 0; from < plan.blocks; ++from) {
        const float* const of_block = part + from * kUnits * kRows;
        sums[0] += of_block[part_index<kColumns>(own_unit, column, r)];
        sums[1] += of_block[part_index<kColumns>(own_unit + 1, column, r)];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) grad_h[column][i] = active[column] ? sums[i] : grad_h[column][i];
    }
  };

  // c is loaded a step sooner than all else, since a step needs c before it, too.
  Reserve next[kColumns];
  float next_c[kColumns][2];
  float c_behind[kColumns][2];  // of the step behind the next one
  int64_t next_token = 0;
  if (steps > 0) {
    next_token = loop.token();
    load_all(next);
    load_all_cells(next_c);
  }
#pragma unroll
  for (int i = 0; i < 2 * kColumns; ++i) c_behind[i / 2][i % 2] = c0[i / 2][i % 2];
  if (steps > 1) {
    loop.advance();
    load_all_cells(c_behind);
  }

  for (int s = 0; s < steps; ++s) {
    const int64_t first_token = next_token;
    Reserve reserve[kColumns];
    float c[kColumns][2];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      reserve[column] = next[column];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        c[column][i] = next_c[column][i];
        next_c[column][i] = c_behind[column][i];
        c_behind[column][i] = c0[column][i];
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
    if (s > 0 && owner) receive(s - 1);

    // Two in turn: a warp may still multiply by those of the step before, since what it sends then goes to other
    // blocks.
    uint32_t* const gradients = all_gradients + s % 2 * memory.gradient_words;
#pragma unroll
    for (int column = 0; column < kColumns && owner; ++column) {
      uint32_t pairs[4];
      gate_gradients<T>(pairs, reserve[column], c[column], next_c[column], grad_h[column], grad_c[column]);
      active[column] = reserve[column].valid > 0;
      const int64_t token = first_token + place.first_row + column * 8 + r;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        gradients[((2 * (2 * warp + q / 2) + q % 2) * kColumns + column) * kWarp] = pairs[q];
        T* const to = args.grad_gates + ((token * G + g) * 4 + q) * H + unit;
        store_pair(to, pairs[q], reserve[column].valid, aligned);
      }
    }
    sync_threads();

    const uint32_t barrier = shared_address(&barriers[s % 2]);
    const auto send_tile = [&](int i, const float (&acc)[4], int column) {
      const int row = 16 * (warp + i * kWarps) + r;  // and row + 8, of the same block
      const int to = row / kUnits;
      const float* const of_block = parts + s % 2 * part_size + rank * kUnits * kRows;
      const int at = part_index<kColumns>(row % kUnits, column, 2 * j);
      const uint32_t target = address_in(shared_address(of_block + at), to);
      const uint32_t arrival = address_in(barrier, to);
      send(target, acc[0], acc[1], arrival);
      send(target + kColumns * 64 * 4, acc[2], acc[3], arrival);  // 8 units on
    };
    const auto multiply = [](float (&acc)[4], const uint32_t (&tile)[4], uint32_t b0, uint32_t b1) {
      multiply_tile<T>(acc, tile, b0, b1);
    };
    multiply_tiles<kResident, kSteps, kColumns>(w, overflow, gradients, warp, memory.tiles, multiply, send_tile);
  }
  if (steps > 0 && owner) receive(steps - 1);

#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const int64_t row = place.first_row + column * 8 + r;
    const int64_t at = (g * B + row) * H + unit;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row >= B || i >= units_there) continue;
      if (args.grad_h0 != nullptr) args.grad_h0[at + i] = from_float<T>(grad_h[column][i]);
      if (args.grad_c0 != nullptr) args.grad_c0[at + i] = from_float<T>(grad_c[column][i]);
    }
  }
  sync_cluster();  // no block leaves while another sends to it
}

template <typename T, int kResident, int kSteps, int kColumns>
ClusterKernel<Backward<T>> kernel(const Plan& plan) {
  return {backward<T, kResident, kSteps, kColumns>, kWarps * kWarp, Memory(plan, kResident).bytes};
}

template <typename T>
ClusterKernel<Backward<T>> kernel_for(const Plan& plan) {
  if (plan.warps == 6) return kernel<T, 3, 12, 1>(plan);
  return with_least<1, 2>(plan.rows / 8, [&]<int kColumns>() {
    if (plan.warps == 4) return kernel<T, 4, 8, kColumns>(plan);
    return plan.blocks <= 2 ? kernel<T, 1, 16, kColumns>(plan) : kernel<T, 2, 16, kColumns>(plan);
  });
}

}  // namespace

template <typename T>
int backward_clusters_at_once(const Plan& plan) {
  return clusters_at_once(kernel_for<T>(plan), plan);
}

template <typename T>
void run_backward(const RnnBackward<T>& args, const Plan& plan, Stream stream) {
  run_on_clusters(kernel_for<T>(plan), args, plan, stream);
}

template int backward_clusters_at_once<BFloat16>(const Plan&);
template int backward_clusters_at_once<Float16>(const Plan&);
template void run_backward(const RnnBackward<BFloat16>&, const Plan&, Stream);
template void run_backward(const RnnBackward<Float16>&, const Plan&, Stream);

}  // namespace pymtl::cuda
