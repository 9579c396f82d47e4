#include "kernels/cuda/rnn/step_cells.h"

namespace pymtl::cuda {
namespace {

template <typename T>
struct Step {
  RnnStepForward<T> args;
  int64_t step;
  int64_t reserve;  // blocks of H numbers that a token keeps
};

template <typename T, typename Cell, bool kNormalised>
__global__ void __launch_bounds__(kStepThreads) forward(const __grid_constant__ Step<T> launched) {
  using R = Accum<T>;
  constexpr int kGates = Cell::kGates;
  const RnnStepForward<T>& args = launched.args;
  const int64_t H = args.at.hidden_size;
  const StepPlace place = place_of(args.at, block_index(), launched.step);
  if (place.token < 0) return;
  const int64_t output = (place.token * args.at.recurrences + place.recurrence) * H;
  const R* const projected = args.projected + output * kGates;
  R* const sums = args.sums + place.row * kGates * H;
  const int64_t of_recurrence = place.recurrence * kGates * H;
  const int64_t of_token = place.recurrence * args.at.tokens + place.token;
  T* const reserve = args.gates == nullptr ? nullptr : args.gates + of_token * launched.reserve * H;

  const auto give = [&](int64_t unit, const R(&values)[Cell::kValues], R squashed, R c_before, R c) {
    const int64_t state = place.state * H + unit;
    const R h_before = to_accum(args.h[state]);
    R h = Cell::hidden(values, squashed, h_before);
    if (args.masks.zoneout_h != nullptr) {
      if (kKeepsCandidate<Cell> && reserve != nullptr)
        reserve[kReserveCandidate<Cell, kNormalised> * H + unit] = from_accum<T>(h);
      const int64_t at = place.token * args.masks.zoneout_h_stride + place.recurrence * H + unit;
      h = mixed(to_accum(args.masks.zoneout_h[at]), h_before, h);
    }
    const T rounded = from_accum<T>(h);
    args.h[state] = rounded;
    args.output[output + unit] = rounded;
    if (args.operand != nullptr) {
      args.operand[state] = from_accum<T>(to_accum(rounded) * to_accum(args.masks.dropout[state]));
    }
    if constexpr (Cell::kHasCell) {
      if (args.masks.zoneout_c != nullptr) {
        const int64_t at = place.token * args.masks.zoneout_c_stride + place.recurrence * H + unit;
        c = mixed(to_accum(args.masks.zoneout_c[at]), c_before, c);
      }
      args.c[state] = c;
      if (args.cells != nullptr) args.cells[of_token * H + unit] = c;
    }
  };

  Moments<R> of_sums{};
  if constexpr (kNormalised) of_sums = moments_of<R>(kGates * H, [&](int64_t k) { return sums[k]; });
  for (int64_t unit = thread_index(); unit < H; unit += block_threads()) {
    R x[kGates];
    R q[kGates];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const int64_t k = gate * H + unit;
      q[gate] = sums[k];
      if constexpr (kNormalised) {
        if (reserve != nullptr) reserve[kReserveSums<Cell> * H + k] = to_keep<T>(q[gate]);
        q[gate] = to_accum(args.norm.g_hh[of_recurrence + k]) * of_sums.normalised(q[gate]);
      }
      x[gate] = projected[k] + real_or_zero(args.b_ih, of_recurrence + k);
      q[gate] += real_or_zero(args.b_hh, of_recurrence + k);
    }
    R values[Cell::kValues];
    Cell::values(x, q, values);
    if (reserve != nullptr) {
#pragma unroll
      for (int i = 0; i < Cell::kReserve; ++i) reserve[i * H + unit] = to_keep<T>(values[i]);
    }
    if constexpr (!Cell::kHasCell) {
      give(unit, values, R(0), R(0), R(0));
    } else {
      const R c_before = args.c[place.state * H + unit];
      const R c = Cell::cell(values, c_before);
      if constexpr (kNormalised) {  // h has to wait for all of c
        sums[unit] = c;
        sums[H + unit] = values[3];
      } else {
        give(unit, values, exact_hyperbolic_tangent(c), c_before, c);
      }
    }
  }

  if constexpr (kNormalised && Cell::kHasCell) {
    const Moments<R> of_c = moments_of<R>(H, [&](int64_t k) { return sums[k]; });  // a thread reads what it wrote
    for (int64_t unit = thread_index(); unit < H; unit += block_threads()) {
      const int64_t k = place.recurrence * H + unit;
      const R c = sums[unit];
      const R values[4] = {0, 0, 0, sums[H + unit]};
      const R normal = to_accum(args.norm.g_c[k]) * of_c.normalised(c) + real_or_zero(args.norm.b_c, k);
      give(unit, values, exact_hyperbolic_tangent(normal), args.c[place.state * H + unit], c);
    }
  }
}

}  // namespace

template <typename T>
void rnn_step_forward(const RnnStepForward<T>& args, int64_t step, void* stream) {
  with_cell(args.at.cell, [&]<typename Cell, bool kNormalised>() {
    const int64_t reserve = sizes_of(args.at.cell).reserve_with(args.masks.zoneout_h != nullptr);
    launch(forward<T, Cell, kNormalised>, grid_of_step(args.at), static_cast<Stream>(stream),
           Step<T>{args, step, reserve});
  });
}

template void rnn_step_forward(const RnnStepForward<float>&, int64_t, void*);
template void rnn_step_forward(const RnnStepForward<double>&, int64_t, void*);
template void rnn_step_forward(const RnnStepForward<BFloat16>&, int64_t, void*);
template void rnn_step_forward(const RnnStepForward<Float16>&, int64_t, void*);

}  // namespace pymtl::cuda
