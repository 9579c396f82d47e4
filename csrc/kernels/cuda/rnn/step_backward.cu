#include "kernels/cuda/rnn/step_cells.h"

namespace pymtl::cuda {
namespace {

template <typename T>
struct Step {
  RnnStepBackward<T> args;
  int64_t step;
  int64_t reserve;    // blocks of H numbers that a token keeps
  int64_t gradients;  // blocks of H numbers of its gradient
};

// The gradient of h after this step, without that of the output: what the next step passed on beside the product with
// W_hh, plus what came through that product.
template <typename T>
__device__ __forceinline__ Accum<T> gradient_of_h(const RnnStepBackward<T>& args, int64_t state, int64_t product) {
  const Accum<T> through = args.product[product];
  const bool drops = args.masks.dropout != nullptr;
  return args.grad_h[state] + (drops ? through * to_accum(args.masks.dropout[state]) : through);
}

template <typename T, typename Cell, bool kNormalised>
__global__ void __launch_bounds__(kStepThreads) backward(const __grid_constant__ Step<T> launched) {
  using R = Accum<T>;
  constexpr int kGates = Cell::kGates;
  const RnnStepBackward<T>& args = launched.args;
  const RnnMasks<T>& masks = args.masks;
  const int64_t H = args.at.hidden_size;
  const int64_t G = args.at.recurrences;
  const StepPlace place = place_of(args.at, block_index(), launched.step);
  if (place.token < 0) return;
  const int64_t width = place.recurrence * H;
  const int64_t output = place.token * G * H + width;
  const int64_t of_token = place.recurrence * args.at.tokens + place.token;
  const T* const reserve = args.gates + of_token * launched.reserve * H;
  T* const grads = args.grad_gates + (place.token * G + place.recurrence) * launched.gradients * H;

  const auto values_of = [&](int64_t unit, R(&values)[Cell::kValues]) {
    if constexpr (kKeepsCandidate<Cell>) {
      const bool zoned = masks.zoneout_h != nullptr;
      values[0] =
          to_accum(zoned ? reserve[kReserveCandidate<Cell, kNormalised> * H + unit] : args.output[output + unit]);
    } else {
#pragma unroll
      for (int i = 0; i < Cell::kValues; ++i) values[i] = to_accum(reserve[i * H + unit]);
    }
  };
  const auto h_before = [&](int64_t unit) {
    if (place.before < 0) return real_or_zero(args.h0, place.state * H + unit);
    return to_accum(args.output[place.before * G * H + width + unit]);
  };
  const auto c_before = [&](int64_t unit) {
    if (place.before < 0) return real_or_zero(args.c0, place.state * H + unit);
    return args.cells[(place.recurrence * args.at.tokens + place.before) * H + unit];
  };
  const auto zoneout = [&](const T* factors, int64_t stride, int64_t unit) {
    return real_or_zero(factors, place.token * stride + width + unit);
  };
  // The cell's share of the gradients of h and c, and what zoneout lets pass by it.
  struct Above {
    R dh, beside_h, dc, beside_c;
  };
  const auto above = [&](int64_t unit) {
    const int64_t state = place.state * H + unit;
    const R dh = gradient_of_h(args, state, place.row * H + unit) + real_or_zero(args.grad_output, output + unit);
    const R d_h = zoneout(masks.zoneout_h, masks.zoneout_h_stride, unit);
    Above shares{(R(1) - d_h) * dh, d_h * dh, 0, 0};
    if constexpr (Cell::kHasCell) {
      const R dc = args.grad_c[state];
      const R d_c = zoneout(masks.zoneout_c, masks.zoneout_c_stride, unit);
      shares.dc = (R(1) - d_c) * dc;
      shares.beside_c = d_c * dc;
    }
    return shares;
  };

  // Of a normalised LSTM: of what its c was before any zoneout.
  Moments<R> of_c{};
  R mean_of_u = 0;
  R mean_of_product = 0;
  const auto candidate = [&](int64_t unit) {
    R values[Cell::kValues];
    values_of(unit, values);
    return Cell::cell(values, c_before(unit));
  };
  const auto squashed_normal = [&](int64_t unit, R normal) {
    const R sum = to_accum(args.norm.g_c[width + unit]) * normal + real_or_zero(args.norm.b_c, width + unit);
    return exact_hyperbolic_tangent(sum);
  };
  if constexpr (kNormalised && Cell::kHasCell) {
    of_c = moments_of<R>(H, candidate);
    R sum = 0;
    R product = 0;
    for (int64_t unit = thread_index(); unit < H; unit += block_threads()) {
      const R normal = of_c.normalised(candidate(unit));
      const R squashed = squashed_normal(unit, normal);
      const R dy = above(unit).dh * to_accum(reserve[3 * H + unit]) * slope_of_tanh(squashed);
      const R u = dy * to_accum(args.norm.g_c[width + unit]);
      grads[(Cell::kGradients + 2 * kGates) * H + unit] = from_accum<T>(dy * normal);
      grads[(Cell::kGradients + 2 * kGates + 1) * H + unit] = from_accum<T>(dy);
      sum += u;
      product += u * normal;
    }
    mean_of_u = sum_over_block(sum) / static_cast<R>(H);
    mean_of_product = sum_over_block(product) / static_cast<R>(H);
  }

  T* const operand = args.operand + place.row * kGates * H;
  for (int64_t unit = thread_index(); unit < H; unit += block_threads()) {
    const int64_t state = place.state * H + unit;
    R values[Cell::kValues];
    values_of(unit, values);
    const Above shares = above(unit);
    Unit<R> of_unit{0, 0, h_before(unit), shares.dh, shares.dc};
    if constexpr (Cell::kHasCell) {
      of_unit.c_before = c_before(unit);
      const R o = values[3];
      if constexpr (kNormalised) {
        const R normal = of_c.normalised(Cell::cell(values, of_unit.c_before));
        of_unit.squashed = squashed_normal(unit, normal);
        const R u = shares.dh * o * slope_of_tanh(of_unit.squashed) * to_accum(args.norm.g_c[width + unit]);
        of_unit.dc += of_c.gradient(u, normal, mean_of_u, mean_of_product);
      } else {
        const bool zoned = masks.zoneout_c != nullptr;
        of_unit.squashed =
            exact_hyperbolic_tangent(zoned ? Cell::cell(values, of_unit.c_before) : args.cells[of_token * H + unit]);
        of_unit.dc += shares.dh * o * slope_of_tanh(of_unit.squashed);
      }
      args.grad_c[state] = of_unit.dc * values[1] + shares.beside_c;
    }
    args.grad_h[state] = Cell::carried(values, shares.dh) + shares.beside_h;
    if (args.before != nullptr) {
      const R factor = masks.dropout != nullptr ? to_accum(masks.dropout[state]) : R(1);
      args.before[output + unit] = from_accum<T>(of_unit.h_before * factor);
    }
    R of_gates[Cell::kGradients];
    Cell::gradients(values, of_unit, of_gates);
#pragma unroll
    for (int i = 0; i < Cell::kGradients; ++i) {
      const T rounded = from_accum<T>(of_gates[i]);
      grads[i * H + unit] = rounded;
      if (!kNormalised && i >= Cell::kFirstHidden) operand[(i - Cell::kFirstHidden) * H + unit] = rounded;
    }
  }

  if constexpr (kNormalised) {
    // With u = g da for a normalised sum: dg = da normal, and the sum's gradient follows from u.
    const T* const sums = reserve + kReserveSums<Cell> * H;
    const T* const of_gates = grads + Cell::kFirstHidden * H;
    T* const of_sums = grads + Cell::kGradients * H;
    T* const of_gain = of_sums + kGates * H;
    const T* const gain = args.norm.g_hh + place.recurrence * kGates * H;
    const int64_t numbers = kGates * H;
    sync_threads();  // gradients of other threads are read
    const Moments<R> moments = moments_of<R>(numbers, [&](int64_t k) { return to_accum(sums[k]); });
    R sum = 0;
    R product = 0;
    for (int64_t k = thread_index(); k < numbers; k += block_threads()) {
      const R normal = moments.normalised(to_accum(sums[k]));
      const R da = to_accum(of_gates[k]);
      const R u = da * to_accum(gain[k]);
      of_gain[k] = from_accum<T>(da * normal);
      sum += u;
      product += u * normal;
    }
    const R mean = sum_over_block(sum) / static_cast<R>(numbers);
    const R slope = sum_over_block(product) / static_cast<R>(numbers);
    for (int64_t k = thread_index(); k < numbers; k += block_threads()) {
      const R normal = moments.normalised(to_accum(sums[k]));
      const R u = to_accum(of_gates[k]) * to_accum(gain[k]);
      const T rounded = from_accum<T>(moments.gradient(u, normal, mean, slope));
      of_sums[k] = rounded;
      operand[k] = rounded;
    }
  }
}

template <typename T>
struct Initial {
  RnnStepBackward<T> args;
  T* grad_h0;
};

template <typename T>
__global__ void initial_gradient(const __grid_constant__ Initial<T> launched) {
  const RnnSteps& at = launched.args.at;
  const int64_t first = at.first * at.batch * at.hidden_size;
  const int64_t stride = block_count() * block_threads();
  for (int64_t k = block_index() * block_threads() + thread_index(); k < at.count * at.batch * at.hidden_size;
       k += stride) {
    launched.grad_h0[first + k] = from_accum<T>(gradient_of_h(launched.args, first + k, k));
  }
}

}  // namespace

template <typename T>
void rnn_step_backward(const RnnStepBackward<T>& args, int64_t step, void* stream) {
  with_cell(args.at.cell, [&]<typename Cell, bool kNormalised>() {
    const CellSizes& sizes = sizes_of(args.at.cell);
    launch(backward<T, Cell, kNormalised>, grid_of_step(args.at), static_cast<Stream>(stream),
           Step<T>{args, step, sizes.reserve_with(args.masks.zoneout_h != nullptr), sizes.gradients});
  });
}

template <typename T>
void rnn_step_initial_gradient(const RnnStepBackward<T>& args, T* grad_h0, void* stream) {
  const int64_t numbers = args.at.count * args.at.batch * args.at.hidden_size;
  launch(initial_gradient<T>, grid_of_rows((numbers + kWarp - 1) / kWarp), static_cast<Stream>(stream),
         Initial<T>{args, grad_h0});
}

#define PYMTL_INSTANTIATE(T)                                                  \
  template void rnn_step_backward(const RnnStepBackward<T>&, int64_t, void*); \
  template void rnn_step_initial_gradient(const RnnStepBackward<T>&, T*, void*);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(double)
PYMTL_INSTANTIATE(BFloat16)
PYMTL_INSTANTIATE(Float16)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl::cuda
