// The backward recurrence in float with products in TF32, on tensor cores:
// grad_h [H, rows] = W_hh^T [H, 4H] grad_gates [4H, rows].
//
// A block has the gradients of its own units' gates, and multiplies them by those rows of W_hh, transposed: that is its
// part of the gradient of every unit's h, which it sends to the unit's owner, who adds the parts up in the order of the
// blocks. A warp's tiles of W_hh^T are 16 units of h by all gates of the block; the first kResident are in registers,
// the others in shared memory. A warp also computes the gradients of the gates of 4 units: each thread (lane 4 r + j)
// of unit j and, of each column of 8 rows of the batch, row r.
#include "kernels/cuda/rnn/float_cells.h"
#include "kernels/cuda/rnn/launch.h"
#include "kernels/cuda/rnn/plans.h"
#include "kernels/cuda/rnn/tiles.h"

namespace pymtl::cuda {
namespace {

constexpr int kWarps = kTileWarps;
constexpr int kUnits = 32;              // of a block
constexpr int kSteps = 4 * kUnits / 8;  // along k: gate by gate, 8 units each

// The offsets of a block's shared memory, in bytes.
struct Memory {
  int tiles;           // of 16 units
  int weights;         // [tiles of a warp - kResident][kSteps][thread] fragments of 16 bytes
  int gradients;       // [2][kSteps][2][rows / 8][lane] words as the instruction takes them
  int gradient_words;  // of one of the two
  int parts;           // [2][blocks] floats [kUnits / 8][rows / 8][8 units][8 rows]
  int part_floats;     // of one of the two
  int barriers;        // two
  int bytes;

  __host__ __device__ Memory(const Plan& plan, int resident) {
    tiles = plan.units() / 16;
    const int of_warp = (tiles + kWarps - 1) / kWarps;
    weights = 0;
    gradients = (of_warp > resident ? of_warp - resident : 0) * kSteps * kWarps * kWarp * 16;
    gradient_words = 4 * kUnits * plan.rows;
    parts = gradients + 2 * gradient_words * 4;
    part_floats = plan.units() * plan.rows;
    barriers = parts + 2 * part_floats * 4;
    bytes = barriers + 2 * static_cast<int>(sizeof(ArrivalBarrier));
  }
};

template <int kColumns>
__device__ __forceinline__ int part_index(int unit, int column, int row) {
  return ((unit / 8 * kColumns + column) * 8 + unit % 8) * 8 + row;
}

using Backward = Launch<RnnBackward<float>, float>;

template <int kResident, int kColumns>
__global__ void __launch_bounds__(kWarps* kWarp, 1) backward(const __grid_constant__ Backward launch) {
  constexpr int kRows = 8 * kColumns;
  const RnnBackward<float>& args = launch.args;
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
  const int own_unit = 4 * warp + j;  // within the block
  const int64_t unit = rank * kUnits + own_unit;

  unsigned char* const shared = shared_memory();
  auto* const overflow = reinterpret_cast<uint4*>(shared + memory.weights) + thread_index();
  auto* const all_gradients = reinterpret_cast<uint32_t*>(shared + memory.gradients) + lane;
  auto* const parts = reinterpret_cast<float*>(shared + memory.parts);
  auto* const barriers = reinterpret_cast<ArrivalBarrier*>(shared + memory.barriers);

  // The weights, once.
  const auto load_tile = [&](uint32_t (&a)[4], int i, int k) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t column = 16 * (warp + i * kWarps) + r + e % 2 * 8;
      const int64_t from = rank * kUnits + k % (kUnits / 8) * 8 + e / 2 * 4 + j;
      const bool there = from < H && column < H;
      a[e] = rounded_to_tf32(there ? place.weights->w_hh[(k / (kUnits / 8) * H + from) * H + column] : 0.0F);
    }
  };
  uint32_t w[kResident][kSteps][4];
#pragma unroll
  for (int i = 0; i < kResident; ++i) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) load_tile(w[i][k], i, k);
  }
  for (int i = kResident; warp + i * kWarps < memory.tiles; ++i) {
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      load_tile(a, i, k);
      overflow[((i - kResident) * kSteps + k) * kWarps * kWarp] = uint4{a[0], a[1], a[2], a[3]};
    }
  }

  // The gradients of the last states, and c before each sequence's first step.
  const auto row_of = [&](int column) { return place.first_row + column * 8 + r; };
  const auto state_of = [&](int column) { return (g * B + row_of(column)) * H + unit; };
  float grad_h[kColumns];
  float grad_c[kColumns];
  float c0[kColumns];
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const bool there = row_of(column) < B && unit < H;
    grad_h[column] = there && args.grad_h_n != nullptr ? args.grad_h_n[state_of(column)] : 0.0F;
    grad_c[column] = there && args.grad_c_n != nullptr ? args.grad_c_n[state_of(column)] : 0.0F;
    c0[column] = there && args.c0 != nullptr ? args.c0[state_of(column)] : 0.0F;
  }

  TimeLoop loop(shape, place.first_row, !place.weights->reverse);
  const int steps = loop.steps();
  const auto bytes = static_cast<uint32_t>(memory.part_floats * 4);
  if (thread_index() == 0) Arrivals::start(barriers, steps, bytes);
  sync_cluster();

  const auto load_next = [&](Reserve(&reserve)[kColumns]) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const int row = row_of(column);
      load_reserve(reserve[column], args, g, loop.token() + row, unit, row < loop.sequences() && unit < H);
    }
  };
  const auto load_cells = [&](float (&cells)[kColumns]) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const int row = row_of(column);
      const bool there = row < loop.sequences() && unit < H;
      cells[column] = load_cell(args, g, loop.token() + row, unit, there, c0[column]);
    }
  };
  // What was sent during step s is the gradient of h before that step.
  bool active[kColumns] = {};
  const auto receive = [&](int s) {
    Arrivals::wait(barriers, s, steps, bytes);
    const float* const part = parts + s % 2 * memory.part_floats;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      float sum = 0.0F;
      for (int from = 0; from < plan.blocks; ++from) {
        sum += part[from * kUnits * kRows + part_index<kColumns>(own_unit, column, r)];
      }
      if (active[column]) grad_h[column] = sum;
    }
  };

  // c is loaded a step sooner than all else, since a step needs c before it, too.
  Reserve next[kColumns] = {};
  float next_c[kColumns] = {};
  float c_behind[kColumns];  // of the step behind the next one
  int64_t next_token = 0;
  if (steps > 0) {
    next_token = loop.token();
    load_next(next);
    load_cells(next_c);
  }
#pragma unroll
  for (int column = 0; column < kColumns; ++column) c_behind[column] = c0[column];
  if (steps > 1) {
    loop.advance();
    load_cells(c_behind);
  }

  for (int s = 0; s < steps; ++s) {
    const int64_t first_token = next_token;
    Reserve reserve[kColumns];
    float c[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      reserve[column] = next[column];
      c[column] = next_c[column];
      next_c[column] = c_behind[column];
      c_behind[column] = c0[column];
    }
    if (s + 1 < steps) {  // while this step computes
      next_token = loop.token();
      load_next(next);
    }
    if (s + 2 < steps) {
      loop.advance();
      load_cells(c_behind);
    }
    if (s > 0) receive(s - 1);

    // Two in turn: a warp may still multiply by those of the step before, since what it sends then goes to other
    // blocks.
    uint32_t* const gradients = all_gradients + s % 2 * memory.gradient_words;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      float grads[4] = {};
      active[column] = reserve[column].active;
      if (active[column]) {
        gate_gradients(grads, reserve[column], c[column], next_c[column], grad_h[column], grad_c[column]);
        float* const at = args.grad_gates + ((first_token + row_of(column)) * G + g) * 4 * H + unit;
#pragma unroll
        for (int q = 0; q < 4; ++q) at[q * H] = grads[q];
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int k = q * (kUnits / 8) + warp / 2;
        gradients[((2 * k + warp % 2) * kColumns + column) * kWarp] = rounded_to_tf32(grads[q]);
      }
    }
    sync_threads();

    const uint32_t barrier = shared_address(&barriers[s % 2]);
    const auto send_tile = [&](int i, const float (&acc)[4], int column) {
      const int row = 16 * (warp + i * kWarps) + r;  // and row + 8, of the same block
      const float* const of_block = parts + s % 2 * memory.part_floats + rank * kUnits * kRows;
      const int at = part_index<kColumns>(row % kUnits, column, 2 * j);
      const uint32_t target = address_in(shared_address(of_block + at), row / kUnits);
      const uint32_t arrival = address_in(barrier, row / kUnits);
      send(target, acc[0], acc[1], arrival);
      send(target + kColumns * 64 * 4, acc[2], acc[3], arrival);  // 8 units on
    };
    const auto multiply = [](float (&acc)[4], const uint32_t (&tile)[4], uint32_t b0, uint32_t b1) {
      multiply_tile_tf32(acc, tile, b0, b1);
    };
    multiply_tiles<kResident, kSteps, kColumns>(w, overflow, gradients, warp, memory.tiles, multiply, send_tile);
  }
  if (steps > 0) receive(steps - 1);

#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    if (row_of(column) >= B || unit >= H) continue;
    if (args.grad_h0 != nullptr) args.grad_h0[state_of(column)] = grad_h[column];
    if (args.grad_c0 != nullptr) args.grad_c0[state_of(column)] = grad_c[column];
  }
  sync_cluster();  // no block leaves while another sends to it
}

template <int kResident, int kColumns>
ClusterKernel<Backward> kernel(const Plan& plan) {
  return {backward<kResident, kColumns>, kWarps * kWarp, Memory(plan, kResident).bytes};
}

ClusterKernel<Backward> kernel_for(const Plan& plan) {
  return with_least<1, 2, 4>(plan.rows / 8, [&]<int kColumns>() {
    return plan.units() <= 16 * kWarps ? kernel<1, kColumns>(plan) : kernel<2, kColumns>(plan);
  });
}

}  // namespace

int backward_clusters_at_once_tf32(const Plan& plan) { return clusters_at_once(kernel_for(plan), plan); }

void run_backward_tf32(const RnnBackward<float>& args, const Plan& plan, Stream stream) {
  run_on_clusters(kernel_for(plan), args, plan, stream);
}

}  // namespace pymtl::cuda
