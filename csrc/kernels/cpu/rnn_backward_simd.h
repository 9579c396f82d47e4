// The walk back over time: from the gradients of the states to those of the gates before activation and of the
// initial state. The formulas are the cells'.
#pragma once

#include "rnn_simd.h"

namespace pymtl {
namespace {

template <typename T, typename Cell>
PanelLayout<T> rnn_backward_layout(int64_t hidden_size) {
  return {Cell::kGates * hidden_size, hidden_size};
}

template <typename T, typename Cell>
int64_t rnn_backward_packed_size(int64_t hidden_size) {
  return rnn_backward_layout<T, Cell>(hidden_size).size();
}

template <typename T, typename Cell>
void pack_rnn_backward(const T* w_hh, int64_t hidden_size, int64_t part, int64_t parts, T* packed) {
  pack_columns(w_hh, rnn_backward_layout<T, Cell>(hidden_size), packed, part, parts);
}

// Two gradients for every sequence, and a row pointer for each: of h through W_hh, and what goes beside it.
template <typename T>
struct RnnBackwardScratch {
  size_t hidden, carried, pointers, size;

  explicit RnnBackwardScratch(const RnnBackwardWalk<T>& walk) {
    const size_t rows = static_cast<size_t>(walk.last_row - walk.first_row);
    const size_t state = rows * static_cast<size_t>(padded_units<T>(walk.hidden_size)) * sizeof(Real<T>);
    hidden = 0;
    carried = (state + 63) / 64 * 64;
    pointers = 2 * carried;
    size = pointers + rows * sizeof(const T*);
  }
};

template <typename T>
size_t rnn_backward_scratch(const RnnBackwardWalk<T>& walk) {
  return RnnBackwardScratch<T>(walk).size;
}

template <typename T, typename Cell>
class RnnBackwardWalker {
  using R = Real<T>;

 public:
  explicit RnnBackwardWalker(const RnnBackwardWalk<T>& walk)
      : walk_(walk), rows_(walk.last_row - walk.first_row), size_(walk.hidden_size), units_(padded_units<T>(size_)) {
    const RnnBackwardScratch<T> scratch(walk);
    char* const memory = static_cast<char*>(walk.scratch);
    grad_h_ = reinterpret_cast<R*>(memory + scratch.hidden);
    carried_ = reinterpret_cast<R*>(memory + scratch.carried);
    pointers_ = reinterpret_cast<const T**>(memory + scratch.pointers);
    const PanelLayout<T> layout = rnn_backward_layout<T, Cell>(size_);
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
        set_gradient(Cell::kHasCell ? walk_.grad_c_n : nullptr, started_, carried_);
      }
      // In a forward recurrence all sequences go on to t - 1; in a reverse one the longer ones go on to t + 1.
      const int64_t going_on = rows_at(before) < active ? rows_at(before) : active;
      for (int64_t row = 0; row < active; ++row) {
        gate_gradients(t, row, row < going_on ? before : kInitialState);
        pointers_[row] = walk_.grad_gates + (token(t, row) * Cell::kGradients + Cell::kFirstHidden) * size_;
      }
      if (walk_.team != nullptr) meet(*walk_.team, walk_.place);  // the gradients of all units' gates are there
      const int64_t wanted = walk_.grad_h0 != nullptr ? active : going_on;
      multiply_panels<T>(
          pointers_, wanted, rnn_backward_layout<T, Cell>(size_), walk_.packed,
          [&](int64_t row, int64_t unit, int64_t, Vec<T> value)
              PYMTL_INLINE_LAMBDA { store(grad_h_ + row * units_ + unit, value); },
          first_panel_, last_panel_, t);
      for (int64_t row = going_on; row < active; ++row) give_gradients(row);
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

  // Of the initial state.
  void give_gradients(int64_t row) const {
    const int64_t to = (walk_.first_row + row) * size_;
    for (int64_t unit = first_unit_; unit < last_unit_; unit += kLanes<T>) {
      const R* const carried = carried_ + row * units_ + unit;
      if (walk_.grad_h0 != nullptr) {
        const Vec<T> value = load(grad_h_ + row * units_ + unit) + Cell::template carried_to_h<T>(carried);
        store_part(walk_.grad_h0 + to + unit, value, size_ - unit);
      }
      if (Cell::kHasCell && walk_.grad_c0 != nullptr)
        store_part(walk_.grad_c0 + to + unit, load(carried), size_ - unit);
    }
  }

  void gate_gradients(int64_t t, int64_t row, int64_t before) const {
    const int64_t here = token(t, row);
    const int64_t output = here * walk_.output_stride;
    const T* initial = walk_.h0 == nullptr ? nullptr : walk_.h0 + (walk_.first_row + row) * size_;
    GradientPlace<T> at{};
    at.stride = size_;
    for (int64_t unit = first_unit_; unit < last_unit_; unit += kLanes<T>) {
      at.valid = size_ - unit;
      if constexpr (Cell::kKept > 0) at.kept = walk_.gates + here * Cell::kKept * size_ + unit;
      if constexpr (Cell::kHasCell) {
        at.cell = walk_.cells + here * size_ + unit;
        at.cell_before = before == kInitialState ? nullptr : walk_.cells + token(before, row) * size_ + unit;
        at.c0 = walk_.c0 == nullptr ? nullptr : walk_.c0 + (walk_.first_row + row) * size_ + unit;
      } else {
        at.before = before != kInitialState ? walk_.output + token(before, row) * walk_.output_stride + unit
                    : initial == nullptr    ? nullptr
                                            : initial + unit;
        at.after = walk_.output + output + unit;
      }
      at.grad_output = walk_.grad_output == nullptr ? nullptr : walk_.grad_output + output + unit;
      at.grad_h = grad_h_ + row * units_ + unit;
      at.carried = carried_ + row * units_ + unit;
      at.grad_gates = walk_.grad_gates + here * Cell::kGradients * size_ + unit;
      Cell::template gradient<T>(at);
    }
  }

  const RnnBackwardWalk<T>& walk_;
  const int64_t rows_;
  const int64_t size_;
  const int64_t units_;
  R* grad_h_;
  R* carried_;
  const T** pointers_;
  int64_t first_panel_, last_panel_;  // this worker's of the hidden units
  int64_t first_unit_, last_unit_;
  int64_t started_ = 0;
};

template <typename T, typename Cell>
void rnn_backward_walk(const RnnBackwardWalk<T>& walk) {
  RnnBackwardWalker<T, Cell>(walk).run();
}

}  // namespace
}  // namespace pymtl
