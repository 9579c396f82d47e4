// The projection of all heads over rows of h, its gradients, and the sum of the recurrences' parts.
#pragma once

#include "../kernels.h"
#include "gradients.h"
#include "panels.h"

namespace pymtl {
namespace {

template <typename T>
int64_t heads_panels_size(int64_t depth, int64_t width) {
  return PanelLayout<T>{depth, width}.size();
}

template <typename T>
void pack_heads(const T* weight, int64_t stride, int64_t depth, int64_t width, T* panels) {
  pack_transposed(weight, stride, PanelLayout<T>{depth, width}, panels);
}

// Rows [first, last) of the projection; panels holds the parts one after another. Each part is summed from zero, then
// the parts in order. stride: of the output's rows.
template <typename T>
void heads_rows(const Heads<T>& args, const T* panels, int64_t first, int64_t last, int64_t stride) {
  const PanelLayout<T> layout{args.depth, args.width};
  Products<T> sums, products;
  const auto tile = [&](int64_t panel, int64_t row, int64_t size, auto* multiply) {
    const int64_t vectors = layout.panel_vectors(panel);
    const T* rows[kTileRows];
    for (int64_t part = 0; part < args.parts; ++part) {
      for (int64_t r = 0; r < size; ++r) rows[r] = args.input + ((row + r) * args.parts + part) * args.depth;
      const T* const columns = panels + part * layout.size() + layout.offset(panel);
      multiply(rows, args.depth, columns, part == 0 ? sums.values : products.values);
      if (part > 0) add(products, size * vectors, sums);
    }
    for (int64_t r = 0; r < size; ++r) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t column = layout.first_column(panel) + v * kLanes<T>;
        Vec<T> value = sums.at(r, vectors, v);
        if (args.bias != nullptr) value = value + load_part(args.bias + column, layout.width - column);
        store_part(args.output + (row + r) * stride + column, value, layout.width - column);
      }
    }
  };
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    for_tiles<T>(last - first, layout.panel_vectors(panel),
                 [&](int64_t row, int64_t size, auto* multiply) { tile(panel, first + row, size, multiply); });
  }
}

template <typename T>
void pack_heads_backward(const T* weight, int64_t features, int64_t width, T* panels) {
  pack_columns(weight, PanelLayout<T>{width, features}, panels);
}

template <typename T>
void heads_input_gradient(const HeadsBackward<T>& args, const T* panels, int64_t first, int64_t last) {
  constexpr int64_t kBlock = 8 * kTileRows;
  const PanelLayout<T> layout{args.width, args.features};
  const T* rows[kBlock];
  for (int64_t block = first; block < last; block += kBlock) {
    const int64_t count = last - block < kBlock ? last - block : kBlock;
    for (int64_t n = 0; n < count; ++n) rows[n] = args.grad_output + (block + n) * args.width;
    multiply_panels<T>(rows, count, layout, panels,
                       [&](int64_t n, int64_t column, int64_t valid, Vec<T> value) PYMTL_INLINE_LAMBDA {
                         store_part(args.grad_input + (block + n) * args.features + column, value, valid);
                       });
  }
}

template <typename T>
struct HeadsWeightGradientScratch {
  WeightGradientScratch<T> product;
  size_t sums, size;

  HeadsWeightGradientScratch(const HeadsBackward<T>& args, int64_t columns) : product(args.rows, args.width, columns) {
    sums = (product.size + 63) / 64 * 64;
    size = sums + static_cast<size_t>(weight_gradient_sums<T>(columns, args.features)) * sizeof(Accum<T>);
  }
};

template <typename T>
size_t heads_weight_gradient_scratch(const HeadsBackward<T>& args, int64_t first, int64_t last) {
  return HeadsWeightGradientScratch<T>(args, last - first).size;
}

template <typename T>
void heads_weight_gradient(const HeadsBackward<T>& args, int64_t first_column, int64_t last_column, void* memory) {
  const HeadsWeightGradientScratch<T> scratch(args, last_column - first_column);
  WeightGradient<T> gradient(args.grad_output, args.rows, args.width, first_column, last_column, memory);
  Accum<T>* const sums = reinterpret_cast<Accum<T>*>(static_cast<char*>(memory) + scratch.sums);
  const T* rows[WeightGradientScratch<T>::kMost];
  for (int64_t first = 0; first < args.rows; first += gradient.block()) {
    const int64_t count = args.rows - first < gradient.block() ? args.rows - first : gradient.block();
    for (int64_t k = 0; k < count; ++k) rows[k] = args.input + (first + k) * args.features;
    gradient.start(first, count);
    if (args.grad_weight != nullptr) gradient.add_product(rows, args.features, args.grad_weight, sums);
    if (args.grad_bias != nullptr) gradient.add_sum(args.grad_bias);
  }
}

template <typename T>
void sum_parts(const Accum<T>* partial, int64_t stride, int64_t parts, const T* bias, int64_t width, int64_t first,
               int64_t last, T* output, int64_t output_stride) {
  for (int64_t n = first; n < last; ++n) {
    for (int64_t column = 0; column < width; column += kLanes<T>) {
      const int64_t valid = width - column;
      const Accum<T>* const from = partial + n * width + column;
      Vec<T> value = load_part(from, valid);
      for (int64_t part = 1; part < parts; ++part) value = value + load_part(from + part * stride, valid);
      if (bias != nullptr) value = value + load_part(bias + column, valid);
      store_part(output + n * output_stride + column, value, valid);
    }
  }
}

}  // namespace
}  // namespace pymtl
