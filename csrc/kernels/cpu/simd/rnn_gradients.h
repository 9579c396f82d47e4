// The gradients of the weights and the input, from those of the gates before activation (da):
//
//   grad W_ih = da^T x     grad W_hh = da^T h_{t-1}     grad b = sum da     grad x = sum over G of da W_ih
//
// A token has kGradients * H numbers of da. The first kGates * H belong to the rows of W_ih, starting at its row
// kInputRotation * H and wrapping around; kGates * H from kFirstHidden * H on belong to the rows of W_hh.
#pragma once

#include "../kernels.h"
#include "gradients.h"
#include "rnn.h"

namespace pymtl {
namespace {

template <typename T, typename Cell>
struct RnnWeightGradientScratch {
  WeightGradientScratch<T> product;
  size_t rows, zeros, ih_sums, hh_sums, masked, size;

  explicit RnnWeightGradientScratch(const RnnWeightGradient<T>& args)
      : product(args.tokens, Cell::kGradients * args.hidden_size, args.last_column - args.first_column) {
    const int64_t columns = args.last_column - args.first_column;
    rows = (product.size + 63) / 64 * 64;
    ih_sums = rows + static_cast<size_t>(product.block) * sizeof(const T*);
    hh_sums = ih_sums + static_cast<size_t>(weight_gradient_sums<T>(columns, args.input_size)) * sizeof(Accum<T>);
    zeros = hh_sums + static_cast<size_t>(weight_gradient_sums<T>(columns, args.hidden_size)) * sizeof(Accum<T>);
    masked = zeros + static_cast<size_t>(args.hidden_size) * sizeof(T);
    size = masked + static_cast<size_t>(args.dropout != nullptr ? product.block * args.hidden_size : 0) * sizeof(T);
  }
};

template <typename T>
size_t rnn_weight_gradient_scratch(const RnnWeightGradient<T>& args) {
  return with_cell(args.cell, [&]<typename C>() { return RnnWeightGradientScratch<T, C>(args).size; });
}

// The rows of h_{t-1} for tokens [first, first + count), where they are: of the step before, or the initial state; with
// recurrent dropout in `masked`. `step` is that of the token `first` or an earlier one.
template <typename T>
void find_previous_states(const RnnWeightGradient<T>& args, int64_t first, int64_t count, const T* zeros, T* masked,
                          int64_t& step, const T** rows) {
  while (args.starts[step + 1] <= first) ++step;
  int64_t t = step;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t token = first + k;
    while (args.starts[t + 1] <= token) ++t;
    const int64_t row = token - args.starts[t];
    const int64_t before = args.reverse ? t + 1 : t - 1;
    const bool has_before = before >= 0 && before < args.steps && row < args.starts[before + 1] - args.starts[before];
    if (has_before) {
      rows[k] = args.output + (args.starts[before] + row) * args.output_stride;
    } else {
      rows[k] = args.h0 == nullptr ? zeros : args.h0 + row * args.hidden_size;
    }
    if (args.dropout == nullptr) continue;
    T* const to = masked + k * args.hidden_size;
    for (int64_t unit = 0; unit < args.hidden_size; unit += kLanes<T>) {
      const int64_t valid = args.hidden_size - unit;
      const Vec<T> factors = load_part(args.dropout + row * args.hidden_size + unit, valid);
      store_part(to + unit, load_part(rows[k] + unit, valid) * factors, valid);
    }
    rows[k] = to;
  }
}

template <typename T, typename Cell>
void weight_gradient(const RnnWeightGradient<T>& args) {
  const RnnWeightGradientScratch<T, Cell> scratch(args);
  char* const memory = static_cast<char*>(args.scratch);
  const T** const rows = reinterpret_cast<const T**>(memory + scratch.rows);
  Accum<T>* const ih_sums = reinterpret_cast<Accum<T>*>(memory + scratch.ih_sums);
  Accum<T>* const hh_sums = reinterpret_cast<Accum<T>*>(memory + scratch.hh_sums);
  T* const zeros = reinterpret_cast<T*>(memory + scratch.zeros);
  T* const masked = reinterpret_cast<T*>(memory + scratch.masked);
  for (int64_t unit = 0; unit < args.hidden_size; ++unit) zeros[unit] = T{};
  WeightGradient<T> gradient(args.grad_gates, args.tokens, Cell::kGradients * args.hidden_size, args.first_column,
                             args.last_column, args.scratch);
  const int64_t H = args.hidden_size;
  constexpr int64_t kRound = Cell::kGates - Cell::kInputRotation;  // where the rows of W_ih begin anew
  const RowRange of_input[2] = {{0, kRound * H, Cell::kInputRotation * H}, {kRound * H, Cell::kGates * H, -kRound * H}};
  const RowRange of_hidden[1] = {
      {Cell::kFirstHidden * H, (Cell::kFirstHidden + Cell::kGates) * H, -Cell::kFirstHidden * H}};
  int64_t step = 0;
  for (int64_t first = 0; first < args.tokens; first += gradient.block()) {
    const int64_t count = args.tokens - first < gradient.block() ? args.tokens - first : gradient.block();
    gradient.start(first, count);
    if (args.bias != nullptr) gradient.add_sum(args.bias);
    if (args.w_ih != nullptr) {
      for (int64_t k = 0; k < count; ++k) rows[k] = args.input + (first + k) * args.input_stride;
      gradient.add_product(rows, args.input_size, args.w_ih, of_input, ih_sums);
    }
    if (args.w_hh != nullptr) {
      find_previous_states(args, first, count, zeros, masked, step, rows);
      gradient.add_product(rows, H, args.w_hh, of_hidden, hh_sums);
    }
  }
}

template <typename T>
void rnn_weight_gradient(const RnnWeightGradient<T>& args) {
  with_cell(args.cell, [&]<typename C>() { weight_gradient<T, C>(args); });
}

// Of a normalised cell, which has no W_ih, the gradient of the input is that of its gates.
template <typename T, typename Cell>
PanelLayout<T> input_gradient_layout(int64_t input_size, int64_t hidden_size) {
  return {Cell::kGates * hidden_size, input_size};
}

template <typename T>
int64_t rnn_input_gradient_panels_size(Cell cell, int64_t input_size, int64_t hidden_size) {
  return with_cell(cell, [&]<typename C>() {
    return C::kNormalised ? 0 : input_gradient_layout<T, C>(input_size, hidden_size).size();
  });
}

template <typename T>
void pack_rnn_input_gradient(Cell cell, const T* w_ih, int64_t input_size, int64_t hidden_size, int64_t part,
                             int64_t parts, T* panels) {
  with_cell(cell, [&]<typename C>() {
    if constexpr (!C::kNormalised) {
      pack_columns(w_ih, input_gradient_layout<T, C>(input_size, hidden_size), panels, part, parts,
                   C::kInputRotation * hidden_size);
    }
  });
}

template <typename T, typename Cell>
void copy_gate_gradients(const RnnInputGradient<T>& args) {
  const int64_t H = args.hidden_size;
  for (int64_t t = args.first_step; t < args.last_step; ++t) {
    const int64_t active = args.starts[t + 1] - args.starts[t];
    const int64_t last_row = active < args.last_row ? active : args.last_row;
    for (int64_t row = args.first_row; row < last_row; ++row) {
      const int64_t token = args.starts[t] + row;
      for (int block = 0; block < Cell::kGates; ++block) {
        const T* const from = args.grad_gates + (token * Cell::kGradients + block) * H;
        T* const to = args.result + token * args.result_stride + (block + Cell::kInputRotation) % Cell::kGates * H;
        for (int64_t unit = 0; unit < H; ++unit) to[unit] = from[unit];
      }
    }
  }
}

// Takes rows of the gradient of the input; a type of its own, so that all cells share one product.
template <typename T>
struct InputGradients {
  const RnnInputGradient<T>& args;
  const int64_t* tokens;  // of the rows

  PYMTL_INLINE void operator()(int64_t n, int64_t column, int64_t valid, Vec<T> value) const {
    if (args.part != nullptr) {
      store_part(args.part + tokens[n] * args.input_size + column, value, valid);
    } else {
      store_part(args.result + tokens[n] * args.result_stride + column, value, valid);
    }
  }
};

// The part of one recurrence in the gradient of the input, for some sequences and steps.
template <typename T, typename Cell>
void input_gradient(const RnnInputGradient<T>& args) {
  if constexpr (Cell::kNormalised) {
    copy_gate_gradients<T, Cell>(args);
  } else {
    constexpr int64_t kRows = 8 * kTileRows;  // whose gates stay in cache while the panels are streamed
    const PanelLayout<T> layout = input_gradient_layout<T, Cell>(args.input_size, args.hidden_size);
    const T* rows[kRows];
    int64_t tokens[kRows];
    int64_t count = 0;
    const auto multiply = [&] {
      multiply_panels<T>(rows, count, layout, args.panels, InputGradients<T>{args, tokens});
      count = 0;
    };
    for (int64_t t = args.first_step; t < args.last_step; ++t) {
      const int64_t active = args.starts[t + 1] - args.starts[t];
      const int64_t last_row = active < args.last_row ? active : args.last_row;
      for (int64_t row = args.first_row; row < last_row; ++row) {
        const int64_t token = args.starts[t] + row;
        rows[count] = args.grad_gates + token * Cell::kGradients * args.hidden_size;
        tokens[count] = token;
        if (++count == kRows) multiply();
      }
    }
    multiply();
  }
}

template <typename T>
void rnn_input_gradient(const RnnInputGradient<T>& args) {
  with_cell(args.cell, [&]<typename C>() { input_gradient<T, C>(args); });
}

}  // namespace
}  // namespace pymtl
