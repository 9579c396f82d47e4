// The projection of all heads over rows of h, its gradients, and the sum of the recurrences' parts.
#pragma once

#include "gradients_simd.h"
#include "kernels.h"
#include "panels.h"

namespace pymtl {
namespace {

template <typename T>
int64_t heads_packed_size(int64_t depth, int64_t width) {
  return PanelLayout<T>{depth, width}.size();
}

template <typename T>
void pack_heads(const T* weight, int64_t stride, int64_t depth, int64_t width, T* packed) {
  pack_transposed(weight, stride, PanelLayout<T>{depth, width}, packed);
}

// Rows [first, last) of the projection, all parts; packed holds the parts one after another.
template <typename T>
void heads_rows(const Heads<T>& args, const T* packed, int64_t first, int64_t last) {
  constexpr int64_t kBlock = 4 * kTileRows;
  const PanelLayout<T> layout{args.depth, args.width};
  const T* rows[kBlock];
  for (int64_t block = first; block < last; block += kBlock) {
    const int64_t count = last - block < kBlock ? last - block : kBlock;
    for (int64_t part = 0; part < args.parts; ++part) {
      for (int64_t n = 0; n < count; ++n) {
        rows[n] = args.input + ((block + n) * args.parts + part) * args.depth;
      }
      const bool is_first = part == 0;
      const T* const bias = part == args.parts - 1 ? args.bias : nullptr;
      multiply_panels<T>(rows, count, layout, packed + part * layout.size(),
                         [&](int64_t n, int64_t column, int64_t valid, Vec<T> value) PYMTL_INLINE_LAMBDA {
                           T* const to = args.output + (block + n) * args.width + column;
                           if (!is_first) value = load_part(to, valid, T(0)) + value;
                           if (bias != nullptr) value = value + load_part(bias + column, valid, T(0));
                           store_part(to, value, valid);
                         });
    }
  }
}

template <typename T>
void pack_heads_backward(const T* weight, int64_t features, int64_t width, T* packed) {
  pack_columns(weight, PanelLayout<T>{width, features}, packed);
}

template <typename T>
void heads_input_gradient(const HeadsBackward<T>& args, const T* packed, int64_t first, int64_t last) {
  constexpr int64_t kBlock = 8 * kTileRows;
  const PanelLayout<T> layout{args.width, args.features};
  const T* rows[kBlock];
  for (int64_t block = first; block < last; block += kBlock) {
    const int64_t count = last - block < kBlock ? last - block : kBlock;
    for (int64_t n = 0; n < count; ++n) rows[n] = args.grad_output + (block + n) * args.width;
    multiply_panels<T>(rows, count, layout, packed,
                       [&](int64_t n, int64_t column, int64_t valid, Vec<T> value) PYMTL_INLINE_LAMBDA {
                         store_part(args.grad_input + (block + n) * args.features + column, value, valid);
                       });
  }
}

template <typename T>
size_t heads_weight_gradient_scratch(const HeadsBackward<T>& args, int64_t first, int64_t last) {
  return WeightGradientScratch<T>(args.rows, args.width, last - first).size;
}

template <typename T>
void heads_weight_gradient(const HeadsBackward<T>& args, int64_t first_column, int64_t last_column, void* scratch) {
  WeightGradient<T> gradient(args.grad_output, args.rows, args.width, first_column, last_column, scratch);
  const T* rows[WeightGradientScratch<T>::kMost];
  for (int64_t first = 0; first < args.rows; first += gradient.block()) {
    const int64_t count = args.rows - first < gradient.block() ? args.rows - first : gradient.block();
    for (int64_t k = 0; k < count; ++k) rows[k] = args.input + (first + k) * args.features;
    gradient.start(first, count);
    if (args.grad_weight != nullptr) gradient.add_product(rows, args.features, args.grad_weight);
    if (args.grad_bias != nullptr) gradient.add_sum(args.grad_bias);
  }
}

template <typename T>
void sum_parts(const T* partial, int64_t stride, int64_t parts, const T* bias, int64_t width, int64_t first,
               int64_t last, T* output, int64_t output_stride) {
  for (int64_t n = first; n < last; ++n) {
    for (int64_t column = 0; column < width; column += kLanes<T>) {
      const int64_t valid = width - column;
      const T* const from = partial + n * width + column;
      Vec<T> value = load_part(from, valid, T(0));
      for (int64_t part = 1; part < parts; ++part) value = value + load_part(from + part * stride, valid, T(0));
      if (bias != nullptr) value = value + load_part(bias + column, valid, T(0));
      store_part(output + n * output_stride + column, value, valid);
    }
  }
}

}  // namespace
}  // namespace pymtl
