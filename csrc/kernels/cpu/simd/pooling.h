// Mean and maximum of h over the tokens of each sequence, in the order the recurrence ran over them.
#pragma once

#include <limits>

#include "../kernels.h"
#include "vector.h"

namespace pymtl {
namespace {

template <typename T>
void pool_rows(const Pool<T>& args, const int64_t* starts, int64_t first, int64_t last) {
  const int64_t size = args.shape.hidden_size;
  const int64_t stride = args.shape.recurrences * size;
  for (int64_t row = first; row < last; ++row) {
    int64_t length = 0;
    while (length < args.shape.steps && starts[length + 1] - starts[length] > row) ++length;
    for (int64_t g = 0; g < args.shape.recurrences; ++g) {
      for (int64_t unit = 0; unit < size; unit += kLanes<T>) {
        const int64_t valid = size - unit;
        const int64_t column = g * size + unit;
        const bool mean = args.kind == Pooling::mean;
        Vec<T> value = mean ? Vec<T>{} : broadcast(-std::numeric_limits<T>::infinity());
        Vec<T> error = {};
        int64_t best[kLanes<T>] = {};
        for (int64_t k = 0; k < length; ++k) {
          const int64_t token = starts[args.reverse[g] ? length - 1 - k : k] + row;
          const Vec<T> h = load_part(args.input + token * stride + column, valid);
          if (mean) {
            add_compensated<T>(h, value, error);
            continue;
          }
          const Vec<T> greater = maximum<T>(value, h);
          for (int lane = 0; lane < kLanes<T>; ++lane) {
            // The first token, then every one that replaces the maximum; a NaN replaces it once.
            const bool replaced = greater[lane] != value[lane] && !(value[lane] != value[lane]);
            if (k == 0 || replaced) best[lane] = token;
          }
          value = greater;
        }
        if (mean) value = value / broadcast(static_cast<T>(length));
        store_part(args.output + row * stride + column, value, valid);
        for (int64_t lane = 0; !mean && lane < kLanes<T> && lane < valid; ++lane) {
          args.argmax[row * stride + column + lane] = best[lane];
        }
      }
    }
  }
}

}  // namespace
}  // namespace pymtl
