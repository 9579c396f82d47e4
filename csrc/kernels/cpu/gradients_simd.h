// The gradient of a linear map's weights, dy^T x summed over the tokens, for a share of its rows.
//
// The tokens are taken in blocks; a block's dy is transposed and its x laid out in panels, so that the tile
// kernel serves. x is read where it is, row by row.
#pragma once

#include "panels.h"

namespace pymtl {
namespace {

// Scratch memory of one worker. A block of tokens is as long as its transposed dy fits into the second-level
// cache, and all blocks are about equally long: a short one would pay for a pass over the results all the same.
// Neither depends on the worker's share, so that no result does.
template <typename T>
struct WeightGradientScratch {
  static constexpr int64_t kBlockBytes = 384 * 1024;
  static constexpr int64_t kLeast = 64;
  static constexpr int64_t kMost = 128;

  int64_t block;
  size_t transposed, panels, errors, size;

  // outputs: all columns of dy; columns: this worker's.
  WeightGradientScratch(int64_t tokens, int64_t outputs, int64_t columns) {
    int64_t fitting = kBlockBytes / (outputs * static_cast<int64_t>(sizeof(T)));
    fitting = fitting < kLeast ? kLeast : fitting > kMost ? kMost : fitting;
    const int64_t blocks = (tokens + fitting - 1) / fitting;
    block = blocks == 0 ? kLanes<T> : (tokens + blocks - 1) / blocks;
    block = (block + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    transposed = 0;
    panels = (static_cast<size_t>(columns * block) * sizeof(T) + 63) / 64 * 64;
    errors = panels + static_cast<size_t>(PanelLayout<T>{block, kPanelVectors * kLanes<T>}.size()) * sizeof(T);
    size = errors + static_cast<size_t>(columns) * sizeof(T);
  }
};

template <typename T>
class WeightGradient {
 public:
  // grads [N, outputs], of which columns [first_column, last_column) are this worker's.
  WeightGradient(const T* grads, int64_t tokens, int64_t outputs, int64_t first_column, int64_t last_column,
                 void* memory)
      : grads_(grads), outputs_(outputs), first_column_(first_column), columns_(last_column - first_column) {
    const WeightGradientScratch<T> scratch(tokens, outputs, columns_);
    block_ = scratch.block;
    transposed_ = reinterpret_cast<T*>(static_cast<char*>(memory) + scratch.transposed);
    panels_ = reinterpret_cast<T*>(static_cast<char*>(memory) + scratch.panels);
    errors_ = reinterpret_cast<T*>(static_cast<char*>(memory) + scratch.errors);
  }

  // Tokens that one call of `start` takes.
  int64_t block() const { return block_; }

  // What is added next is of tokens [first, first + count); the first block's is stored.
  void start(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    for (int64_t k = 0; k < count; k += kLanes<T>) {
      const int64_t lanes = count - k < kLanes<T> ? count - k : kLanes<T>;
      pack_rows(grads(first + k), outputs_, lanes, columns_, transposed_ + k, block_);
    }
  }

  // bias += the sum of dy. Block by block, each with the error of the one before, so that rounding errors do not
  // grow with the number of tokens.
  void add_sum(T* bias) const {
    for (int64_t column = 0; column < columns_; column += kLanes<T>) {
      const int64_t valid = columns_ - column;
      Vec<T> sum = {};
      for (int64_t k = 0; k < count_; ++k) sum = sum + load_part(grads(first_ + k) + column, valid, T(0));
      T* const to = bias + first_column_ + column;
      Vec<T> total = {};
      Vec<T> error = {};
      if (first_ > 0) {
        total = load_part(to, valid, T(0));
        error = load_part(errors_ + column, valid, T(0));
      }
      add_compensated<T>(sum, total, error);
      store_part(to, total, valid);
      store_part(errors_ + column, error, valid);
    }
  }

  // weight [outputs, width] += dy^T x, for this worker's rows of it; rows: x of the block's tokens.
  void add_product(const T* const* rows, int64_t width, T* weight) const {
    const PanelLayout<T> layout{count_, width};
    for (int64_t panel = 0; panel < layout.panels(); ++panel) {
      const int64_t column = layout.first_column(panel);
      with_vectors(layout.panel_vectors(panel), [&]<int V>() {
        for (int64_t k = 0; k < count_; ++k) {
          for (int v = 0; v < V; ++v) {
            const int64_t at = column + v * kLanes<T>;
            store(panels_ + (k * V + v) * kLanes<T>, load_part(rows[k] + at, width - at, T(0)));
          }
        }
        for_row_groups(columns_, [&]<int R>(int64_t row) {
          add_tile<R, V>(row, weight + (first_column_ + row) * width + column, width, width - column);
        });
      });
    }
  }

 private:
  const T* grads(int64_t token) const { return grads_ + token * outputs_ + first_column_; }

  PYMTL_INLINE void add_or_store(T* to, Vec<T> value, int64_t valid) const {
    if (first_ > 0) value = load_part(to, valid, T(0)) + value;
    store_part(to, value, valid);
  }

  template <int R, int V>
  __attribute__((noinline)) void add_tile(int64_t row, T* to, int64_t stride, int64_t valid) const {
    const T* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = transposed_ + (row + r) * block_;
    Vec<T> acc[R][V] = {};
    multiply_tile<T, R, V>(rows, count_, panels_, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) add_or_store(to + r * stride + v * kLanes<T>, acc[r][v], valid - v * kLanes<T>);
    }
  }

  const T* grads_;
  int64_t outputs_;
  int64_t first_column_;
  int64_t columns_;
  int64_t block_;
  T* transposed_;  // dy of the block, [columns][block]
  T* panels_;      // one panel of x of the block
  T* errors_;      // of the bias's sums, [columns]
  int64_t first_ = 0;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace pymtl
