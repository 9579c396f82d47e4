// The table of a type's kernels for layers.
#pragma once

#include "heads_simd.h"
#include "kernels.h"
#include "lstm_backward_simd.h"
#include "lstm_gradients_simd.h"
#include "lstm_simd.h"
#include "peak_simd.h"

#define PYMTL_JOIN_(a, b) a##b
#define PYMTL_JOIN(a, b) PYMTL_JOIN_(a, b)

namespace pymtl {
namespace {

template <typename T>
constexpr LayersFor<T> layers_for() {
  return {
      .lanes = kLanes<T>,
      .lstm_packed_size = lstm_packed_size<T>,
      .pack_lstm = pack_lstm<T>,
      .lstm_scratch = lstm_scratch<T>,
      .lstm_walk = lstm_walk<T>,
      .lstm_backward_packed_size = lstm_backward_packed_size<T>,
      .pack_lstm_backward = pack_lstm_backward<T>,
      .lstm_backward_scratch = lstm_backward_scratch<T>,
      .lstm_backward_walk = lstm_backward_walk<T>,
      .lstm_weight_gradient_scratch = lstm_weight_gradient_scratch<T>,
      .lstm_weight_gradient = lstm_weight_gradient<T>,
      .lstm_input_gradient_packed_size = lstm_input_gradient_packed_size<T>,
      .pack_lstm_input_gradient = pack_lstm_input_gradient<T>,
      .lstm_input_gradient = lstm_input_gradient<T>,
      .heads_packed_size = heads_packed_size<T>,
      .pack_heads = pack_heads<T>,
      .heads_rows = heads_rows<T>,
      .pack_heads_backward = pack_heads_backward<T>,
      .heads_input_gradient = heads_input_gradient<T>,
      .heads_weight_gradient_scratch = heads_weight_gradient_scratch<T>,
      .heads_weight_gradient = heads_weight_gradient<T>,
      .sum_parts = sum_parts<T>,
      .multiply_adds = multiply_adds<T>,
  };
}

}  // namespace
}  // namespace pymtl
