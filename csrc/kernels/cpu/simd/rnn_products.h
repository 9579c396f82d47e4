// The products of a time loop: rows of x or of h times panels of weights, whose numbers are W, T or narrower.
#pragma once

#include <limits>

#include "rnn_panels.h"

namespace pymtl {
namespace {

// to[r] = rows[r] * V vectors in panels of C, the first S of them plus from[r] and the others plus `rest`. A function
// of its own, so that the accumulators have the registers to themselves.
template <typename T, int R, int V, int C, int S, typename W>
__attribute__((noinline)) void add_product(const T* const* rows, int64_t depth, const W* panels, int64_t apart,
                                           const Accum<T>* from, int64_t from_stride, const Accum<T>* rest,
                                           Accum<T>* to, int64_t to_stride) {
  Vec<T> acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      acc[r][v] = v < S ? load(from + r * from_stride + v * kLanes<T>) : load(rest + (v - S) * kLanes<T>);
    }
  }
  multiply_deep<T, C>(rows, depth, panels, apart, acc);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(to + r * to_stride + v * kLanes<T>, acc[r][v]);
  }
}

// How much of a panel all tokens of a block are multiplied with before they go on to the next part. Tiles of few rows
// read a panel often: the part stays in the first-level cache.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t kDepthBlock = 2 * kChain;
#else
constexpr int64_t kDepthBlock = std::numeric_limits<int64_t>::max();
#endif

// The same where `to` has the sums of smaller depths already: goes on with whole chains.
template <typename T, int R, int V, typename W>
__attribute__((noinline)) void add_chains(const T* const* rows, int64_t depth, const W* panel, Accum<T>* to,
                                          int64_t to_stride) {
  for (int64_t k = 0; k < depth; k += kChain) {
    const T* parts[R];
    for (int r = 0; r < R; ++r) parts[r] = rows[r] + k;
    Vec<T> acc[R][V] = {};
    multiply_tile<T, V>(parts, depth - k < kChain ? depth - k : kChain, panel + k * V * kLanes<T>, 0, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Accum<T>* const sum = to + r * to_stride + v * kLanes<T>;
        store(sum, load(sum) + acc[r][v]);
      }
    }
  }
}

// Takes some rows at a time and multiplies them with panels of V vectors (quantised.h has its own for integers).
template <typename T, typename W>
class RnnProducts {
  using R = Accum<T>;

 public:
  // Bytes of memory for that many rows.
  static size_t scratch(int64_t, int64_t) { return 0; }

  explicit RnnProducts(void*) {}

  void take(const T* const* rows, int64_t count, int64_t depth) {
    rows_ = rows;
    count_ = count;
    depth_ = depth;
  }

  // to[r] = bias + row r * panel, of all rows.
  template <int V>
  void project(const W* panel, const R* bias, R* to, int64_t stride) const {
    for (int64_t k = 0, depth; k == 0 || k < depth_; k += depth) {
      depth = depth_ - k < kDepthBlock ? depth_ - k : kDepthBlock;
      const W* const block = panel + k * V * kLanes<T>;
      for_row_groups(count_, [&]<int Rows>(int64_t row) {
        const T* rows[Rows];
        for (int r = 0; r < Rows; ++r) rows[r] = rows_[row + r] + k;
        if (k == 0) {
          add_product<T, Rows, V, V, V>(rows, depth, block, 0, bias, 0, nullptr, to + row * stride, stride);
        } else {
          add_chains<T, Rows, V>(rows, depth, block, to + row * stride, stride);
        }
      });
    }
  }

  // to[r] = row first + r * panel for `count` rows, the first S vectors plus from[r], the others plus `rest`.
  template <int V, int S>
  void add(int64_t first, int64_t count, const W* panel, const R* from, int64_t from_stride, const R* rest, R* to,
           int64_t to_stride) const {
    for_row_groups(count, [&]<int Rows>(int64_t row) {
      const int64_t next = row + Rows;
      prefetch_rows<S>(from + next * from_stride, from_stride, count - next < kTileRows ? count - next : kTileRows);
      add_product<T, Rows, V, V, S>(rows_ + first + row, depth_, panel, 0, from + row * from_stride, from_stride, rest,
                                    to + row * to_stride, to_stride);
    });
  }

  // The same of a single row with several panels, which lie one after another as their sums do: one panel alone has too
  // few sums to keep the multipliers busy, and is read in too few places at once. `rest` is that of the first panel,
  // the next ones' are `rest_apart` apart.
  template <int V, int S, int Panels>
  void add_panels(int64_t row, const W* panels, const R* from, const R* rest, int64_t rest_apart, R* to) const {
    for (int panel = 0; panel < Panels; ++panel) {
      for (int v = 0; v < V; ++v) {
        const int64_t at = (panel * V + v) * kLanes<T>;
        store(to + at, v < S ? load(from + at) : load(rest + panel * rest_apart + (v - S) * kLanes<T>));
      }
    }
    constexpr int kAll = Panels * V;
    const int64_t apart = V * kLanes<T> * padded_depth<W>(depth_);
    add_product<T, 1, kAll, V, kAll>(rows_ + row, depth_, panels, apart, to, 0, nullptr, to, 0);
  }

 private:
  const T* const* rows_ = nullptr;
  int64_t count_ = 0;
  int64_t depth_ = 0;
};

}  // namespace
}  // namespace pymtl
