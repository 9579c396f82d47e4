// The forward recurrence in float: gates [4H, rows] = W_hh [4H, H] h [H, rows].
//
// A warp owns 4 units, the four rows of the matrix that a thread multiplies are the gates of one. The first kResident
// of its weights along k, four by four, are in registers for the whole sequence, the others in shared memory.
#include "kernels/cuda/rnn/fma.h"
#include "kernels/cuda/rnn/launch.h"
#include "kernels/cuda/rnn/plans.h"

namespace pymtl::cuda {
namespace {

// The offsets of a block's shared memory, in bytes.
struct Memory {
  int k_size;    // of h: units, and as many more as the registers' weights reach
  int h_floats;  // of one of the two buffers
  int weights;   // [k_size / kSlices - kResident][warps][lane] four gates
  int barriers;  // two
  int bytes;

  __host__ __device__ Memory(const Plan& plan, int resident) {
    k_size = plan.units() > resident * kSlices ? plan.units() : resident * kSlices;
    h_floats = k_size * plan.rows;
    weights = 2 * h_floats * 4;
    barriers = weights + (k_size / kSlices - resident) * plan.threads() * 16;
    bytes = barriers + 2 * static_cast<int>(sizeof(ArrivalBarrier));
  }
};

using Forward = Launch<RnnForward<float>, float>;

template <int kResident, int kRows>
__global__ void __launch_bounds__(256, 1) forward(const __grid_constant__ Forward launch) {
  const RnnForward<float>& args = launch.args;
  const RnnShape& shape = args.shape;
  const Plan& plan = launch.plan;
  const Place place(launch);
  const Memory memory(plan, kResident);
  const int64_t G = shape.recurrences;
  const int64_t B = shape.batch;
  const int64_t H = shape.hidden_size;
  const int64_t g = place.g;
  const int rank = cluster_rank();
  const int slice = thread_index() % kSlices;
  const int unit = rank * plan.units_of_block() + thread_index() / kSlices;
  const int row_of_slice = slice / (kSlices / kRows);
  const bool owner = slice % (kSlices / kRows) == 0;
  const int row = place.first_row + row_of_slice;
  const bool there = owner && unit < H && row < B;

  unsigned char* const shared = shared_memory();
  auto* const buffers = reinterpret_cast<float*>(shared);
  auto* const overflow = reinterpret_cast<float4*>(shared + memory.weights) + thread_index();
  auto* const barriers = reinterpret_cast<ArrivalBarrier*>(shared + memory.barriers);

  // The weights, once.
  const float* const w_hh = place.weights->w_hh;
  const auto load_weights = [&](float (&w)[4], int i) {
    const int k = slice + i * kSlices;
#pragma unroll
    for (int q = 0; q < 4; ++q) w[q] = unit < H && k < H ? w_hh[(q * H + unit) * H + k] : 0.0F;
  };
  float w[kResident][4];
#pragma unroll
  for (int i = 0; i < kResident; ++i) load_weights(w[i], i);
  const int k_steps = memory.k_size / kSlices;
  for (int i = kResident; i < k_steps; ++i) {
    float four[4];
    load_weights(four, i);
    overflow[(i - kResident) * block_threads()] = float4{four[0], four[1], four[2], four[3]};
  }
  float bias[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    bias[q] = 0.0F;
    if (unit < H && place.weights->b_ih != nullptr) bias[q] = place.weights->b_ih[q * H + unit];
    if (unit < H && place.weights->b_hh != nullptr) bias[q] += place.weights->b_hh[q * H + unit];
  }

  // The state before the first step: h of all units into the buffer that step 0 reads, own h and c into registers.
  // What no unit sends must be zero in both.
  for (int i = thread_index(); i < memory.k_size * kRows; i += block_threads()) {
    const int k = i % memory.k_size;
    const int64_t of_row = place.first_row + i / memory.k_size;
    const bool known = args.h0 != nullptr && of_row < B && k < H;
    const int at = operand_index<kRows>(k, i / memory.k_size, memory.k_size);
    buffers[memory.h_floats + at] = known ? args.h0[(g * B + of_row) * H + k] : 0.0F;
    if (k >= plan.units()) buffers[at] = 0.0F;
  }
  const int64_t state = (g * B + row) * H + unit;
  float h = there && args.h0 != nullptr ? args.h0[state] : 0.0F;
  float c = there && args.c0 != nullptr ? args.c0[state] : 0.0F;

  TimeLoop loop(shape, place.first_row, place.weights->reverse);
  const int steps = loop.steps();
  const auto bytes = static_cast<uint32_t>(plan.units() * kRows * 4);
  if (thread_index() == 0) Arrivals::start(barriers, steps - 1, bytes);
  sync_cluster();

  const auto load_projected = [&](float (&gates)[4]) {
    const bool active = there && row < loop.sequences();
    const float* const at = args.projected + ((loop.token() + row) * G + g) * 4 * H + unit;
#pragma unroll
    for (int q = 0; q < 4; ++q) gates[q] = active ? at[q * H] : 0.0F;
  };
  float next[4];
  if (steps > 0) load_projected(next);

  for (int s = 0; s < steps; ++s) {
    const bool active = there && row < loop.sequences();
    const int64_t token = loop.token() + row;
    float gates[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) gates[q] = next[q] + bias[q];
    if (s + 1 < steps) {
      loop.advance();
      load_projected(next);  // while this step computes
    }

    if (s > 0) Arrivals::wait(barriers, s - 1, steps - 1, bytes);
    const float* const h_before = buffers + (s + 1) % 2 * memory.h_floats;
    float acc[4][kRows] = {};
#pragma unroll
    for (int i = 0; i < kResident; ++i) {
      float rows[kRows];
      load_operand(rows, h_before, slice + i * kSlices, memory.k_size);
      multiply_add(acc, w[i], rows);
    }
#pragma unroll 4
    for (int i = kResident; i < k_steps; ++i) {
      const float4 four = overflow[(i - kResident) * block_threads()];
      float rows[kRows];
      load_operand(rows, h_before, slice + i * kSlices, memory.k_size);
      multiply_add(acc, {four.x, four.y, four.z, four.w}, rows);
    }
    float sums[4];
    add_slices(sums, acc, slice);

    const float i = exact_sigmoid(gates[0] + sums[0]);
    const float f = exact_sigmoid(gates[1] + sums[1]);
    const float g_ = exact_hyperbolic_tangent(gates[2] + sums[2]);
    const float o = exact_sigmoid(gates[3] + sums[3]);
    if (active) {
      c = f * c + i * g_;
      h = o * exact_hyperbolic_tangent(c);
    }
    if (s + 1 < steps && owner) {
      const float* const target =
          buffers + s % 2 * memory.h_floats + operand_index<kRows>(unit, row_of_slice, memory.k_size);
      const uint32_t address = shared_address(target);
      const uint32_t barrier = shared_address(&barriers[s % 2]);
      for (int block = 0; block < plan.blocks; ++block) {
        const int to = rank + block < plan.blocks ? rank + block : rank + block - plan.blocks;
        send(address_in(address, to), h, address_in(barrier, to));
      }
    }
    if (!active) continue;
    args.output[token * G * H + g * H + unit] = h;
    if (args.gates != nullptr) {
      float* const at = args.gates + (g * shape.tokens + token) * 4 * H + unit;
      at[0] = i;
      at[H] = f;
      at[2 * H] = g_;
      at[3 * H] = o;
      args.cells[(g * shape.tokens + token) * H + unit] = c;
    }
  }
  if (there) {
    args.h_n[state] = h;
    args.c_n[state] = c;
  }
  sync_cluster();  // no block leaves while another sends to it
}

template <int kResident, int kRows>
ClusterKernel<Forward> kernel(const Plan& plan) {
  return {forward<kResident, kRows>, plan.threads(), Memory(plan, kResident).bytes};
}

ClusterKernel<Forward> kernel_for(const Plan& plan) {
  return with_least<64, 128, 192, 256>(plan.units(), [&]<int kUnits>() {
    return with_least<1, 2, 4, 8>(plan.rows, [&]<int kRows>() { return kernel<kUnits / 8, kRows>(plan); });
  });
}

}  // namespace

template <>
int forward_clusters_at_once<float>(const Plan& plan) {
  return clusters_at_once(kernel_for(plan), plan);
}

template <>
void run_forward(const RnnForward<float>& args, const Plan& plan, Stream stream) {
  run_on_clusters(kernel_for(plan), args, plan, stream);
}

}  // namespace pymtl::cuda
