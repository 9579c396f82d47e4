// Filters over the characters of words, and their maxima.
#pragma once

#include <limits>

#include "../kernels.h"
#include "vector.h"

namespace pymtl {
namespace {

// V vectors of filters of one width, from `valid` filters on; table and output at the first of them.
template <typename T, int V>
void filter_word(const CharCnnShape& shape, const int64_t* ids, int64_t characters, int64_t width, const T* table,
                 int64_t row, int64_t valid, T* output, int64_t* places) {
  Vec<T> best[V];
  IntVec<T> best_at[V] = {};
  for (int v = 0; v < V; ++v) best[v] = broadcast(-std::numeric_limits<T>::infinity());
  for (int64_t t = 0; t < characters; ++t) {
    const int64_t start = t - width / 2;
    Vec<T> value[V] = {};
    for (int64_t k = start < 0 ? -start : 0; k < width && start + k < shape.length; ++k) {
      const T* const entry = table + ids[start + k] * row + k * shape.filters;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) value[v] = value[v] + load_part(entry + v * kLanes<T>, valid - v * kLanes<T>);
    }
    const IntVec<T> here = IntVec<T>{} + static_cast<decltype(IntVec<T>{}[0] + 0)>(t);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      // The first of equal ones; a value that is not a number stays.
      const IntVec<T> greater = (value[v] > best[v]) | ((value[v] != value[v]) & (best[v] == best[v]));
      best[v] = select<T>(greater, value[v], best[v]);
      best_at[v] = greater ? here : best_at[v];
    }
  }
  for (int v = 0; v < V; ++v) {
    const int64_t left = valid - v * kLanes<T>;
    store_part(output + v * kLanes<T>, best[v], left);
    for (int64_t lane = 0; places != nullptr && lane < kLanes<T> && lane < left; ++lane) {
      places[v * kLanes<T> + lane] = best_at[v][lane];
    }
  }
}

template <typename T>
void char_cnn_words(const CharCnn<T>& args, int64_t first, int64_t last) {
  constexpr int kVectors = 4;
  const CharCnnShape& shape = args.shape;
  const int64_t row = shape.row;
  for (int64_t n = first; n < last; ++n) {
    const int64_t* const ids = shape.ids + n * shape.length;
    int64_t characters = 0;
    for (int64_t j = 0; j < shape.length; ++j) characters += ids[j] != 0;
    if (characters == 0) characters = 1;
    const T* table = args.table;
    for (int64_t d = 0; d < shape.count; ++d) {
      const int64_t feature = n * shape.features + d * shape.filters;
      const auto filter = [&]<int V>(int64_t f) {
        filter_word<T, V>(shape, ids, characters, shape.widths[d], table + f, row, shape.filters - f,
                          args.output + feature + f, args.places == nullptr ? nullptr : args.places + feature + f);
      };
      int64_t f = 0;
      for (; f + (kVectors - 1) * kLanes<T> < shape.filters; f += kVectors * kLanes<T>) {
        filter.template operator()<kVectors>(f);
      }
      for (; f < shape.filters; f += kLanes<T>) filter.template operator()<1>(f);
      table += shape.widths[d] * shape.filters;
    }
  }
}

}  // namespace
}  // namespace pymtl
