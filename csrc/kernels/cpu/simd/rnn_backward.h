// The time loop back: from the gradients of the states to those of the gates before activation and of the
// initial state. The formulas are the cells'.
#pragma once

#include "rnn.h"

namespace pymtl {
namespace {

template <typename T, typename Cell>
PanelLayout<T> rnn_backward_layout(int64_t hidden_size) {
  return {Cell::kGates * hidden_size, hidden_size};
}

template <typename T>
int64_t rnn_backward_panels_size(Cell cell, int64_t hidden_size) {
  return with_cell(cell, [&]<typename C>() { return rnn_backward_layout<T, C>(hidden_size).size(); });
}

template <typename T>
void pack_rnn_backward(Cell cell, const T* w_hh, int64_t hidden_size, int64_t part, int64_t parts, T* panels) {
  with_cell(cell,
            [&]<typename C>() { pack_columns(w_hh, rnn_backward_layout<T, C>(hidden_size), panels, part, parts); });
}

// Gradients for every sequence, and a row pointer for each: of h through W_hh, what the cell passes beside it, and what
// zoneout passes beside the cell. Of a normalised cell two rows of numbers besides.
template <typename T>
struct RnnBackwardScratch {
  size_t hidden, carried, zoned, rows, pointers, size;

  explicit RnnBackwardScratch(const RnnBackwardTimeLoop<T>& loop) {
    const size_t count = static_cast<size_t>(loop.last_row - loop.first_row);
    const size_t row = static_cast<size_t>(padded_units<T>(loop.hidden_size)) * sizeof(Accum<T>);
    const size_t state = (count * row + 63) / 64 * 64;
    const bool zoneout = loop.masks.zoneout_h != nullptr || loop.masks.zoneout_c != nullptr;
    hidden = 0;
    carried = state;
    zoned = 2 * state;
    rows = zoned + (zoneout ? state : 0);
    pointers = rows + (sizes_of(loop.cell).normalised ? 2 * row : 0);
    size = pointers + count * sizeof(const T*);
  }
};

template <typename T>
size_t rnn_backward_scratch(const RnnBackwardTimeLoop<T>& loop) {
  return RnnBackwardScratch<T>(loop).size;
}

// Takes the gradients of h that come through W_hh; a type of its own, so that all cells share one product.
template <typename T>
struct HiddenGradients {
  Accum<T>* to;  // rows `stride` apart
  int64_t stride;
  const T* dropout;  // [rows, H] or null
  int64_t size;      // H

  PYMTL_INLINE void operator()(int64_t row, int64_t unit, int64_t valid, Vec<T> value) const {
    if (dropout != nullptr) value = value * load_part(dropout + row * size + unit, valid);
    store(to + row * stride + unit, value);
  }
};

template <typename T, typename Cell>
class RnnBackwardTimeLoopRun {
  using R = Accum<T>;

 public:
  explicit RnnBackwardTimeLoopRun(const RnnBackwardTimeLoop<T>& loop)
      : loop_(loop), rows_(loop.last_row - loop.first_row), size_(loop.hidden_size), units_(padded_units<T>(size_)) {
    const RnnBackwardScratch<T> scratch(loop);
    char* const memory = static_cast<char*>(loop.scratch);
    grad_h_ = reinterpret_cast<R*>(memory + scratch.hidden);
    carried_ = reinterpret_cast<R*>(memory + scratch.carried);
    zoned_ = scratch.rows > scratch.zoned ? reinterpret_cast<R*>(memory + scratch.zoned) : nullptr;
    rows_of_units_ = reinterpret_cast<R*>(memory + scratch.rows);
    pointers_ = reinterpret_cast<const T**>(memory + scratch.pointers);
    const PanelLayout<T> layout = rnn_backward_layout<T, Cell>(size_);
    const int64_t team_size = loop.team == nullptr ? 1 : loop.team->size;
    first_panel_ = first_panel(layout.panels(), loop.place, team_size);
    last_panel_ = first_panel(layout.panels(), loop.place + 1, team_size);
    first_unit_ = layout.first_column(first_panel_);
    last_unit_ = layout.first_column(last_panel_);
  }

  void run() {
    const T* const dropout = loop_.masks.dropout;
    const HiddenGradients<T> take{grad_h_, units_, dropout == nullptr ? nullptr : dropout + loop_.first_row * size_,
                                  size_};
    for (int64_t k = loop_.steps - 1; k >= 0; --k) {
      const int64_t t = loop_.reverse ? loop_.steps - 1 - k : k;
      const int64_t before = loop_.reverse ? t + 1 : t - 1;  // the step whose state this one starts from
      const int64_t active = rows_at(t);
      for (; started_ < active; ++started_) {
        set_gradient(loop_.grad_h_n, started_, grad_h_);
        set_gradient(Cell::kHasCell ? loop_.grad_c_n : nullptr, started_, carried_);
        if (zoned_ != nullptr) set_gradient(nullptr, started_, zoned_);
      }
      // In a forward recurrence all sequences go on to t - 1; in a reverse one the longer ones go on to t + 1.
      const int64_t going_on = rows_at(before) < active ? rows_at(before) : active;
      for (int64_t row = 0; row < active; ++row) {
        if constexpr (Cell::kNormalised) {
          normalised_gradients(t, row, row < going_on ? before : kInitialState);
        } else {
          gate_gradients(t, row, row < going_on ? before : kInitialState);
        }
        pointers_[row] = loop_.grad_gates + (token(t, row) * Cell::kGradients + Cell::kFirstHidden) * size_;
      }
      if (loop_.team != nullptr) meet(*loop_.team, loop_.place);  // the gradients of all units' gates are there
      const int64_t wanted = loop_.grad_h0 != nullptr ? active : going_on;
      multiply_panels<T>(pointers_, wanted, rnn_backward_layout<T, Cell>(size_), loop_.panels, take, first_panel_,
                         last_panel_, t);
      for (int64_t row = going_on; row < active; ++row) give_gradients(row);
    }
  }

 private:
  static constexpr int64_t kInitialState = -1;

  int64_t rows_at(int64_t t) const {
    if (t < 0 || t >= loop_.steps) return 0;
    const int64_t rows = loop_.starts[t + 1] - loop_.starts[t] - loop_.first_row;
    return rows < 0 ? 0 : rows < rows_ ? rows : rows_;
  }

  int64_t token(int64_t t, int64_t row) const { return loop_.starts[t] + loop_.first_row + row; }

  void set_gradient(const T* given, int64_t row, R* state) const {
    for (int64_t unit = first_unit_; unit < last_unit_; unit += kLanes<T>) {
      Vec<T> value = {};
      if (given != nullptr) value = load_part(given + (loop_.first_row + row) * size_ + unit, size_ - unit);
      store(state + row * units_ + unit, value);
    }
  }

  // Of the initial state.
  void give_gradients(int64_t row) const {
    const int64_t to = (loop_.first_row + row) * size_;
    for (int64_t unit = first_unit_; unit < last_unit_; unit += kLanes<T>) {
      const R* const carried = carried_ + row * units_ + unit;
      if (loop_.grad_h0 != nullptr) {
        Vec<T> value = load(grad_h_ + row * units_ + unit) + Cell::template carried_to_h<T>(carried);
        if (zoned_ != nullptr) value = value + load(zoned_ + row * units_ + unit);
        store_part(loop_.grad_h0 + to + unit, value, size_ - unit);
      }
      if (Cell::kHasCell && loop_.grad_c0 != nullptr)
        store_part(loop_.grad_c0 + to + unit, load(carried), size_ - unit);
    }
  }

  // Where the gradients of a token's first unit are found; of another one, moved() by `unit`.
  GradientPlace<T> place(int64_t t, int64_t row, int64_t before) const {
    const int64_t here = token(t, row);
    const T* initial = loop_.h0 == nullptr ? nullptr : loop_.h0 + (loop_.first_row + row) * size_;
    GradientPlace<T> at{};
    at.stride = size_;
    const int64_t reserve = reserve_blocks<Cell>(loop_.masks.zoneout_h != nullptr);
    if (reserve > 0) at.reserve = loop_.gates + here * reserve * size_;
    if constexpr (Cell::kHasCell) {
      at.cell = loop_.cells + here * size_;
      at.cell_before = before == kInitialState ? nullptr : loop_.cells + token(before, row) * size_;
      at.c0 = loop_.c0 == nullptr ? nullptr : loop_.c0 + (loop_.first_row + row) * size_;
    } else {
      at.before = before == kInitialState ? initial : loop_.output + token(before, row) * loop_.output_stride;
      at.after = loop_.output + here * loop_.output_stride;
      if (reserve > Cell::kReserve) at.after = at.reserve + Cell::kReserve * size_;
    }
    at.grad_output = loop_.grad_output == nullptr ? nullptr : loop_.grad_output + here * loop_.output_stride;
    at.grad_h = grad_h_ + row * units_;
    at.carried = carried_ + row * units_;
    at.grad_gates = loop_.grad_gates + here * Cell::kGradients * size_;
    at.valid = size_;
    return at;
  }

  static PYMTL_INLINE GradientPlace<T> moved(GradientPlace<T> at, int64_t unit) {
    const auto move = [unit](auto*& pointer) PYMTL_INLINE_LAMBDA {
      if (pointer != nullptr) pointer += unit;
    };
    move(at.reserve);
    move(at.cell);
    move(at.cell_before);
    move(at.c0);
    move(at.before);
    move(at.after);
    move(at.grad_output);
    move(at.grad_h);
    move(at.carried);
    move(at.grad_gates);
    at.valid -= unit;
    return at;
  }

  void gate_gradients(int64_t t, int64_t row, int64_t before) const {
    const GradientPlace<T> first = place(t, row, before);
    for (int64_t unit = first_unit_; unit < last_unit_; unit += kLanes<T>) {
      GradientPlace<T> at = moved(first, unit);
      if (zoned_ == nullptr) {
        Cell::template gradient<T>(at);
        continue;
      }
      const Vec<T> beside = part_zoneout(t, row, unit, at);
      alignas(64) R candidate[kLanes<T>];
      if constexpr (Cell::kHasCell) {
        store(candidate, Cell::template candidate<T>(at));
        at.cell = candidate;
      }
      Cell::template gradient<T>(at);
      if constexpr (Cell::kHasCell) store(at.carried, load(at.carried) + beside);
    }
  }

  // Splits the gradients of h_t and c_t under zoneout. The cell's shares go to grad_h and carried. Of the shares that
  // bypass the cell, that of h is stored in zoned_, that of c is returned.
  PYMTL_INLINE Vec<T> part_zoneout(int64_t t, int64_t row, int64_t unit, GradientPlace<T>& at) const {
    const RnnMasks<T>& masks = loop_.masks;
    const int64_t here = token(t, row);
    const auto factor = [&](const T* factors, int64_t stride) PYMTL_INLINE_LAMBDA {
      return part_or_zero<T>(factors == nullptr ? nullptr : factors + here * stride + unit, at.valid);
    };
    const Vec<T> one = broadcast(R(1));
    R* const zoned = zoned_ + row * units_ + unit;
    const Vec<T> d_h = factor(masks.zoneout_h, masks.zoneout_h_stride);
    const Vec<T> dh = load(at.grad_h) + part_or_zero<T>(at.grad_output, at.valid) + load(zoned) +
                      Cell::template carried_to_h<T>(at.carried);
    store(zoned, d_h * dh);
    store(at.grad_h, (one - d_h) * dh);
    at.grad_output = nullptr;
    const Vec<T> d_c = factor(masks.zoneout_c, masks.zoneout_c_stride);
    const Vec<T> dc = Cell::kHasCell ? load(at.carried) : Vec<T>{};
    store(at.carried, (one - d_c) * dc);
    return d_c * dc;
  }

  // With u = g * da for a normalised sum q, M numbers of it, and q^ = (q - mean) / deviation:
  //
  //   dg = da q^          dq = (u - sum(u) / M - q^ sum(u q^) / M) / deviation
  void normalised_gradients(int64_t t, int64_t row, int64_t before) const {
    const GradientPlace<T> first = place(t, row, before);
    if constexpr (Cell::kHasCell) {
      normalised_cell_gradients(t, row, first);
    } else {
      gate_gradients(t, row, before);
    }
    const T* const q = first.reserve + Cell::kPlainReserve * size_;
    const T* const of_sums = first.grad_gates + Cell::kPlainFirstHidden * size_;
    T* const grad_q = first.grad_gates + Cell::kFirstHidden * size_;
    T* const grad_g = first.grad_gates + Cell::kGainGradient * size_;
    const int64_t numbers = Cell::kGates * size_;
    const Moments<T> moments = moments_of<T>(numbers, [&](auto&& take) PYMTL_INLINE_LAMBDA {
      for (int64_t k = 0; k < numbers; k += kLanes<T>) take(load_part(q + k, numbers - k), numbers - k);
    });
    Vec<T> sum = {};
    Vec<T> product = {};
    for (int64_t k = 0; k < numbers; k += kLanes<T>) {
      const int64_t valid = numbers - k;
      const Vec<T> normal = moments.normalised(load_part(q + k, valid));
      const Vec<T> da = load_part(of_sums + k, valid);
      const Vec<T> u = da * load_part(loop_.norm.g_hh + k, valid);
      store_part(grad_g + k, da * normal, valid);
      sum = sum + u;
      product = fma(u, normal, product);
    }
    const Vec<T> mean = broadcast(sum_lanes<R>(sum) / static_cast<R>(numbers));
    const Vec<T> slope = broadcast(sum_lanes<R>(product) / static_cast<R>(numbers));
    for (int64_t k = 0; k < numbers; k += kLanes<T>) {
      const int64_t valid = numbers - k;
      const Vec<T> normal = moments.normalised(load_part(q + k, valid));
      const Vec<T> u = load_part(of_sums + k, valid) * load_part(loop_.norm.g_hh + k, valid);
      store_part(grad_q + k, (u - mean - normal * slope) * broadcast(moments.scale), valid);
    }
  }

  // Of an LSTM whose c is normalised on its way to h: the plain cell's gradients, and those of g_c and b_c.
  void normalised_cell_gradients(int64_t t, int64_t row, const GradientPlace<T>& first) const {
    R* const candidates = rows_of_units_;
    R* const through_norm = rows_of_units_ + units_;
    for (int64_t unit = 0; unit < size_; unit += kLanes<T>) {
      store(candidates + unit, Cell::template candidate<T>(moved(first, unit)));
    }
    const Moments<T> moments = moments_of<T>(size_, [&](auto&& take) PYMTL_INLINE_LAMBDA {
      for (int64_t unit = 0; unit < size_; unit += kLanes<T>) take(load(candidates + unit), size_ - unit);
    });
    Vec<T> sum = {};
    Vec<T> product = {};
    for (int64_t unit = 0; unit < size_; unit += kLanes<T>) {
      GradientPlace<T> at = moved(first, unit);
      Vec<T> beside = {};
      if (zoned_ != nullptr) beside = part_zoneout(t, row, unit, at);
      const Vec<T> dh = load(at.grad_h) + part_or_zero<T>(at.grad_output, at.valid);
      const Vec<T> o = load_part(at.reserve + 3 * size_, at.valid);
      const Vec<T> normal = moments.normalised(load(candidates + unit));
      const Vec<T> squashed = Cell::template squashed<T>(normal, loop_.norm, unit, at.valid);
      const Vec<T> dy = dh * o * slope_of_tanh<Accum<T>>(squashed);
      const Vec<T> u = dy * load_part(loop_.norm.g_c + unit, at.valid);
      store_part(at.grad_gates + 3 * size_, dh * squashed * slope_of_sigmoid<Accum<T>>(o), at.valid);
      store_part(at.grad_gates + Cell::kCellGradient * size_, dy * normal, at.valid);
      store_part(at.grad_gates + (Cell::kCellGradient + 1) * size_, dy, at.valid);
      store(through_norm + unit, u);
      // What passes by the cell waits where h's gradient was.
      store(at.grad_h, beside);
      sum = sum + u;
      product = fma(u, normal, product);
    }
    const Vec<T> mean = broadcast(sum_lanes<R>(sum) / static_cast<R>(size_));
    const Vec<T> slope = broadcast(sum_lanes<R>(product) / static_cast<R>(size_));
    for (int64_t unit = 0; unit < size_; unit += kLanes<T>) {
      const GradientPlace<T> at = moved(first, unit);
      const Vec<T> i = load_part(at.reserve, at.valid);
      const Vec<T> f = load_part(at.reserve + size_, at.valid);
      const Vec<T> g = load_part(at.reserve + 2 * size_, at.valid);
      const Vec<T> normal = moments.normalised(load(candidates + unit));
      const Vec<T> through = (load(through_norm + unit) - mean - normal * slope) * broadcast(moments.scale);
      const Vec<T> dc = load(at.carried) + through;
      store(at.carried, fma(dc, f, load(at.grad_h)));
      store_part(at.grad_gates, dc * g * slope_of_sigmoid<Accum<T>>(i), at.valid);
      store_part(at.grad_gates + size_, dc * cell_before<T>(at) * slope_of_sigmoid<Accum<T>>(f), at.valid);
      store_part(at.grad_gates + 2 * size_, dc * i * slope_of_tanh<Accum<T>>(g), at.valid);
    }
  }

  const RnnBackwardTimeLoop<T>& loop_;
  const int64_t rows_;
  const int64_t size_;
  const int64_t units_;
  R* grad_h_;
  R* carried_;
  R* zoned_;          // or null, without zoneout
  R* rows_of_units_;  // [2][units] of a normalised cell
  const T** pointers_;
  int64_t first_panel_, last_panel_;  // this worker's of the hidden units
  int64_t first_unit_, last_unit_;
  int64_t started_ = 0;
};

template <typename T>
void rnn_backward_time_loop(const RnnBackwardTimeLoop<T>& loop) {
  with_cell(loop.cell, [&]<typename C>() { RnnBackwardTimeLoopRun<T, C>(loop).run(); });
}

}  // namespace
}  // namespace pymtl
