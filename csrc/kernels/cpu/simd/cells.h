// The cells: what one step makes of its gates' sums, and of gradients on the way back. The time loops
// (rnn.h, rnn_backward.h) are the same for all of them.
//
// A panel of weights holds kUnitVectors vectors of units, each once per gate. Its sums start from the projected input;
// the last kGates - kStarted gates' start from a bias of their own, and what was projected for them stays apart.
#pragma once

#include <array>
#include <cmath>

#include "../kernels.h"
#include "activation.h"
#include "panels.h"

namespace pymtl {
namespace {

// Where an update finds what belongs to one vector of units of one sequence.
template <typename T>
struct CellPlace {
  Accum<T>* sums;             // [kVectors][lanes], free to be overwritten
  const Accum<T>* projected;  // [kVectors][lanes] W_ih x + b
  Accum<T>* cell;             // c
  const T* before;            // h_{t-1}
  T* after;                   // h_t
  T* reserve;                 // [kReserve][H] for the backward pass, or null
  Accum<T>* reserve_cell;     // c_t for it
  int64_t stride;             // H, between the rows of `reserve`
  int64_t valid;              // units from here to the last
};

// Of some numbers: their mean, and 1 / sqrt(variance + epsilon).
template <typename T>
struct Moments {
  Accum<T> mean;
  Accum<T> scale;

  PYMTL_INLINE Vec<T> normalised(Vec<T> x) const { return (x - broadcast(mean)) * broadcast(scale); }
};

// Of all numbers that for_each(take) gives to take(vector, valid), `count` in all; a vector is zero past `valid`.
template <typename T, typename ForEach>
PYMTL_INLINE Moments<T> moments_of(int64_t count, ForEach&& for_each) {
  using R = Accum<T>;
  constexpr R kEpsilon = R(1e-5);
  alignas(64) static constexpr std::array<R, kLanes<T>> kOnes = [] {
    std::array<R, kLanes<T>> ones{};
    for (R& one : ones) one = R(1);
    return ones;
  }();
  Vec<T> sum = {};
  for_each([&](Vec<T> x, int64_t) PYMTL_INLINE_LAMBDA { sum = sum + x; });
  const R mean = sum_lanes<R>(sum) / static_cast<R>(count);
  Vec<T> squares = {};
  for_each([&](Vec<T> x, int64_t valid) PYMTL_INLINE_LAMBDA {
    const Vec<T> apart = (x - broadcast(mean)) * load_part(kOnes.data(), valid);
    squares = fma(apart, apart, squares);
  });
  const R variance = sum_lanes<R>(squares) / static_cast<R>(count);
  return {mean, R(1) / std::sqrt(variance + kEpsilon)};
}

// How far apart the places of updates that go in lockstep are.
struct CellStep {
  int64_t sums, projected, state, reserve, reserve_cell, units;
};

// N vectors, `step` apart.
template <int N, typename Number>
PYMTL_INLINE auto load_each(const Number* from, int64_t step) {
  return lockstep<N>([&]<int J>() PYMTL_INLINE_LAMBDA { return load(from + J * step); });
}

template <int N, typename V, typename Number>
PYMTL_INLINE void store_each(Number* to, int64_t step, const Lockstep<V, N>& values) {
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) store(to + j * step, values.of[j]);
}

// The first `valid` lanes, `units` fewer at each.
template <int N, typename V, typename Number>
PYMTL_INLINE void store_parts(Number* to, int64_t step, const Lockstep<V, N>& values, int64_t valid, int64_t units) {
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) store_part(to + j * step, values.of[j], valid - j * units);
}

// Where the way back finds the same: `reserve` from the forward pass, gradients of h and c.
template <typename T>
struct GradientPlace {
  const T* reserve;
  const Accum<T>* cell;         // c_t
  const Accum<T>* cell_before;  // c_{t-1}, or null: c0
  const T* c0;                  // or null: zeros
  const T* before;              // h_{t-1}, or null: zeros
  const T* after;               // h_t, or h~ under zoneout
  const T* grad_output;         // or null
  Accum<T>* grad_h;             // what came through W_hh
  Accum<T>* carried;            // what came beside it: LSTM: of c, GRU: of h
  T* grad_gates;                // [kGradients][H]
  int64_t stride;               // H
  int64_t valid;
};

template <typename T>
PYMTL_INLINE Vec<T> part_or_zero(const T* from, int64_t valid) {
  return from == nullptr ? Vec<T>{} : load_part(from, valid);
}

template <typename T>
PYMTL_INLINE Vec<T> cell_before(const GradientPlace<T>& at) {
  return at.cell_before != nullptr ? load_part(at.cell_before, at.valid) : part_or_zero<T>(at.c0, at.valid);
}

// Long short-term memory: see rnn.h.
struct LstmCell {
  static constexpr bool kNormalised = false;
  static constexpr int kGates = 4;        // i, f, g, o
  static constexpr int kStarted = 4;      // gates whose sums start from the projected input
  static constexpr int kUnitVectors = 1;  // of a panel
  static constexpr bool kHasCell = true;
  static constexpr int kReserve = 4;  // i, f, g, o
  static constexpr bool kKeepsCandidate = false;
  static constexpr int kGradients = 4;      // of the gates before activation
  static constexpr int kFirstHidden = 0;    // the first of those that W_hh has a part in
  static constexpr int kInputRotation = 0;  // the row of W_ih, in blocks of H, that the first of them belongs to

  template <int N, typename T>
  PYMTL_INLINE static void update(const CellPlace<T>& at, const CellStep& step) {
    using R = Accum<T>;
    const auto i = sigmoid<R>(load_each<N>(at.sums, step.sums));
    const auto f = sigmoid<R>(load_each<N>(at.sums + kLanes<T>, step.sums));
    const auto g = tanh<R>(load_each<N>(at.sums + 2 * kLanes<T>, step.sums));
    const auto o = sigmoid<R>(load_each<N>(at.sums + 3 * kLanes<T>, step.sums));
    const auto c = fma(f, load_each<N>(at.cell, step.state), i * g);
    store_each(at.cell, step.state, c);
    store_each(at.sums + 3 * kLanes<T>, step.sums, o);
    if (at.reserve == nullptr) return;
    store_parts(at.reserve, step.reserve, i, at.valid, step.units);
    store_parts(at.reserve + at.stride, step.reserve, f, at.valid, step.units);
    store_parts(at.reserve + 2 * at.stride, step.reserve, g, at.valid, step.units);
    store_parts(at.reserve + 3 * at.stride, step.reserve, o, at.valid, step.units);
    store_parts(at.reserve_cell, step.reserve_cell, c, at.valid, step.units);
  }

  template <int N, typename T>
  PYMTL_INLINE static void finish(const CellPlace<T>& at, const CellStep& step) {
    const auto tanh_c = tanh<Accum<T>>(load_each<N>(at.cell, step.state));
    store_each(at.after, step.state, load_each<N>(at.sums + 3 * kLanes<T>, step.sums) * tanh_c);
  }

  //   do = dh tanh(c)         dc += dh o (1 - tanh(c)^2)
  //   di = dc g               df = dc c_{t-1}             dg = dc i
  //   da = (di i(1-i), df f(1-f), dg (1-g^2), do o(1-o))
  //   dc_{t-1} = dc f         dh_{t-1} = da W_hh
  template <typename T>
  PYMTL_INLINE static void gradient(const GradientPlace<T>& at) {
    const Vec<T> i = load_part(at.reserve, at.valid);
    const Vec<T> f = load_part(at.reserve + at.stride, at.valid);
    const Vec<T> g = load_part(at.reserve + 2 * at.stride, at.valid);
    const Vec<T> o = load_part(at.reserve + 3 * at.stride, at.valid);
    const Vec<T> tanh_c = tanh<Accum<T>>(load_part(at.cell, at.valid));
    const Vec<T> c_before = cell_before<T>(at);
    const Vec<T> dh = load(at.grad_h) + part_or_zero<T>(at.grad_output, at.valid);
    const Vec<T> dc = fma(dh * o, slope_of_tanh<Accum<T>>(tanh_c), load(at.carried));
    store(at.carried, dc * f);
    store_part(at.grad_gates, dc * g * slope_of_sigmoid<Accum<T>>(i), at.valid);
    store_part(at.grad_gates + at.stride, dc * c_before * slope_of_sigmoid<Accum<T>>(f), at.valid);
    store_part(at.grad_gates + 2 * at.stride, dc * i * slope_of_tanh<Accum<T>>(g), at.valid);
    store_part(at.grad_gates + 3 * at.stride, dh * tanh_c * slope_of_sigmoid<Accum<T>>(o), at.valid);
  }

  // The c that the gates gave, before any zoneout: as the forward pass computed it.
  template <typename T>
  PYMTL_INLINE static Vec<T> candidate(const GradientPlace<T>& at) {
    const Vec<T> i = load_part(at.reserve, at.valid);
    const Vec<T> f = load_part(at.reserve + at.stride, at.valid);
    const Vec<T> g = load_part(at.reserve + 2 * at.stride, at.valid);
    return fma(f, cell_before<T>(at), i * g);
  }

  // What of the gradient of h_{t-1} did not come through W_hh.
  template <typename T>
  PYMTL_INLINE static Vec<T> carried_to_h(const Accum<T>*) {
    return Vec<T>{};
  }
};

// Gated recurrent unit: see rnn.h.
struct GruCell {
  static constexpr bool kNormalised = false;
  static constexpr int kGates = 3;    // r, z, n
  static constexpr int kStarted = 2;  // n's part of W_hh is multiplied by r before it meets the input's
  static constexpr int kUnitVectors = 1;
  static constexpr bool kHasCell = false;
  static constexpr int kReserve = 4;  // r, z, n, and n's part of h: q = W_hn h + b_hn
  static constexpr bool kKeepsCandidate = false;
  static constexpr int kGradients = 4;  // of n's part of x, r, z, and n's part of h: W_ih has a part in the first
                                        // three, W_hh in the last three
  static constexpr int kFirstHidden = 1;
  static constexpr int kInputRotation = 2;

  template <int N, typename T>
  PYMTL_INLINE static void update(const CellPlace<T>& at, const CellStep& step) {
    using R = Accum<T>;
    const auto r = sigmoid<R>(load_each<N>(at.sums, step.sums));
    const auto z = sigmoid<R>(load_each<N>(at.sums + kLanes<T>, step.sums));
    const auto q = load_each<N>(at.sums + 2 * kLanes<T>, step.sums);
    const auto n = tanh<R>(fma(r, q, load_each<N>(at.projected + 2 * kLanes<T>, step.projected)));
    store_each(at.after, step.state, fma(z, load_each<N>(at.before, step.state) - n, n));
    if (at.reserve == nullptr) return;
    store_parts(at.reserve, step.reserve, r, at.valid, step.units);
    store_parts(at.reserve + at.stride, step.reserve, z, at.valid, step.units);
    store_parts(at.reserve + 2 * at.stride, step.reserve, n, at.valid, step.units);
    store_parts(at.reserve + 3 * at.stride, step.reserve, q, at.valid, step.units);
  }

  template <int N, typename T>
  PYMTL_INLINE static void finish(const CellPlace<T>&, const CellStep&) {}

  // n = tanh(a_n + r q), where q = W_hn h_{t-1} + b_hn:
  //
  //   dn = dh (1-z)           dz = dh (h_{t-1} - n)
  //   da_n = dn (1-n^2)       dq = da_n r                 dr = da_n q
  //   da_r = dr r(1-r)        da_z = dz z(1-z)
  //   dh_{t-1} = dh z + (da_r, da_z, dq) W_hh
  //
  // Kept in the order da_n, da_r, da_z, dq: W_ih has a part in the first three, W_hh in the last three.
  template <typename T>
  PYMTL_INLINE static void gradient(const GradientPlace<T>& at) {
    const Vec<T> one = broadcast(Accum<T>(1));
    const Vec<T> r = load_part(at.reserve, at.valid);
    const Vec<T> z = load_part(at.reserve + at.stride, at.valid);
    const Vec<T> n = load_part(at.reserve + 2 * at.stride, at.valid);
    const Vec<T> q = load_part(at.reserve + 3 * at.stride, at.valid);
    const Vec<T> dh = load(at.grad_h) + load(at.carried) + part_or_zero<T>(at.grad_output, at.valid);
    const Vec<T> da_n = dh * (one - z) * slope_of_tanh<Accum<T>>(n);
    store(at.carried, dh * z);
    store_part(at.grad_gates, da_n, at.valid);
    store_part(at.grad_gates + at.stride, da_n * q * slope_of_sigmoid<Accum<T>>(r), at.valid);
    store_part(at.grad_gates + 2 * at.stride,
               dh * (part_or_zero<T>(at.before, at.valid) - n) * slope_of_sigmoid<Accum<T>>(z), at.valid);
    store_part(at.grad_gates + 3 * at.stride, da_n * r, at.valid);
  }

  template <typename T>
  PYMTL_INLINE static Vec<T> carried_to_h(const Accum<T>* carried) {
    return load(carried);
  }
};

// The plain recurrent cell (Elman 1990); rnn.h has its formulas. It has one gate only, so a panel with one vector of
// units would be narrow: each panel holds four.
template <bool kRelu>
struct ElmanCell {
  static constexpr bool kNormalised = false;
  static constexpr int kGates = 1;
  static constexpr int kStarted = 1;
  static constexpr int kUnitVectors = 4;
  static constexpr bool kHasCell = false;
  static constexpr int kReserve = 0;
  static constexpr bool kKeepsCandidate = true;  // h~, of which zoneout leaves nothing in h
  static constexpr int kGradients = 1;
  static constexpr int kFirstHidden = 0;
  static constexpr int kInputRotation = 0;

  template <int N, typename T>
  PYMTL_INLINE static void update(const CellPlace<T>& at, const CellStep& step) {
    const auto sums = load_each<N>(at.sums, step.sums);
    if constexpr (kRelu) {
      const auto relu = [](Vec<T> x) PYMTL_INLINE_LAMBDA { return maximum<Accum<T>>(x, Vec<T>{}); };
      store_each(at.after, step.state, each(relu, sums));
    } else {
      store_each(at.after, step.state, tanh<Accum<T>>(sums));
    }
  }

  template <int N, typename T>
  PYMTL_INLINE static void finish(const CellPlace<T>&, const CellStep&) {}

  //   tanh: da = dh (1-h^2)     relu: da = dh where h > 0     dh_{t-1} = da W_hh
  template <typename T>
  PYMTL_INLINE static void gradient(const GradientPlace<T>& at) {
    const Vec<T> dh = load(at.grad_h) + part_or_zero<T>(at.grad_output, at.valid);
    const Vec<T> h = load_part(at.after, at.valid);
    if constexpr (kRelu) {
      // Where h is not a number torch's gradient passes too.
      store_part(at.grad_gates, select<Accum<T>>(h <= Vec<T>{}, Vec<T>{}, dh), at.valid);
    } else {
      store_part(at.grad_gates, dh * slope_of_tanh<Accum<T>>(h), at.valid);
    }
  }

  template <typename T>
  PYMTL_INLINE static Vec<T> carried_to_h(const Accum<T>*) {
    return Vec<T>{};
  }
};

// A cell whose parts are normalised over all gates, and an LSTM's c too: see rnn.h. W_hh h_{t-1} itself is kept behind
// what the cell keeps; its mean and variance are computed anew on the way back, which is cheaper than keeping them.
template <typename Plain>
struct Normalised : Plain {
  static constexpr bool kNormalised = true;
  static constexpr int kPlainReserve = Plain::kReserve;
  static constexpr int kReserve = Plain::kReserve + Plain::kGates;
  // The gradients of the plain cell's gates, of W_hh h_{t-1}, of g_hh, and of an LSTM's g_c and b_c.
  static constexpr int kGainGradient = Plain::kGradients + Plain::kGates;
  static constexpr int kCellGradient = kGainGradient + Plain::kGates;
  static constexpr int kGradients = kCellGradient + (Plain::kHasCell ? 2 : 0);
  static constexpr int kPlainFirstHidden = Plain::kFirstHidden;
  static constexpr int kFirstHidden = Plain::kGradients;

  // tanh of the normalised c.
  template <typename T>
  PYMTL_INLINE static Vec<T> squashed(Vec<T> normal, const RnnNorm<T>& norm, int64_t unit, int64_t valid) {
    const Vec<T> shift = part_or_zero<T>(norm.b_c == nullptr ? nullptr : norm.b_c + unit, valid);
    return tanh<Accum<T>>(fma(load_part(norm.g_c + unit, valid), normal, shift));
  }
};

// Blocks of H numbers that a token keeps for the backward pass.
template <typename Cell>
constexpr int64_t reserve_blocks(bool zoneout_h) {
  return Cell::kReserve + (Cell::kKeepsCandidate && zoneout_h ? 1 : 0);
}

static_assert(kAsInTable<LstmCell, Cell::lstm> && kAsInTable<GruCell, Cell::gru> &&
              kAsInTable<ElmanCell<false>, Cell::rnn_tanh> && kAsInTable<ElmanCell<true>, Cell::rnn_relu>);
static_assert(kAsInTable<Normalised<LstmCell>, Cell::normalised_lstm> &&
              kAsInTable<Normalised<GruCell>, Cell::normalised_gru> &&
              kAsInTable<Normalised<ElmanCell<false>>, Cell::normalised_rnn_tanh> &&
              kAsInTable<Normalised<ElmanCell<true>>, Cell::normalised_rnn_relu>);

// Calls body.operator()<Cell>().
template <typename Body>
PYMTL_INLINE auto with_cell(Cell cell, Body&& body) {
  switch (cell) {
    case Cell::gru:
      return body.template operator()<GruCell>();
    case Cell::rnn_tanh:
      return body.template operator()<ElmanCell<false>>();
    case Cell::rnn_relu:
      return body.template operator()<ElmanCell<true>>();
    case Cell::normalised_lstm:
      return body.template operator()<Normalised<LstmCell>>();
    case Cell::normalised_gru:
      return body.template operator()<Normalised<GruCell>>();
    case Cell::normalised_rnn_tanh:
      return body.template operator()<Normalised<ElmanCell<false>>>();
    case Cell::normalised_rnn_relu:
      return body.template operator()<Normalised<ElmanCell<true>>>();
    case Cell::lstm:
      break;
  }
  return body.template operator()<LstmCell>();
}

}  // namespace
}  // namespace pymtl
