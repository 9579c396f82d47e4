// The register-tile kernel every product of this library goes through, and its operand's layout.
//
// A matrix [depth, width] is cut into column panels of up to 4 vectors; a panel is stored [depth][vectors]
// [lanes], so the kernel streams it. A tile multiplies up to kTileRows rows with one panel; every element
// of the result is summed in order of the depth, in the same chains of fused multiply-adds whatever the tile's
// size.
#pragma once

#include "simd.h"

namespace pymtl {
namespace {

constexpr int kPanelVectors = 4;

// Calls tile.operator()<R>(first, ...) for groups of rows of nearly equal size, none above kTileRows.
template <typename Tile>
PYMTL_INLINE void for_row_groups(int64_t rows, Tile&& tile) {
  const int64_t groups = (rows + kTileRows - 1) / kTileRows;
  int64_t first = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t size = (rows - first + (groups - g) - 1) / (groups - g);
    switch (size) {
      case 1:
        tile.template operator()<1>(first);
        break;
      case 2:
        tile.template operator()<2>(first);
        break;
      case 3:
        tile.template operator()<3>(first);
        break;
#define PYMTL_LARGE_TILE(R)                                           \
  case R:                                                             \
    if constexpr (kTileRows >= R) tile.template operator()<R>(first); \
    break;
        PYMTL_LARGE_TILE(4)
        PYMTL_LARGE_TILE(5)
        PYMTL_LARGE_TILE(6)
#undef PYMTL_LARGE_TILE
    }
    first += size;
  }
}

// acc[r][v] += sum_k rows[r][k] * panel[k][v]
template <typename T, int R, int V>
PYMTL_INLINE void multiply_tile(const T* const* rows, int64_t depth, const T* panel, Vec<T> (&acc)[R][V]) {
  const T* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = rows[r];
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    // Whichever operand has fewer vectors stays in registers while the other passes by.
    if constexpr (R <= V) {
      Vec<T> x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) x[r] = broadcast(row[r][k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec<T> w = load(panel + v * kLanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][v] = fma(x[r], w, acc[r][v]);
      }
    } else {
      Vec<T> w[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) w[v] = load(panel + v * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<T> x = broadcast(row[r][k]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] = fma(x, w[v], acc[r][v]);
      }
    }
    panel += V * kLanes<T>;
  }
}

// How much of the depth is summed in one chain. Rounding errors of a longer chain would grow beyond those of
// libraries that sum in blocks.
constexpr int64_t kChain = 256;

// acc[r][v] += sum_k rows[r][k] * panel[k][v]; above kChain in chains of their own, added in order.
template <typename T, int R, int V>
PYMTL_INLINE void multiply_deep(const T* const* rows, int64_t depth, const T* panel, Vec<T> (&acc)[R][V]) {
  alignas(64) T sums[R][V][kLanes<T>];
  for (int64_t k = 0;; k += kChain) {
    const bool last = depth - k <= kChain;
    const T* parts[R];
    for (int r = 0; r < R; ++r) parts[r] = rows[r] + k;
    multiply_tile<T, R, V>(parts, last ? depth - k : kChain, panel + k * V * kLanes<T>, acc);
    if (last && k == 0) return;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        if (k > 0) acc[r][v] = load(sums[r][v]) + acc[r][v];
        if (last) continue;
        store(sums[r][v], acc[r][v]);
        acc[r][v] = Vec<T>{};
      }
    }
    if (last) return;
  }
}

// panel[k * stride + lane] = rows[lane * row_stride + k] for k in [0, depth): a vector's column of a panel
// from `count` <= lanes rows of a row-major matrix; lanes past `count` become zero.
template <typename T>
void pack_rows(const T* rows, int64_t row_stride, int64_t count, int64_t depth, T* panel, int64_t stride) {
  constexpr int n = kLanes<T>;
  int64_t k = 0;
  if (count == n) {
    for (; k + n <= depth; k += n) {
      Vec<T> square[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) square[i] = load(rows + i * row_stride + k);
      transpose<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) store(panel + (k + i) * stride, square[i]);
    }
  }
  for (; k < depth; ++k) {
    for (int64_t i = 0; i < n; ++i) panel[k * stride + i] = i < count ? rows[i * row_stride + k] : T(0);
  }
}

// Where the panels of a matrix [depth, width] begin, and how wide they are: all about the same, since a narrow
// panel has too few accumulators to keep the multipliers busy.
template <typename T>
struct PanelLayout {
  int64_t depth;
  int64_t width;

  int64_t vectors() const { return (width + kLanes<T> - 1) / kLanes<T>; }
  int64_t panels() const { return (vectors() + kPanelVectors - 1) / kPanelVectors; }
  int64_t size() const { return vectors() * kLanes<T> * depth; }
  int64_t panel_vectors(int64_t panel) const { return first_vector(panel + 1) - first_vector(panel); }
  int64_t first_vector(int64_t panel) const { return vectors() * panel / panels(); }
  int64_t first_column(int64_t panel) const { return first_vector(panel) * kLanes<T>; }
  int64_t offset(int64_t panel) const { return first_column(panel) * depth; }
};

// panels <- weight^T, weight [width, depth] with rows `stride` apart.
template <typename T>
void pack_transposed(const T* weight, int64_t stride, PanelLayout<T> layout, T* panels) {
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    const int64_t vectors = layout.panel_vectors(panel);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t first = layout.first_column(panel) + v * kLanes<T>;
      const int64_t count = layout.width - first < kLanes<T> ? layout.width - first : kLanes<T>;
      pack_rows(weight + first * stride, stride, count, layout.depth, panels + layout.offset(panel) + v * kLanes<T>,
                vectors * kLanes<T>);
    }
  }
}

// panels <- matrix [depth, width], contiguous.
template <typename T>
void pack_columns(const T* matrix, PanelLayout<T> layout, T* panels) {
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    T* to = panels + layout.offset(panel);
    const int64_t vectors = layout.panel_vectors(panel);
    for (int64_t k = 0; k < layout.depth; ++k) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t first = layout.first_column(panel) + v * kLanes<T>;
        store(to, load_part(matrix + k * layout.width + first, layout.width - first, T(0)));
        to += kLanes<T>;
      }
    }
  }
}

// Calls body.operator()<V>() with the panel's number of vectors.
template <typename Body>
PYMTL_INLINE void with_vectors(int64_t vectors, Body&& body) {
  switch (vectors) {
    case 1:
      body.template operator()<1>();
      break;
    case 2:
      body.template operator()<2>();
      break;
    case 3:
      body.template operator()<3>();
      break;
    case 4:
      body.template operator()<4>();
      break;
  }
}

// Row n of the product of `rows` with the panels, handed to done(n, first_column, valid_columns, vector).
template <typename T, typename Done>
void multiply_panels(const T* const* rows, int64_t count, PanelLayout<T> layout, const T* panels, Done&& done) {
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    const T* const columns = panels + layout.offset(panel);
    with_vectors(layout.panel_vectors(panel), [&]<int V>() {
      for_row_groups(count, [&]<int R>(int64_t first) {
        Vec<T> acc[R][V] = {};
        multiply_deep<T, R, V>(rows + first, layout.depth, columns, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) {
            const int64_t column = layout.first_column(panel) + v * kLanes<T>;
            done(first + r, column, layout.width - column, acc[r][v]);
          }
        }
      });
    });
  }
}

}  // namespace
}  // namespace pymtl
