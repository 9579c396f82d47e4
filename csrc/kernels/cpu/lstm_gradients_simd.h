// The gradients of an LSTM's weights and input, from those of its gates before activation (da):
//
//   grad W_ih = da^T x     grad W_hh = da^T h_{t-1}     grad b = sum da     grad x = sum over G of da W_ih
//
// For the weights the tokens are taken in blocks; a block's da is transposed and its x and h_{t-1} laid out in panels, so that
// the same tile kernel serves. h_{t-1} is read where it is: the row of the step before, or the initial state.
#pragma once

#include "kernels.h"
#include "lstm_simd.h"
#include "panels.h"

namespace pymtl {
namespace {

// to += value or to = value, for the first `valid` lanes.
template <typename T>
PYMTL_INLINE void add_or_store(T* to, Vec<T> value, int64_t valid, bool add) {
  if (add) value = load_part(to, valid, T(0)) + value;
  store_part(to, value, valid);
}

// Scratch memory of one worker. A block of tokens is as long as its transposed gates fit into the second-level
// cache, and all blocks are about equally long: a short one would pay for a pass over the results all the same.
template <typename T>
struct WeightGradientScratch {
  static constexpr int64_t kBlockBytes = 384 * 1024;
  static constexpr int64_t kLeast = 64;
  static constexpr int64_t kMost = 128;

  int64_t block;
  size_t transposed, panels, rows, zeros, size;

  explicit WeightGradientScratch(const LstmWeightGradient<T>& args) {
    int64_t fitting = kBlockBytes / (kGates * args.hidden_size * static_cast<int64_t>(sizeof(T)));
    fitting = fitting < kLeast ? kLeast : fitting > kMost ? kMost : fitting;
    const int64_t blocks = (args.tokens + fitting - 1) / fitting;
    block = blocks == 0 ? kLanes<T> : (args.tokens + blocks - 1) / blocks;
    block = (block + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    size_t at = 0;
    const auto take = [&at](int64_t count, size_t bytes) {
      const size_t here = at;
      at += (static_cast<size_t>(count) * bytes + 63) / 64 * 64;
      return here;
    };
    transposed = take((args.last_column - args.first_column) * block, sizeof(T));
    panels = take(PanelLayout<T>{block, kPanelVectors * kLanes<T>}.size(), sizeof(T));
    rows = take(block, sizeof(const T*));
    zeros = take(args.hidden_size, sizeof(T));
    size = at;
  }
};

template <typename T>
size_t lstm_weight_gradient_scratch(const LstmWeightGradient<T>& args) {
  return WeightGradientScratch<T>(args).size;
}

template <typename T>
class WeightGradient {
 public:
  explicit WeightGradient(const LstmWeightGradient<T>& args) : args_(args) {
    const WeightGradientScratch<T> scratch(args);
    block_ = scratch.block;
    char* const memory = static_cast<char*>(args.scratch);
    transposed_ = reinterpret_cast<T*>(memory + scratch.transposed);
    panels_ = reinterpret_cast<T*>(memory + scratch.panels);
    rows_ = reinterpret_cast<const T**>(memory + scratch.rows);
    zeros_ = reinterpret_cast<T*>(memory + scratch.zeros);
    for (int64_t unit = 0; unit < args.hidden_size; ++unit) zeros_[unit] = T(0);
  }

  void run() {
    for (int64_t first = 0; first < args_.tokens; first += block_) {
      const int64_t count = args_.tokens - first < block_ ? args_.tokens - first : block_;
      transpose_gates(first, count);
      if (args_.bias != nullptr) add_bias(first, count);
      if (args_.w_ih != nullptr) {
        for (int64_t k = 0; k < count; ++k) rows_[k] = args_.input + (first + k) * args_.input_size;
        add_product(first, count, args_.input_size, args_.w_ih);
      }
      if (args_.w_hh != nullptr) {
        find_previous_states(first, count);
        add_product(first, count, args_.hidden_size, args_.w_hh);
      }
    }
  }

 private:
  int64_t columns() const { return args_.last_column - args_.first_column; }

  const T* gates(int64_t token) const {
    return args_.grad_gates + token * kGates * args_.hidden_size + args_.first_column;
  }

  void transpose_gates(int64_t first, int64_t count) {
    for (int64_t k = 0; k < count; k += kLanes<T>) {
      const int64_t lanes = count - k < kLanes<T> ? count - k : kLanes<T>;
      pack_rows(gates(first + k), kGates * args_.hidden_size, lanes, columns(), transposed_ + k, block_);
    }
  }

  // Block by block, so that rounding errors do not grow with the number of tokens.
  void add_bias(int64_t first, int64_t count) {
    for (int64_t column = 0; column < columns(); column += kLanes<T>) {
      const int64_t valid = columns() - column;
      Vec<T> sum = {};
      for (int64_t k = 0; k < count; ++k) sum = sum + load_part(gates(first + k) + column, valid, T(0));
      T* const to = args_.bias + args_.first_column + column;
      if (first > 0) sum = load_part(to, valid, T(0)) + sum;
      store_part(to, sum, valid);
    }
  }

  // The rows of h_{t-1} for tokens [first, first + count).
  void find_previous_states(int64_t first, int64_t count) {
    while (args_.starts[step_ + 1] <= first) ++step_;
    int64_t t = step_;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t token = first + k;
      while (args_.starts[t + 1] <= token) ++t;
      const int64_t row = token - args_.starts[t];
      const int64_t before = args_.reverse ? t + 1 : t - 1;
      const bool has_before =
          before >= 0 && before < args_.steps && row < args_.starts[before + 1] - args_.starts[before];
      if (has_before) {
        rows_[k] = args_.output + (args_.starts[before] + row) * args_.output_stride;
      } else {
        rows_[k] = args_.h0 == nullptr ? zeros_ : args_.h0 + row * args_.hidden_size;
      }
    }
  }

  // to[column, c] += sum over the block of da[column] rows_[c], for this worker's columns.
  void add_product(int64_t first, int64_t count, int64_t width, T* to) {
    const PanelLayout<T> layout{count, width};
    for (int64_t panel = 0; panel < layout.panels(); ++panel) {
      const int64_t column = layout.first_column(panel);
      with_vectors(layout.panel_vectors(panel), [&]<int V>() {
        for (int64_t k = 0; k < count; ++k) {
          for (int v = 0; v < V; ++v) {
            const int64_t at = column + v * kLanes<T>;
            store(panels_ + (k * V + v) * kLanes<T>, load_part(rows_[k] + at, width - at, T(0)));
          }
        }
        for_row_groups(columns(), [&]<int R>(int64_t row) {
          add_tile<R, V>(row, count, first > 0, to + (args_.first_column + row) * width + column, width,
                         width - column);
        });
      });
    }
  }

  template <int R, int V>
  __attribute__((noinline)) void add_tile(int64_t row, int64_t count, bool accumulate, T* to, int64_t stride,
                                          int64_t valid) const {
    const T* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = transposed_ + (row + r) * block_;
    Vec<T> acc[R][V] = {};
    multiply_tile<T, R, V>(rows, count, panels_, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        add_or_store(to + r * stride + v * kLanes<T>, acc[r][v], valid - v * kLanes<T>, accumulate);
      }
    }
  }

  const LstmWeightGradient<T>& args_;
  int64_t block_;
  T* transposed_;     // da of the block, [columns][block_]
  T* panels_;         // one panel of x or h_{t-1} of the block
  const T** rows_;    // x or h_{t-1} of each token of the block
  T* zeros_;          // the initial state, if there is none
  int64_t step_ = 0;  // the step of the block's first token
};

template <typename T>
void lstm_weight_gradient(const LstmWeightGradient<T>& args) {
  WeightGradient<T>(args).run();
}

template <typename T>
PanelLayout<T> lstm_input_gradient_layout(int64_t input_size, int64_t hidden_size) {
  return {kGates * hidden_size, input_size};
}

template <typename T>
int64_t lstm_input_gradient_packed_size(int64_t input_size, int64_t hidden_size) {
  return lstm_input_gradient_layout<T>(input_size, hidden_size).size();
}

template <typename T>
void pack_lstm_input_gradient(const T* w_ih, int64_t input_size, int64_t hidden_size, T* packed) {
  pack_columns(w_ih, lstm_input_gradient_layout<T>(input_size, hidden_size), packed);
}

// The part of one recurrence in the gradient of the input, for some sequences.
template <typename T>
void lstm_input_gradient(const LstmInputGradient<T>& args) {
  constexpr int64_t kRows = 8 * kTileRows;  // whose gates stay in cache while the panels pass by
  const PanelLayout<T> layout = lstm_input_gradient_layout<T>(args.input_size, args.hidden_size);
  const T* rows[kRows];
  T* results[kRows];
  int64_t count = 0;
  const auto multiply = [&] {
    multiply_panels<T>(rows, count, layout, args.packed,
                       [&](int64_t n, int64_t column, int64_t valid, Vec<T> value)
                           PYMTL_INLINE_LAMBDA { store_part(results[n] + column, value, valid); });
    count = 0;
  };
  for (int64_t t = 0; t < args.steps; ++t) {
    const int64_t active = args.starts[t + 1] - args.starts[t];
    const int64_t last_row = active < args.last_row ? active : args.last_row;
    for (int64_t row = args.first_row; row < last_row; ++row) {
      const int64_t token = args.starts[t] + row;
      rows[count] = args.grad_gates + token * kGates * args.hidden_size;
      results[count] = args.result + token * args.input_size;
      if (++count == kRows) multiply();
    }
  }
  multiply();
}

}  // namespace
}  // namespace pymtl
