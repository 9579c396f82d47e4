// The backward recurrence in float: grad_h [H, rows] = W_hh^T [H, 4H] grad_gates [4H, rows].
//
// A block has the gradients of its own units' gates, and multiplies them by those rows of W_hh, transposed: that is its
// part of the gradient of every unit's h, which it sends to the unit's owner, who adds the parts up in the order of the
// blocks. A warp's tiles of W_hh^T are 16 units of h, four to a thread, by all gates of the block; the first kResident
// are in registers, the others in shared memory.
#include "kernels/cuda/rnn/float_cells.h"
#include "kernels/cuda/rnn/fma.h"
#include "kernels/cuda/rnn/launch.h"
#include "kernels/cuda/rnn/plans.h"

namespace pymtl::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kUnits = 32;                // of a block
constexpr int kGates = 4 * kUnits;        // of a block
constexpr int kSteps = kGates / kSlices;  // along k, of a thread
constexpr int kPartStride = kUnits + 4;   // of a row of the batch: no two lanes that read together share a bank

// The offsets of a block's shared memory, in bytes.
struct Memory {
  int tiles;            // of 16 units
  int weights;          // [tiles of a warp - kResident][kSteps][thread] four units
  int gradients;        // [2][kGates, rows] operands
  int gradient_floats;  // of one of the two
  int parts;            // [2][blocks][rows][kPartStride]
  int part_floats;      // of one of the two
  int barriers;         // two
  int bytes;

  __host__ __device__ Memory(const Plan& plan, int resident) {
    tiles = plan.units() / 16;
    const int of_warp = (tiles + kWarps - 1) / kWarps;
    weights = 0;
    gradients = (of_warp > resident ? of_warp - resident : 0) * kSteps * kWarps * kWarp * 16;
    gradient_floats = kGates * plan.rows;
    parts = gradients + 2 * gradient_floats * 4;
    part_floats = plan.blocks * plan.rows * kPartStride;
    barriers = parts + 2 * part_floats * 4;
    bytes = barriers + 2 * static_cast<int>(sizeof(ArrivalBarrier));
  }
};

using Backward = Launch<RnnBackward<float>, float>;

template <int kResident, int kRows>
__global__ void __launch_bounds__(kWarps* kWarp, 1) backward(const __grid_constant__ Backward launch) {
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
  const int slice = thread_index() % kSlices;
  const int own_unit = thread_index() / kSlices;
  const int unit = rank * kUnits + own_unit;
  const int row_of_slice = slice / (kSlices / kRows);
  const bool owner = slice % (kSlices / kRows) == 0;
  const int row = place.first_row + row_of_slice;
  const bool there = owner && unit < H && row < B;

  unsigned char* const shared = shared_memory();
  auto* const overflow = reinterpret_cast<float4*>(shared + memory.weights) + thread_index();
  auto* const all_gradients = reinterpret_cast<float*>(shared + memory.gradients);
  auto* const parts = reinterpret_cast<float*>(shared + memory.parts);
  auto* const barriers = reinterpret_cast<ArrivalBarrier*>(shared + memory.barriers);

  // The weights, once: of tile i, four units of h by the gate k = slice + 8 step, which is gate k / kUnits of own unit
  // k % kUnits.
  const float* const w_hh = place.weights->w_hh;
  const auto first_unit = [&](int i) { return 16 * (warp + i * kWarps) + thread_index() % kWarp / kSlices * 4; };
  const auto load_weights = [&](float (&w)[4], int i, int step) {
    const int k = slice + step * kSlices;
    const int from = rank * kUnits + k % kUnits;
    const float* const at = w_hh + (k / kUnits * H + from) * H + first_unit(i);
#pragma unroll
    for (int q = 0; q < 4; ++q) w[q] = from < H && first_unit(i) + q < H ? at[q] : 0.0F;
  };
  float w[kResident][kSteps][4];
#pragma unroll
  for (int i = 0; i < kResident; ++i) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_weights(w[i][step], i, step);
  }
  for (int i = kResident; warp + i * kWarps < memory.tiles; ++i) {
    for (int step = 0; step < kSteps; ++step) {
      float four[4];
      load_weights(four, i, step);
      overflow[((i - kResident) * kSteps + step) * kWarps * kWarp] = float4{four[0], four[1], four[2], four[3]};
    }
  }

  // The gradients of the last states, and c before each sequence's first step.
  const int64_t state = (g * B + row) * H + unit;
  float grad_h = there && args.grad_h_n != nullptr ? args.grad_h_n[state] : 0.0F;
  float grad_c = there && args.grad_c_n != nullptr ? args.grad_c_n[state] : 0.0F;
  const float c0 = there && args.c0 != nullptr ? args.c0[state] : 0.0F;

  TimeLoop loop(shape, place.first_row, !place.weights->reverse);
  const int steps = loop.steps();
  const auto bytes = static_cast<uint32_t>(plan.units() * kRows * 4);
  if (thread_index() == 0) Arrivals::start(barriers, steps, bytes);
  sync_cluster();

  const auto load_next = [&](Reserve& reserve) {
    load_reserve(reserve, args, g, loop.token() + row, unit, there && row < loop.sequences());
  };
  const auto load_c = [&] { return load_cell(args, g, loop.token() + row, unit, there && row < loop.sequences(), c0); };
  // What was sent during step s is the gradient of h before that step.
  bool active = false;
  const auto receive = [&](int s) {
    Arrivals::wait(barriers, s, steps, bytes);
    const float* const part = parts + s % 2 * memory.part_floats + row_of_slice * kPartStride + own_unit;
    float sum = 0.0F;
    for (int from = 0; from < plan.blocks; ++from) sum += part[from * kRows * kPartStride];
    if (active) grad_h = sum;
  };

  // c is loaded a step sooner than all else, since a step needs c before it, too.
  Reserve next{};
  float next_c = 0.0F;
  float c_behind = c0;  // of the step behind the next one
  int64_t next_token = 0;
  if (steps > 0) {
    next_token = loop.token() + row;
    load_next(next);
    next_c = load_c();
  }
  if (steps > 1) {
    loop.advance();
    c_behind = load_c();
  }

  for (int s = 0; s < steps; ++s) {
    const int64_t token = next_token;
    const Reserve reserve = next;
    const float c = next_c;
    next_c = c_behind;
    c_behind = c0;
    if (s + 1 < steps) {  // while this step computes
      next_token = loop.token() + row;
      load_next(next);
    }
    if (s + 2 < steps) {
      loop.advance();
      c_behind = load_c();
    }
    if (s > 0) receive(s - 1);

    // Two in turn: a warp may still multiply by those of the step before, since what it sends then goes to other
    // blocks.
    float* const gradients = all_gradients + s % 2 * memory.gradient_floats;
    active = reserve.active;
    float grads[4] = {};
    if (active) {
      gate_gradients(grads, reserve, c, next_c, grad_h, grad_c);
      float* const at = args.grad_gates + (token * G + g) * 4 * H + unit;
#pragma unroll
      for (int q = 0; q < 4; ++q) at[q * H] = grads[q];
    }
    if (owner) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        gradients[operand_index<kRows>(q * kUnits + own_unit, row_of_slice, kGates)] = grads[q];
      }
    }
    sync_threads();

    const uint32_t barrier = shared_address(&barriers[s % 2]);
    const auto send_tile = [&](int i, const float (&acc)[4][kRows]) {
      float sums[4];
      add_slices(sums, acc, slice);
      const int to = first_unit(i) / kUnits;
      const float* const at = parts + s % 2 * memory.part_floats + (rank * kRows + row_of_slice) * kPartStride;
      if (!owner) return;
      const uint32_t target = address_in(shared_address(at + first_unit(i) % kUnits), to);
      const uint32_t arrival = address_in(barrier, to);
      send(target, sums, arrival);
    };
#pragma unroll
    for (int i = 0; i < kResident; ++i) {
      if (warp + i * kWarps >= memory.tiles) continue;
      float acc[4][kRows] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        float rows[kRows];
        load_operand(rows, gradients, slice + step * kSlices, kGates);
        multiply_add(acc, w[i][step], rows);
      }
      send_tile(i, acc);
    }
    for (int i = kResident; warp + i * kWarps < memory.tiles; ++i) {
      float acc[4][kRows] = {};
#pragma unroll 4
      for (int step = 0; step < kSteps; ++step) {
        const float4 four = overflow[((i - kResident) * kSteps + step) * kWarps * kWarp];
        float rows[kRows];
        load_operand(rows, gradients, slice + step * kSlices, kGates);
        multiply_add(acc, {four.x, four.y, four.z, four.w}, rows);
      }
      send_tile(i, acc);
    }
  }
  if (steps > 0) receive(steps - 1);

  if (there && args.grad_h0 != nullptr) args.grad_h0[state] = grad_h;
  if (there && args.grad_c0 != nullptr) args.grad_c0[state] = grad_c;
  sync_cluster();  // no block leaves while another sends to it
}

template <int kResident, int kRows>
ClusterKernel<Backward> kernel(const Plan& plan) {
  return {backward<kResident, kRows>, kWarps * kWarp, Memory(plan, kResident).bytes};
}

ClusterKernel<Backward> kernel_for(const Plan& plan) {
  return with_least<1, 2, 4, 8>(plan.rows, [&]<int kRows>() {
    return plan.units() <= 16 * kWarps ? kernel<1, kRows>(plan) : kernel<2, kRows>(plan);
  });
}

}  // namespace

template <>
int backward_clusters_at_once<float>(const Plan& plan) {
  return clusters_at_once(kernel_for(plan), plan);
}

template <>
void run_backward(const RnnBackward<float>& args, const Plan& plan, Stream stream) {
  run_on_clusters(kernel_for(plan), args, plan, stream);
}

}  // namespace pymtl::cuda
