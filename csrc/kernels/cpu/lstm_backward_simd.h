// The LSTM's walk back over time: from the gradients of h and c to those of the gates before activation
// and of the initial state.
//
//   do = dh tanh(c)         dc += dh o (1 - tanh(c)^2)
//   di = dc g               df = dc c_{t-1}             dg = dc i
//   da = (di i(1-i), df f(1-f), dg (1-g^2), do o(1-o))
//   dc_{t-1} = dc f         dh_{t-1} = da W_hh
#pragma once

#include "lstm_simd.h"

namespace pymtl {
namespace {

template <typename T>
PanelLayout<T> lstm_backward_layout(int64_t hidden_size) {
  return {kGates * hidden_size, hidden_size};
}

template <typename T>
int64_t lstm_backward_packed_size(int64_t hidden_size) {
  return lstm_backward_layout<T>(hidden_size).size();
}

template <typename T>
void pack_lstm_backward(const T* w_hh, int64_t hidden_size, int64_t part, int64_t parts, T* packed) {
  pack_columns(w_hh, lstm_backward_layout<T>(hidden_size), packed, part, parts);
}

// dh and dc of every sequence, and a row pointer for each.
template <typename T>
struct LstmBackwardScratch {
  size_t hidden, cell, pointers, size;

  explicit LstmBackwardScratch(const LstmBackwardWalk<T>& walk) {
    const size_t rows = static_cast<size_t>(walk.last_row - walk.first_row);
    const size_t state = rows * static_cast<size_t>(padded_units<T>(walk.hidden_size)) * sizeof(Real<T>);
    hidden = 0;
    cell = (state + 63) / 64 * 64;
    pointers = 2 * cell;
    size = pointers + rows * sizeof(const T*);
  }
};

template <typename T>
size_t lstm_backward_scratch(const LstmBackwardWalk<T>& walk) {
  return LstmBackwardScratch<T>(walk).size;
}

template <typename T>
class LstmBackwardWalker {
  using R = Real<T>;

 public:
  explicit LstmBackwardWalker(const LstmBackwardWalk<T>& walk)
      : walk_(walk), rows_(walk.last_row - walk.first_row), size_(walk.hidden_size), units_(padded_units<T>(size_)) {
    const LstmBackwardScratch<T> scratch(walk);
    char* const memory = static_cast<char*>(walk.scratch);
    grad_h_ = reinterpret_cast<R*>(memory + scratch.hidden);
    grad_c_ = reinterpret_cast<R*>(memory + scratch.cell);
    pointers_ = reinterpret_cast<const T**>(memory + scratch.pointers);
    const PanelLayout<T> layout = lstm_backward_layout<T>(size_);
    const int64_t team_size = walk.team == nullptr ? 1 : walk.team->size;
    first_panel_ = first_panel(layout.panels(), walk.place, team_size);
    last_panel_ = first_panel(layout.panels(), walk.place + 1, team_size);
    first_unit_ = layout.first_column(first_panel_);
    last_unit_ = layout.first_column(last_panel_);
  }

  void run() {
    for (int64_t k = walk_.steps - 1; k >= 0; --k) {
      const int64_t t = walk_.reverse ? walk_.steps - 1 - k : k;
      const int64_t before = walk_.reverse ? t + 1 : t - 1;  // the step whose state this one starts from
      const int64_t active = rows_at(t);
      for (; started_ < active; ++started_) {
        set_gradient(walk_.grad_h_n, started_, grad_h_);
        set_gradient(walk_.grad_c_n, started_, grad_c_);
      }
      // In a forward recurrence all sequences go on to t - 1; in a reverse one the longer ones go on to t + 1.
      const int64_t going_on = rows_at(before) < active ? rows_at(before) : active;
      for (int64_t row = 0; row < active; ++row) {
        gate_gradients(t, row, row < going_on ? before : kInitialState);
        pointers_[row] = walk_.grad_gates + token(t, row) * kGates * size_;
      }
      if (walk_.team != nullptr) meet(*walk_.team, walk_.place);  // the gradients of all units' gates are there
      const int64_t wanted = walk_.grad_h0 != nullptr ? active : going_on;
      multiply_panels<T>(
          pointers_, wanted, lstm_backward_layout<T>(size_), walk_.packed,
          [&](int64_t row, int64_t unit, int64_t, Vec<T> value)
              PYMTL_INLINE_LAMBDA { store(grad_h_ + row * units_ + unit, value); },
          first_panel_, last_panel_, t);
      for (int64_t row = going_on; row < active; ++row) {
        give_gradient(grad_h_, row, walk_.grad_h0);
        give_gradient(grad_c_, row, walk_.grad_c0);
      }
    }
  }

 private:
  static constexpr int64_t kInitialState = -1;

  int64_t rows_at(int64_t t) const {
    if (t < 0 || t >= walk_.steps) return 0;
    const int64_t rows = walk_.starts[t + 1] - walk_.starts[t] - walk_.first_row;
    return rows < 0 ? 0 : rows < rows_ ? rows : rows_;
  }

  int64_t token(int64_t t, int64_t row) const { return walk_.starts[t] + walk_.first_row + row; }

  void set_gradient(const T* given, int64_t row, R* state) const {
    for (int64_t unit = first_unit_; unit < last_unit_; unit += kLanes<T>) {
      Vec<T> value = {};
      if (given != nullptr) value = load_part(given + (walk_.first_row + row) * size_ + unit, size_ - unit);
      store(state + row * units_ + unit, value);
    }
  }

  void give_gradient(const R* state, int64_t row, T* wanted) const {
    if (wanted == nullptr) return;
    for (int64_t unit = first_unit_; unit < last_unit_; unit += kLanes<T>) {
      store_part(wanted + (walk_.first_row + row) * size_ + unit, load(state + row * units_ + unit), size_ - unit);
    }
  }

  void gate_gradients(int64_t t, int64_t row, int64_t before) const {
    const Vec<T> one = broadcast(R(1));
    const int64_t here = token(t, row);
    const T* const gates = walk_.gates + here * kGates * size_;
    const R* const cells = walk_.cells + here * size_;
    const T* const grad_output =
        walk_.grad_output == nullptr ? nullptr : walk_.grad_output + here * walk_.output_stride;
    const T* const c0 = walk_.c0 == nullptr ? nullptr : walk_.c0 + (walk_.first_row + row) * size_;
    const R* const c_before = before == kInitialState ? nullptr : walk_.cells + token(before, row) * size_;
    T* const grad_gates = walk_.grad_gates + here * kGates * size_;

    for (int64_t unit = first_unit_; unit < last_unit_; unit += kLanes<T>) {
      const int64_t valid = size_ - unit;
      const auto part = [&](const auto* from)
                            PYMTL_INLINE_LAMBDA { return from == nullptr ? Vec<T>{} : load_part(from + unit, valid); };
      const Vec<T> i = part(gates);
      const Vec<T> f = part(gates + size_);
      const Vec<T> g = part(gates + 2 * size_);
      const Vec<T> o = part(gates + 3 * size_);
      const Vec<T> tanh_c = tanh<R>(part(cells));
      const Vec<T> dh = load(grad_h_ + row * units_ + unit) + part(grad_output);
      const Vec<T> dc = fma(dh * o, one - tanh_c * tanh_c, load(grad_c_ + row * units_ + unit));
      store(grad_c_ + row * units_ + unit, dc * f);
      store_part(grad_gates + unit, dc * g * (i * (one - i)), valid);
      store_part(grad_gates + size_ + unit, dc * (c_before != nullptr ? part(c_before) : part(c0)) * (f * (one - f)),
                 valid);
      store_part(grad_gates + 2 * size_ + unit, dc * i * (one - g * g), valid);
      store_part(grad_gates + 3 * size_ + unit, dh * tanh_c * (o * (one - o)), valid);
    }
  }

  const LstmBackwardWalk<T>& walk_;
  const int64_t rows_;
  const int64_t size_;
  const int64_t units_;
  R* grad_h_;
  R* grad_c_;
  const T** pointers_;
  int64_t first_panel_, last_panel_;  // this worker's of the hidden units
  int64_t first_unit_, last_unit_;
  int64_t started_ = 0;
};

template <typename T>
void lstm_backward_walk(const LstmBackwardWalk<T>& walk) {
  LstmBackwardWalker<T>(walk).run();
}

}  // namespace
}  // namespace pymtl
