// The scratch memory of a time loop.
#pragma once

#include "rnn_products.h"

namespace pymtl {
namespace {

// How a time loop's scratch memory is laid out. Every array starts on a cache line.
template <typename T, typename Cell, typename W = T>
struct RnnScratch {
  using Layout = RnnPanels<T, Cell, W>;
  using Products = RnnProducts<T, W>;
  // Gates of this many tokens are projected at a time: as many as stay in the second-level cache until the time loop
  // reads them, but at least kLeastBlock. Each block reads all of W_ih; where that is large, to read it for fewer
  // tokens would cost more than gates that leave the cache.
  static constexpr int64_t kBlockBytes = 192 * 1024;
  static constexpr int64_t kLeastBlock = 96;
  // Rows that begin a multiple of kAlike bytes apart compete for the same places of a first-level cache: those of such
  // a length are a line longer.
  static constexpr int64_t kAlike = 1024;
  static constexpr int64_t kLine = 64;
  // h of this many tokens waits in first-level cache for the heads' projection.
  static constexpr int64_t kHeadTokens = 4 * kTileRows;

  int64_t rows;
  int64_t units;
  int64_t block;  // tokens of a block, unless one step alone has more
  int64_t slots;  // steps of h that are kept
  size_t pointers, waiting, waiting_rows, panel, products, gates, hidden, masked, cell, cell_before, sums, sum, max,
      size;

  explicit RnnScratch(const RnnTimeLoop<T>& loop) {
    rows = loop.last_row - loop.first_row;
    units = Layout{loop.input_size, loop.hidden_size}.units();
    if (units * static_cast<int64_t>(sizeof(Accum<T>)) % kAlike == 0) units += kLine / static_cast<int64_t>(sizeof(T));
    const int64_t fitting = kBlockBytes / (Cell::kGates * units * static_cast<int64_t>(sizeof(Accum<T>)));
    block = fitting < kLeastBlock ? kLeastBlock : fitting;
    const int64_t all = loop.starts[loop.steps] - loop.starts[0];
    if (block > all) block = all;
    if (block < rows) block = rows;
    // Every size below grows with `rows`, so that a plan made for the whole batch fits each slice of it.
    const bool heads = loop.head_panels != nullptr;
    slots = heads && rows > 0 ? (kHeadTokens + rows - 1) / rows + 1 : 2;
    const int64_t reserve = (heads ? kHeadTokens : 0) + 2 * rows;
    size_t at = 0;
    const auto take = [&at](int64_t count, size_t bytes) {
      const size_t here = at;
      at += (static_cast<size_t>(count) * bytes + 63) / 64 * 64;
      return here;
    };
    pointers = take(block, sizeof(const T*));
    waiting = take(heads ? reserve : 0, sizeof(const T*));
    waiting_rows = take(heads ? reserve : 0, sizeof(Accum<T>*));
    const bool deep_input = !Cell::kNormalised && loop.input_size > loop.hidden_size;
    const int64_t depth = deep_input ? loop.input_size : loop.hidden_size;
    panel = take(loop.weights != nullptr ? Layout::panel_size(depth) : 0, sizeof(T));
    const size_t of_input = Cell::kNormalised ? 0 : Products::scratch(block, loop.input_size);
    const size_t of_hidden = Products::scratch(rows, loop.hidden_size);
    products = take(static_cast<int64_t>(of_input > of_hidden ? of_input : of_hidden), 1);
    gates = take(block * Cell::kGates * units, sizeof(Accum<T>));
    hidden = take(reserve * units, sizeof(T));
    masked = take(loop.masks.dropout != nullptr ? reserve * units : 0, sizeof(T));
    cell = take(Cell::kHasCell ? rows * units : 0, sizeof(Accum<T>));
    cell_before = take(loop.masks.zoneout_c != nullptr ? rows * units : 0, sizeof(Accum<T>));
    sums = take(Cell::kNormalised ? rows * Cell::kGates * units : 0, sizeof(Accum<T>));
    sum = take(loop.mean != nullptr ? 2 * rows * units : 0, sizeof(Accum<T>));
    max = take(loop.max != nullptr ? rows * units : 0, sizeof(Accum<T>));
    size = at;
  }
};

template <typename T, typename W = T>
size_t rnn_scratch(const RnnTimeLoop<T>& loop) {
  return with_cell(loop.cell, [&]<typename C>() { return RnnScratch<T, C, W>(loop).size; });
}

}  // namespace
}  // namespace pymtl
