// One step of a cell: what it makes of the sums of its gates, and of gradients on the way back (see kernels/rnn.h). A
// block works on one sequence of one recurrence, a thread on every block_threads()-th unit.
#pragma once

#include "kernels/cuda/rnn/activation.h"
#include "kernels/cuda/rnn_step.h"
#include "kernels/cuda/tokens.h"

namespace pymtl::cuda {

inline constexpr int kStepThreads = 256;  // of a block, or fewer

// Where a block works.
struct StepPlace {
  int64_t row;         // of these recurrences' sequences
  int64_t recurrence;  // g
  int64_t sequence;    // b
  int64_t state;       // the row of [G, B, ...]
  int64_t token;       // or -1: the sequence has none in this step
  int64_t before;      // the token before on the recurrence's way, or -1: there is the initial state
};

__device__ __forceinline__ StepPlace place_of(const RnnSteps& at, int64_t row, int64_t step) {
  const Tokens tokens{at.steps, at.batch, at.tokens, at.batch_sizes, at.ends};
  StepPlace place{row, at.first + row / at.batch, row % at.batch, 0, -1, -1};
  place.state = place.recurrence * at.batch + place.sequence;
  const bool reverse = (at.reverse >> (row / at.batch) & 1U) != 0;
  const auto token_at = [&](int64_t t) -> int64_t {
    if (t < 0 || t >= at.steps || place.sequence >= tokens.size(t)) return -1;
    const int64_t token = tokens.start(t) + place.sequence;
    return token < at.tokens ? token : -1;
  };
  const int64_t t = reverse ? at.steps - 1 - step : step;
  place.token = token_at(t);
  place.before = token_at(reverse ? t + 1 : t - 1);
  return place;
}

// The sum over all threads of the block. Every thread gets the result.
template <typename R>
__device__ __forceinline__ R sum_over_block(R value) {
  R* const of_warps = reinterpret_cast<R*>(shared_memory());
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (thread_index() % kWarp == 0) of_warps[thread_index() / kWarp] = value;
  sync_threads();
  R sum = 0;
  for (int warp = 0; warp < block_threads() / kWarp; ++warp) sum += of_warps[warp];
  sync_threads();
  return sum;
}

// Of some numbers: their mean, and 1 / sqrt(variance + epsilon).
template <typename R>
struct Moments {
  R mean;
  R scale;

  __device__ R normalised(R x) const { return (x - mean) * scale; }

  // The gradient of x, from the gradient u of `normal`, the normalised x, and the means of u and of u * normal.
  __device__ R gradient(R u, R normal, R mean_of_u, R mean_of_product) const {
    return (u - mean_of_u - normal * mean_of_product) * scale;
  }
};

// Of number(0) to number(count - 1); each thread asks for every block_threads()-th.
template <typename R, typename Number>
__device__ Moments<R> moments_of(int64_t count, const Number& number) {
  constexpr R kEpsilon = R(1e-5);
  R sum = 0;
  for (int64_t k = thread_index(); k < count; k += block_threads()) sum += number(k);
  const R mean = sum_over_block(sum) / static_cast<R>(count);
  R squares = 0;
  for (int64_t k = thread_index(); k < count; k += block_threads()) {
    const R apart = number(k) - mean;
    squares += apart * apart;
  }
  return {mean, R(1) / square_root(sum_over_block(squares) / static_cast<R>(count) + kEpsilon)};
}

// d before + (1 - d) now: one of them where d is 1 or 0, even if the other is infinite.
template <typename R>
__device__ __forceinline__ R mixed(R d, R before, R now) {
  if (d == R(1)) return before;
  if (d == R(0)) return now;
  return d * before + (R(1) - d) * now;
}

template <typename T>
__device__ __forceinline__ Accum<T> real_or_zero(const T* from, int64_t at) {
  return from == nullptr ? Accum<T>(0) : to_accum(from[at]);
}

// A number to keep for the backward pass. In float16 it is clamped to the largest finite number, which a sum may exceed
// although the cell that it belongs to is finite.
template <typename T>
__device__ __forceinline__ T to_keep(Accum<T> x) {
  if constexpr (std::is_same_v<T, Float16>) {
    constexpr float kLargest = 65504.0F;
    return from_accum<T>(x > kLargest ? kLargest : x < -kLargest ? -kLargest : x);
  } else {
    return from_accum<T>(x);
  }
}

// What a cell computes of a unit from x = W_ih x + b_ih and q = W_hh h + b_hh, or what stands for these:
// first its values, then c from these, then h from these and the squashed c.
// On the way back dh and dc are the gradients of that h and c, all of them; `grads` come in the order that
// kernels/rnn.h says, and what is left of dh beside them is carried on.
template <typename R>
struct Unit {
  R squashed;
  R c_before;
  R h_before;
  R dh;
  R dc;
};

struct LstmCell {
  static constexpr int kGates = 4;
  static constexpr int kValues = 4;   // i, f, g, o
  static constexpr int kReserve = 4;  // of the values
  static constexpr int kGradients = 4;
  static constexpr int kFirstHidden = 0;  // the first of the gradients that W_hh has a part in
  static constexpr bool kHasCell = true;

  template <typename R>
  __device__ static void values(const R (&x)[4], const R (&q)[4], R (&v)[4]) {
    v[0] = exact_sigmoid(x[0] + q[0]);
    v[1] = exact_sigmoid(x[1] + q[1]);
    v[2] = exact_hyperbolic_tangent(x[2] + q[2]);
    v[3] = exact_sigmoid(x[3] + q[3]);
  }
  template <typename R>
  __device__ static R cell(const R (&v)[4], R before) {
    return v[1] * before + v[0] * v[2];
  }
  template <typename R>
  __device__ static R hidden(const R (&v)[4], R squashed, R) {
    return v[3] * squashed;
  }
  template <typename R>
  __device__ static void gradients(const R (&v)[4], const Unit<R>& unit, R (&grads)[4]) {
    const auto [i, f, g, o] = v;
    grads[0] = unit.dc * g * slope_of_sigmoid(i);
    grads[1] = unit.dc * unit.c_before * slope_of_sigmoid(f);
    grads[2] = unit.dc * i * slope_of_tanh(g);
    grads[3] = unit.dh * unit.squashed * slope_of_sigmoid(o);
  }
  template <typename R>
  __device__ static R carried(const R (&)[4], R) {
    return 0;
  }
};

struct GruCell {
  static constexpr int kGates = 3;
  static constexpr int kValues = 4;  // r, z, n, and n's part of h
  static constexpr int kReserve = 4;
  static constexpr int kGradients = 4;
  static constexpr int kFirstHidden = 1;
  static constexpr bool kHasCell = false;

  template <typename R>
  __device__ static void values(const R (&x)[3], const R (&q)[3], R (&v)[4]) {
    v[0] = exact_sigmoid(x[0] + q[0]);
    v[1] = exact_sigmoid(x[1] + q[1]);
    v[2] = exact_hyperbolic_tangent(x[2] + v[0] * q[2]);
    v[3] = q[2];
  }
  template <typename R>
  __device__ static R cell(const R (&)[4], R) {
    return 0;
  }
  template <typename R>
  __device__ static R hidden(const R (&v)[4], R, R before) {
    return v[2] + v[1] * (before - v[2]);
  }
  template <typename R>
  __device__ static void gradients(const R (&v)[4], const Unit<R>& unit, R (&grads)[4]) {
    const auto [r, z, n, q] = v;
    const R of_n = unit.dh * (R(1) - z) * slope_of_tanh(n);
    grads[0] = of_n;
    grads[1] = of_n * q * slope_of_sigmoid(r);
    grads[2] = unit.dh * (unit.h_before - n) * slope_of_sigmoid(z);
    grads[3] = of_n * r;
  }
  template <typename R>
  __device__ static R carried(const R (&v)[4], R dh) {
    return dh * v[1];
  }
};

template <bool kRelu>
struct ElmanCell {
  static constexpr int kGates = 1;
  static constexpr int kValues = 1;  // h itself, which is the output, but for zoneout
  static constexpr int kReserve = 0;
  static constexpr int kGradients = 1;
  static constexpr int kFirstHidden = 0;
  static constexpr bool kHasCell = false;

  template <typename R>
  __device__ static void values(const R (&x)[1], const R (&q)[1], R (&v)[1]) {
    const R sum = x[0] + q[0];
    if constexpr (kRelu) {
      v[0] = sum <= R(0) ? R(0) : sum;  // what is not a number stays so
    } else {
      v[0] = exact_hyperbolic_tangent(sum);
    }
  }
  template <typename R>
  __device__ static R cell(const R (&)[1], R) {
    return 0;
  }
  template <typename R>
  __device__ static R hidden(const R (&v)[1], R, R) {
    return v[0];
  }
  template <typename R>
  __device__ static void gradients(const R (&v)[1], const Unit<R>& unit, R (&grads)[1]) {
    if constexpr (kRelu) {
      grads[0] = v[0] <= R(0) ? R(0) : unit.dh;
    } else {
      grads[0] = unit.dh * slope_of_tanh(v[0]);
    }
  }
  template <typename R>
  __device__ static R carried(const R (&)[1], R) {
    return 0;
  }
};

// Calls body.operator()<Cell, whether it is normalised>().
template <typename Body>
void with_cell(Cell cell, const Body& body) {
  switch (cell) {
    case Cell::lstm:
      return body.template operator()<LstmCell, false>();
    case Cell::gru:
      return body.template operator()<GruCell, false>();
    case Cell::rnn_tanh:
      return body.template operator()<ElmanCell<false>, false>();
    case Cell::rnn_relu:
      return body.template operator()<ElmanCell<true>, false>();
    case Cell::normalised_lstm:
      return body.template operator()<LstmCell, true>();
    case Cell::normalised_gru:
      return body.template operator()<GruCell, true>();
    case Cell::normalised_rnn_tanh:
      return body.template operator()<ElmanCell<false>, true>();
    case Cell::normalised_rnn_relu:
      return body.template operator()<ElmanCell<true>, true>();
  }
}

// Where, in blocks of H numbers, a token's reserve holds W_hh h_{t-1} of a normalised cell, and h~ of a plain recurrent
// cell under zoneout.
template <typename Cell>
constexpr int kReserveSums = Cell::kReserve;
template <typename Cell, bool kNormalised>
constexpr int kReserveCandidate = Cell::kReserve + (kNormalised ? Cell::kGates : 0);
template <typename Cell>
constexpr bool kKeepsCandidate = Cell::kReserve == 0;

static_assert(kAsInTable<LstmCell, Cell::lstm> && kAsInTable<GruCell, Cell::gru> &&
              kAsInTable<ElmanCell<false>, Cell::rnn_tanh> && kAsInTable<ElmanCell<true>, Cell::rnn_relu>);

inline Grid grid_of_step(const RnnSteps& at) {
  const int64_t wanted = (at.hidden_size + kWarp - 1) / kWarp * kWarp;
  const int threads = static_cast<int>(wanted < kStepThreads ? wanted : kStepThreads);
  return {at.count * at.batch, threads, 0, kStepThreads / kWarp * sizeof(double)};
}

}  // namespace pymtl::cuda
