// The forward recurrence in float with products in TF32, on tensor cores: gates [4H, rows] = W_hh [4H, H] h [H, rows].
//
// A warp owns 4 units: 16 rows of W_hh in one tile, rows i and f of unit u in its rows u and u + 8, g and o in u + 4
// and u + 12. So a thread (lane 4 r + j) has two gates of unit r % 4 for the rows 2j and 2j + 1 of the batch, and the
// thread 16 lanes on or back the other two: they exchange, and each ends up with one cell, of row 2j or of 2j + 1. The
// first kResident tiles along k are in registers for the whole sequence, the others in shared memory. h stands in
// shared memory as the instruction takes it: [tiles][rows / 8][2][lane], so that what a warp sends is one piece of
// 128 bytes.
#include "kernels/cuda/rnn/launch.h"
#include "kernels/cuda/rnn/plans.h"

namespace pymtl::cuda {
namespace {

// The offsets of a block's shared memory, in bytes.
struct Memory {
  int tiles;     // along k, of 8 units: all that there are, and at least those in registers
  int h_words;   // of one of the two buffers
  int weights;   // [tiles - kResident][warps][lane] fragments of 16 bytes
  int barriers;  // two
  int bytes;

  __host__ __device__ Memory(const Plan& plan, int resident) {
    tiles = plan.units() / 8 > resident ? plan.units() / 8 : resident;
    h_words = tiles * 8 * plan.rows;
    weights = 2 * h_words * 4;
    barriers = weights + (tiles - resident) * plan.threads() * 16;
    bytes = barriers + 2 * static_cast<int>(sizeof(ArrivalBarrier));
  }
};

using Forward = Launch<RnnForward<float>, float>;

template <int kResident, int kColumns>
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
  const int lane = thread_index() % kWarp;
  const int r = lane / 4;
  const int j = lane % 4;
  const int tile = rank * plan.warps + thread_index() / kWarp;  // of this warp's units
  const bool upper = r >= 4;
  const int own_row = 2 * j + (upper ? 1 : 0);  // of each column of 8
  const int64_t unit = 4 * tile + r % 4;

  unsigned char* const shared = shared_memory();
  auto* const buffers = reinterpret_cast<uint32_t*>(shared);
  auto* const overflow = reinterpret_cast<uint4*>(shared + memory.weights) + thread_index();
  auto* const barriers = reinterpret_cast<ArrivalBarrier*>(shared + memory.barriers);

  // The weights, once.
  const auto load_weights = [&](uint32_t (&a)[4], int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t gate = (upper ? 2 : 0) + i % 2;
      const int64_t column = 8 * k + i / 2 * 4 + j;
      const bool there = unit < H && column < H;
      a[i] = rounded_to_tf32(there ? place.weights->w_hh[(gate * H + unit) * H + column] : 0.0F);
    }
  };
  uint32_t w[kResident][4];
#pragma unroll
  for (int k = 0; k < kResident; ++k) load_weights(w[k], k);
  for (int k = kResident; k < memory.tiles; ++k) {
    uint32_t a[4];
    load_weights(a, k);
    overflow[(k - kResident) * block_threads()] = uint4{a[0], a[1], a[2], a[3]};
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
  for (int i = thread_index(); i < memory.h_words; i += block_threads()) {
    const int64_t row = place.first_row + i / (2 * kWarp) % kColumns * 8 + i % kWarp / 4;
    const int64_t column = i / (2 * kWarp) / kColumns * 8 + i / kWarp % 2 * 4 + i % 4;
    const bool known = args.h0 != nullptr && row < B && column < H;
    buffers[memory.h_words + i] = rounded_to_tf32(known ? args.h0[(g * B + row) * H + column] : 0.0F);
    if (column >= plan.units()) buffers[i] = 0;
  }
  float h[kColumns];
  float c[kColumns];
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const int64_t row = place.first_row + column * 8 + own_row;
    const int64_t state = (g * B + row) * H + unit;
    const bool there = row < B && unit < H;
    h[column] = there && args.h0 != nullptr ? args.h0[state] : 0.0F;
    c[column] = there && args.c0 != nullptr ? args.c0[state] : 0.0F;
  }

  TimeLoop loop(shape, place.first_row, place.weights->reverse);
  const int steps = loop.steps();
  const auto bytes = static_cast<uint32_t>(plan.units() * plan.rows * 4);
  if (thread_index() == 0) Arrivals::start(barriers, steps - 1, bytes);
  sync_cluster();

  // What the input gives to this thread's cells at a step.
  const auto load_projected = [&](float (&gates)[kColumns][4]) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const int row = place.first_row + column * 8 + own_row;
      const bool there = row < loop.sequences() && unit < H;
      const float* const at = args.projected + ((loop.token() + row) * G + g) * 4 * H + unit;
#pragma unroll
      for (int q = 0; q < 4; ++q) gates[column][q] = there ? at[q * H] : 0.0F;
    }
  };
  float next[kColumns][4];
  if (steps > 0) load_projected(next);

  for (int s = 0; s < steps; ++s) {
    const int sequences = loop.sequences();
    const int64_t token = loop.token();
    float gates[kColumns][4];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll
      for (int q = 0; q < 4; ++q) gates[column][q] = next[column][q] + bias[q];
    }
    if (s + 1 < steps) {
      loop.advance();
      load_projected(next);  // while this step computes
    }

    if (s > 0) Arrivals::wait(barriers, s - 1, steps - 1, bytes);
    const uint32_t* const h_before = buffers + (s + 1) % 2 * memory.h_words + lane;
    // [chain]: of sums that depend on nothing of each other four hide each other's latency.
    constexpr int kChains = 4 / kColumns;
    float acc[kChains][kColumns][4] = {};
    const auto multiply = [&](int k, const uint32_t (&a)[4], int chain) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const uint32_t* const b = h_before + (k * kColumns + column) * 2 * kWarp;
        multiply_tile_tf32(acc[chain][column], a, b[0], b[kWarp]);
      }
    };
#pragma unroll
    for (int k = 0; k < kResident; ++k) multiply(k, w[k], k % kChains);
    for (int k = kResident; k < memory.tiles; k += 4) {  // there are 4 tiles to a block
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 a = overflow[(k - kResident + i) * block_threads()];
        multiply(k + i, {a.x, a.y, a.z, a.w}, i % kChains);
      }
    }

    const int fragment = (tile / 2 * kColumns * 2 + tile % 2) * kWarp + 4 * own_row + r % 4;
    const uint32_t target = shared_address(buffers + s % 2 * memory.h_words + fragment);
    const uint32_t barrier = shared_address(&barriers[s % 2]);
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      float (&sums)[4] = acc[0][column];
#pragma unroll
      for (int chain = 1; chain < kChains; ++chain) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[e] += acc[chain][column][e];
      }
      const float first = shuffle_xor(upper ? sums[0] : sums[1], 16);
      const float second = shuffle_xor(upper ? sums[2] : sums[3], 16);
      const float i = sigmoid(gates[column][0] + (upper ? first : sums[0]));
      const float f = sigmoid(gates[column][1] + (upper ? second : sums[2]));
      const float g_ = hyperbolic_tangent(gates[column][2] + (upper ? sums[1] : first));
      const float o = sigmoid(gates[column][3] + (upper ? sums[3] : second));
      const int row = place.first_row + column * 8 + own_row;
      const bool active = row < sequences && unit < H;
      if (active) {
        c[column] = f * c[column] + i * g_;
        h[column] = o * hyperbolic_tangent(c[column]);
      }
      if (s + 1 < steps) {
        const uint32_t rounded = rounded_to_tf32(h[column]);
        for (int block = 0; block < plan.blocks; ++block) {
          const int to = rank + block < plan.blocks ? rank + block : rank + block - plan.blocks;
          send(address_in(target + column * 2 * kWarp * 4, to), rounded, address_in(barrier, to));
        }
      }
      if (!active) continue;
      args.output[(token + row) * G * H + g * H + unit] = h[column];
      if (args.gates != nullptr) {
        float* const at = args.gates + (g * shape.tokens + token + row) * 4 * H + unit;
        at[0] = i;
        at[H] = f;
        at[2 * H] = g_;
        at[3 * H] = o;
        args.cells[(g * shape.tokens + token + row) * H + unit] = c[column];
      }
    }
  }

#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const int64_t row = place.first_row + column * 8 + own_row;
    if (row >= B || unit >= H) continue;
    args.h_n[(g * B + row) * H + unit] = h[column];
    args.c_n[(g * B + row) * H + unit] = c[column];
  }
  sync_cluster();  // no block leaves while another sends to it
}

template <int kResident, int kColumns>
ClusterKernel<Forward> kernel(const Plan& plan) {
  return {forward<kResident, kColumns>, plan.threads(), Memory(plan, kResident).bytes};
}

ClusterKernel<Forward> kernel_for(const Plan& plan) {
  return with_least<1, 2, 4>(plan.rows / 8, [&]<int kColumns>() {
    return with_least<64, 128, 192, 256>(plan.units(),
                                         [&]<int kUnits>() { return kernel<kUnits / 8, kColumns>(plan); });
  });
}

}  // namespace

int forward_clusters_at_once_tf32(const Plan& plan) { return clusters_at_once(kernel_for(plan), plan); }

void run_forward_tf32(const RnnForward<float>& args, const Plan& plan, Stream stream) {
  run_on_clusters(kernel_for(plan), args, plan, stream);
}

}  // namespace pymtl::cuda
