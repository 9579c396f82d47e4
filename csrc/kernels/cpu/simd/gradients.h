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
  size_t transposed, panels, totals, errors, size;

  // outputs: all columns of dy; columns: this worker's.
  WeightGradientScratch(int64_t tokens, int64_t outputs, int64_t columns) {
    int64_t fitting = kBlockBytes / (outputs * static_cast<int64_t>(sizeof(T)));
    fitting = fitting < kLeast ? kLeast : fitting > kMost ? kMost : fitting;
    const int64_t blocks = (tokens + fitting - 1) / fitting;
    constexpr int64_t group = kLanes<T> * kDepthGroup<T>;
    block = blocks == 0 ? group : (tokens + blocks - 1) / blocks;
    block = (block + group - 1) / group * group;
    transposed = 0;
    panels = (static_cast<size_t>(columns * block) * sizeof(T) + 63) / 64 * 64;
    totals = panels + static_cast<size_t>(PanelLayout<T>{block, kPanelVectors * kLanes<T>}.size()) * sizeof(T);
    errors = totals + static_cast<size_t>(columns) * sizeof(Accum<T>);
    size = errors + static_cast<size_t>(columns) * sizeof(Accum<T>);
  }
};

// How many numbers the sums of [columns, width] weights take while blocks of tokens follow: none where the result
// itself can hold them.
template <typename T>
int64_t weight_gradient_sums(int64_t columns, int64_t width) {
  return kDepthGroup<T> == 1 ? 0 : columns * width;
}

// Columns [first, last) of dy, and the row of the weights that the first of them belongs to, less `first`.
struct RowRange {
  int64_t first;
  int64_t last;
  int64_t shift;
};

template <typename T>
class WeightGradient {
 public:
  // grads [N, outputs], of which columns [first_column, last_column) are this worker's.
  WeightGradient(const T* grads, int64_t tokens, int64_t outputs, int64_t first_column, int64_t last_column,
                 void* memory)
      : grads_(grads),
        tokens_(tokens),
        outputs_(outputs),
        first_column_(first_column),
        columns_(last_column - first_column) {
    const WeightGradientScratch<T> scratch(tokens, outputs, columns_);
    char* const bytes = static_cast<char*>(memory);
    block_ = scratch.block;
    transposed_ = reinterpret_cast<T*>(bytes + scratch.transposed);
    panels_ = reinterpret_cast<T*>(bytes + scratch.panels);
    totals_ = reinterpret_cast<Accum<T>*>(bytes + scratch.totals);
    errors_ = reinterpret_cast<Accum<T>*>(bytes + scratch.errors);
  }

  // Tokens that one call of `start` takes.
  int64_t block() const { return block_; }

  // What is added next is of tokens [first, first + count); the first block's is stored.
  void start(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    constexpr int n = kLanes<T>;
    for (int64_t k = 0; k < count; k += n * kDepthGroup<T>) {
      for (int64_t column = 0; column < columns_; column += n) {
        const int64_t valid = columns_ - column;
        const auto row = [&](int64_t at) { return grads(first + at) + column; };
        Vec<T> square[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) square[i] = load_group<T>(row, k + i * kDepthGroup<T>, count, valid);
        transpose<Accum<T>>(square);
        T* const to = transposed_ + column * block_ + k;
        if (valid >= n) {
#pragma GCC unroll 16
          for (int i = 0; i < n; ++i) store_group<T>(to + i * block_, square[i]);
        } else {
          for (int64_t i = 0; i < valid; ++i) store_group<T>(to + i * block_, square[i]);
        }
      }
    }
  }

  // bias += the sum of dy. Block by block, each with the error of the one before, so that rounding errors do not
  // grow with the number of tokens.
  void add_sum(T* bias) const {
    for (int64_t column = 0; column < columns_; column += kLanes<T>) {
      const int64_t valid = columns_ - column;
      Vec<T> sum = {};
      for (int64_t k = 0; k < count_; ++k) sum = sum + load_part(grads(first_ + k) + column, valid);
      Vec<T> total = {};
      Vec<T> error = {};
      if (first_ > 0) {
        total = load_part(totals_ + column, valid);
        error = load_part(errors_ + column, valid);
      }
      add_compensated<Accum<T>>(sum, total, error);
      store_part(totals_ + column, total, valid);
      store_part(errors_ + column, error, valid);
      if (is_last()) store_part(bias + first_column_ + column, total, valid);
    }
  }

  // weight [outputs, width] += dy^T x, for this worker's rows of it; rows: x of the block's tokens. sums: as
  // many numbers as weight_gradient_sums says.
  void add_product(const T* const* rows, int64_t width, T* weight, Accum<T>* sums = nullptr) const {
    const RowRange all[1] = {{0, outputs_, 0}};
    add_product(rows, width, weight, all, sums);
  }

  // The same where only some columns of dy belong to rows of the weight.
  template <int N>
  void add_product(const T* const* rows, int64_t width, T* weight, const RowRange (&ranges)[N], Accum<T>* sums) const {
    const PanelLayout<T> layout{count_, width};
    for (int64_t panel = 0; panel < layout.panels(); ++panel) {
      const int64_t column = layout.first_column(panel);
      with_vectors(layout.panel_vectors(panel), [&]<int V>() {
        T* to = panels_;
        for (int64_t k = 0; k < count_; k += kDepthGroup<T>) {
          for (int v = 0; v < V; ++v) {
            const int64_t first = column + v * kLanes<T>;
            const auto row = [&](int64_t at) { return rows[at] + first; };
            store_group<T>(to, load_group<T>(row, k, count_, width - first));
            to += kLanes<T> * kDepthGroup<T>;
          }
        }
        for (const RowRange& range : ranges) {
          const int64_t first = range.first > first_column_ ? range.first - first_column_ : 0;
          const int64_t last = range.last - first_column_ < columns_ ? range.last - first_column_ : columns_;
          for_row_groups(last - first, [&]<int R>(int64_t at) {
            const int64_t row = first + at;
            T* const result = weight + (first_column_ + row + range.shift) * width + column;
            if constexpr (kDepthGroup<T> == 1) {
              add_tile<R, V>(row, result, result, width, width - column);
            } else {
              add_tile<R, V>(row, sums + row * width + column, result, width, width - column);
            }
          });
        }
      });
    }
  }

 private:
  const T* grads(int64_t token) const { return grads_ + token * outputs_ + first_column_; }

  bool is_last() const { return first_ + count_ == tokens_; }

  template <int R, int V>
  __attribute__((noinline)) void add_tile(int64_t row, Accum<T>* sums, T* result, int64_t stride, int64_t valid) const {
    const T* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = transposed_ + (row + r) * block_;
    prefetch_rows<V>(sums, stride, R);
    Vec<T> acc[R][V] = {};
    multiply_tile<T, V>(rows, count_, panels_, 0, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const int64_t at = r * stride + v * kLanes<T>;
        if (first_ > 0) acc[r][v] = load_part(sums + at, valid - v * kLanes<T>) + acc[r][v];
        if (kDepthGroup<T> > 1 && is_last()) {
          store_part(result + at, acc[r][v], valid - v * kLanes<T>);
        } else {
          store_part(sums + at, acc[r][v], valid - v * kLanes<T>);
        }
      }
    }
  }

  const T* grads_;
  int64_t tokens_;
  int64_t outputs_;
  int64_t first_column_;
  int64_t columns_;
  int64_t block_;
  T* transposed_;     // dy of the block, [columns][block]
  T* panels_;         // one panel of x of the block
  Accum<T>* totals_;  // of the bias's sums, [columns]
  Accum<T>* errors_;  // of the same
  int64_t first_ = 0;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace pymtl
