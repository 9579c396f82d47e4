// The register-tile kernel every product of this library goes through, and its operand's layout.
//
// A matrix [depth, width] is cut into column panels of up to 4 vectors; a panel is stored [depth][vectors]
// [lanes], so the kernel streams it. A tile multiplies up to kTileRows rows with one panel; every element
// of the result is summed in order of the depth, in the same chains of fused multiply-adds whatever the tile's
// size.
#pragma once

#include "bfloat16.h"

namespace pymtl {
namespace {

constexpr int kPanelVectors = 4;

// Calls tile.operator()<R>(first, ...) for groups of rows of nearly equal size, none above kMost <= 6.
template <int kMost = kTileRows, typename Tile>
PYMTL_INLINE void for_row_groups(int64_t rows, Tile&& tile) {
  const int64_t groups = (rows + kMost - 1) / kMost;
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
#define PYMTL_LARGE_TILE(R)                                       \
  case R:                                                         \
    if constexpr (kMost >= R) tile.template operator()<R>(first); \
    break;
        PYMTL_LARGE_TILE(3)
        PYMTL_LARGE_TILE(4)
        PYMTL_LARGE_TILE(5)
        PYMTL_LARGE_TILE(6)
#undef PYMTL_LARGE_TILE
    }
    first += size;
  }
}

// Whether to ask for what a tile adds to before it is needed. It was measured, and pays, on a CPU with AVX2 alone.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kPrefetches = true;
#else
constexpr bool kPrefetches = false;
#endif

// Asks for rows of V vectors.
template <int V, typename R>
PYMTL_INLINE void prefetch_rows(const R* rows, int64_t stride, int64_t count) {
  if constexpr (!kPrefetches) return;
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(R));
  for (int64_t r = 0; r < count; ++r) {
#pragma GCC unroll 8
    for (int64_t at = 0; at < V * kLanes<R>; at += line) __builtin_prefetch(rows + r * stride + at);
  }
}

// Rows of T meet panels whose numbers are W: T, or bfloat16 numbers for rows of float, which are widened first.
template <int Step, typename T, typename W>
PYMTL_INLINE Vec<T> operand_for(const T* row) {
  if constexpr (std::is_same_v<T, W>) {
    return row_operand<Step>(row);
  } else {
    return broadcast(row[Step]);
  }
}

// acc[r][v] += row[r][k] * panels[k][v] for the next depth group of panels of C vectors, `apart` from each other.
template <typename T, int C, int R, int V, typename W>
PYMTL_INLINE void multiply_group(const T* const (&row)[R], int64_t k, const W* panels, int64_t apart,
                                 Vec<T> (&acc)[R][V]) {
  const auto vector = [&](int v)
                          PYMTL_INLINE_LAMBDA { return panels + v / C * apart + v % C * (kLanes<T> * kDepthGroup<W>); };
  const auto multiply = [&]<int Step>() PYMTL_INLINE_LAMBDA {
    // Whichever operand has fewer vectors stays in registers while the other is streamed.
    if constexpr (R <= V) {
      Vec<T> x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) x[r] = operand_for<Step, T, W>(row[r] + k);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const Vec<T> w = panel_operand<Step>(vector(v));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][v] = multiply_add<T>(x[r], w, acc[r][v]);
      }
    } else {
      Vec<T> w[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) w[v] = panel_operand<Step>(vector(v));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<T> x = operand_for<Step, T, W>(row[r] + k);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] = multiply_add<T>(x, w[v], acc[r][v]);
      }
    }
  };
  multiply.template operator()<0>();
  if constexpr (kSteps<W> == 2) multiply.template operator()<1>();
}

// acc[r][v] += sum_k rows[r][k] * panels[k][v]
template <typename T, int C, int R, int V, typename W>
PYMTL_INLINE void multiply_tile(const T* const* rows, int64_t depth, const W* panels, int64_t apart,
                                Vec<T> (&acc)[R][V]) {
  const T* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  int64_t k = 0;
#pragma GCC unroll 2
  for (; k + kDepthGroup<W> <= depth; k += kDepthGroup<W>) {
    multiply_group<T, C>(row, k, panels, apart, acc);
    panels += C * kLanes<T> * kDepthGroup<W>;
  }
  if constexpr (kDepthGroup<W> > 1) {
    if (k == depth) return;
    T last[R][kDepthGroup<W>] = {};  // a row ends within the group, a panel is zero there
    for (int r = 0; r < R; ++r) {
      last[r][0] = row[r][k];
      row[r] = last[r];
    }
    multiply_group<T, C>(row, 0, panels, apart, acc);
  }
}

// How much of the depth is summed in one chain. Rounding errors of a longer chain would grow beyond those of
// libraries that sum in blocks.
constexpr int64_t kChain = 64;

// acc[r][v] += sum_k rows[r][k] * panels[k][v]; above kChain in chains of their own, added in order.
template <typename T, int C, int R, int V, typename W>
PYMTL_INLINE void multiply_deep(const T* const* rows, int64_t depth, const W* panels, int64_t apart,
                                Vec<T> (&acc)[R][V]) {
  alignas(64) Accum<T> sums[R][V][kLanes<T>];
  for (int64_t k = 0;; k += kChain) {
    const bool last = depth - k <= kChain;
    const T* parts[R];
    for (int r = 0; r < R; ++r) parts[r] = rows[r] + k;
    multiply_tile<T, C>(parts, last ? depth - k : kChain, panels + k * C * kLanes<T>, apart, acc);
    if (last && k == 0) return;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
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

// The depth group at k of one vector of columns, as bits, from the rows that row_at(k) points into; past `depth` they
// are zero.
template <typename T, typename RowAt>
PYMTL_INLINE Vec<T> load_group(RowAt&& row_at, int64_t k, int64_t depth, int64_t valid) {
  const Vec<T> first = k < depth ? load_part(row_at(k), valid) : Vec<T>{};
  if constexpr (kDepthGroup<T> == 1) {
    return first;
  } else {
    return pair(first, k + 1 < depth ? load_part(row_at(k + 1), valid) : Vec<T>{});
  }
}

template <typename T>
PYMTL_INLINE void store_group(T* to, Vec<T> group) {
  store(reinterpret_cast<Accum<T>*>(to), group);
}

// A square of rows x depth groups, transposed by moving whole groups: as bits, in vectors of Accum<T>.
template <typename T>
PYMTL_INLINE void transpose_groups(const T* rows, int64_t row_stride, T* to, int64_t stride) {
  constexpr int n = kLanes<T>;
  Vec<T> square[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) square[i] = load(reinterpret_cast<const Accum<T>*>(rows + i * row_stride));
  transpose<Accum<T>>(square);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) store_group<T>(to + i * stride, square[i]);
}

// A vector's column of a panel from `count` <= lanes rows of a row-major matrix: the depth group at k of all lanes
// goes to panel + k / kDepthGroup * stride. Lanes past `count` and depths past `depth` become zero.
template <typename T>
void pack_rows(const T* rows, int64_t row_stride, int64_t count, int64_t depth, T* panel, int64_t stride) {
  constexpr int n = kLanes<T>;
  constexpr int group = kDepthGroup<T>;
  int64_t k = 0;
  if (count == n) {
    for (; k + n * group <= depth; k += n * group) {
      transpose_groups(rows + k, row_stride, panel + k / group * stride, stride);
    }
  }
  for (; k < padded_depth<T>(depth); ++k) {
    T* const to = panel + k / group * stride + k % group;
    for (int64_t i = 0; i < n; ++i) to[i * group] = i < count && k < depth ? rows[i * row_stride + k] : T{};
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
  int64_t size() const { return vectors() * kLanes<T> * padded_depth<T>(depth); }
  int64_t panel_vectors(int64_t panel) const { return first_vector(panel + 1) - first_vector(panel); }
  int64_t first_vector(int64_t panel) const { return vectors() * panel / panels(); }
  int64_t first_column(int64_t panel) const { return first_vector(panel) * kLanes<T>; }
  int64_t offset(int64_t panel) const { return first_column(panel) * padded_depth<T>(depth); }
};

// panels <- weight^T, weight [width, depth] with rows `stride` apart.
template <typename T>
void pack_transposed(const T* weight, int64_t stride, PanelLayout<T> layout, T* panels) {
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    const int64_t vectors = layout.panel_vectors(panel);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t first = layout.first_column(panel) + v * kLanes<T>;
      const int64_t count = layout.width - first < kLanes<T> ? layout.width - first : kLanes<T>;
      pack_rows(weight + first * stride, stride, count, layout.depth,
                panels + layout.offset(panel) + v * kLanes<T> * kDepthGroup<T>, vectors * kLanes<T> * kDepthGroup<T>);
    }
  }
}

// The panel at which the part-th of `parts` equal parts of all begins.
inline int64_t first_panel(int64_t panels, int64_t part, int64_t parts) { return panels * part / parts; }

// The part-th of `parts` equal parts of panels <- matrix [depth, width], contiguous, from its row `rotation` on and
// round.
template <typename T>
void pack_columns(const T* matrix, PanelLayout<T> layout, T* panels, int64_t part = 0, int64_t parts = 1,
                  int64_t rotation = 0) {
  const int64_t last = first_panel(layout.panels(), part + 1, parts);
  for (int64_t panel = first_panel(layout.panels(), part, parts); panel < last; ++panel) {
    T* to = panels + layout.offset(panel);
    const int64_t vectors = layout.panel_vectors(panel);
    for (int64_t k = 0; k < layout.depth; k += kDepthGroup<T>) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t first = layout.first_column(panel) + v * kLanes<T>;
        const auto row = [&](int64_t at) {
          const int64_t from = at + rotation;
          return matrix + (from < layout.depth ? from : from - layout.depth) * layout.width + first;
        };
        store_group<T>(to, load_group<T>(row, k, layout.depth, layout.width - first));
        to += kLanes<T> * kDepthGroup<T>;
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

// products[r][v] = sum_k rows[r][k] * panel[k][v]. A function of its own, shared by all who multiply so: inlined into
// each, the tiles' sizes would make for as many copies.
template <typename T, int R, int V>
__attribute__((noinline)) void multiply_rows(const T* const* rows, int64_t depth, const T* panel, Accum<T>* products) {
  Vec<T> acc[R][V] = {};
  multiply_deep<T, V>(rows, depth, panel, 0, acc);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(products + (r * V + v) * kLanes<T>, acc[r][v]);
  }
}

// A tile's products: rows x a panel's vectors.
template <typename T>
struct Products {
  alignas(64) Accum<T> values[kTileRows * kPanelVectors * kLanes<T>];

  // Of a panel of `vectors`.
  Vec<T> at(int64_t row, int64_t vectors, int64_t v) const { return load(values + (row * vectors + v) * kLanes<T>); }
};

template <typename T>
void add(const Products<T>& products, int64_t vectors, Products<T>& sums) {
  for (int64_t v = 0; v < vectors; ++v) {
    Accum<T>* const sum = sums.values + v * kLanes<T>;
    store(sum, load(sum) + load(products.values + v * kLanes<T>));
  }
}

// Calls body(first, count, multiply) for tiles of rows; multiply(rows, panel, products) is multiply_rows for them.
template <typename T, typename Body>
PYMTL_INLINE void for_tiles(int64_t rows, int64_t vectors, Body&& body) {
  with_vectors(vectors, [&]<int V>() {
    for_row_groups(rows, [&]<int R>(int64_t first) { body(first, R, multiply_rows<T, R, V>); });
  });
}

// Calls body(panel) for [first_panel, last_panel), at every other step in reverse order: the panels that one step read
// last are still in the cache for the next. In a fixed order, weights larger than the cache would always miss it.
template <typename Body>
PYMTL_INLINE void for_panels(int64_t first_panel, int64_t last_panel, int64_t step, Body&& body) {
  const bool up = step % 2 == 0;
  for (int64_t i = first_panel; i < last_panel; ++i) body(up ? i : first_panel + last_panel - 1 - i);
}

// Row n of the product of `rows` with the panels [first_panel, last_panel), handed to done(n, first_column,
// valid_columns, vector).
template <typename T, typename Done>
void multiply_panels(const T* const* rows, int64_t count, PanelLayout<T> layout, const T* panels, Done&& done,
                     int64_t first_panel, int64_t last_panel, int64_t step = 0) {
  Products<T> products;
  const auto tile = [&](int64_t panel, int64_t first, int64_t size, auto* multiply) {
    multiply(rows + first, layout.depth, panels + layout.offset(panel), products.values);
    const int64_t vectors = layout.panel_vectors(panel);
    for (int64_t r = 0; r < size; ++r) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t column = layout.first_column(panel) + v * kLanes<T>;
        done(first + r, column, layout.width - column, products.at(r, vectors, v));
      }
    }
  };
  for_panels(first_panel, last_panel, step, [&](int64_t panel) {
    for_tiles<T>(count, layout.panel_vectors(panel),
                 [&](int64_t first, int64_t size, auto* multiply) { tile(panel, first, size, multiply); });
  });
}

template <typename T, typename Done>
void multiply_panels(const T* const* rows, int64_t count, PanelLayout<T> layout, const T* panels, Done&& done) {
  multiply_panels<T>(rows, count, layout, panels, done, 0, layout.panels());
}

}  // namespace
}  // namespace pymtl
