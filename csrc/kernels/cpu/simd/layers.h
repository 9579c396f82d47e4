// The table of a type's kernels for layers.
#pragma once

#include "../kernels.h"
#include "heads.h"
#include "peak.h"
#include "rnn.h"
#include "rnn_backward.h"
#include "rnn_gradients.h"

#define PYMTL_JOIN_(a, b) a##b
#define PYMTL_JOIN(a, b) PYMTL_JOIN_(a, b)

namespace pymtl {
namespace {

template <typename T, typename W>
constexpr RnnForwardFor<T> rnn_forward_for(PanelScheme scheme) {
  return {scheme, kLanes<T>, rnn_panels_size<T, W>, rnn_scratch<T, W>, rnn_time_loop<T, W>};
}

template <typename W>
constexpr NarrowRnn narrow_rnn(PanelScheme scheme) {
  return {rnn_forward_for<float, W>(scheme), pack_narrow_rnn<W>};
}

template <typename T>
constexpr LayersFor<T> layers_for() {
  return {
      .rnn_forward = rnn_forward_for<T, T>(PanelScheme::own),
      .pack_rnn = pack_rnn<T>,
      .rnn_backward_panels_size = rnn_backward_panels_size<T>,
      .pack_rnn_backward = pack_rnn_backward<T>,
      .rnn_backward_scratch = rnn_backward_scratch<T>,
      .rnn_backward_time_loop = rnn_backward_time_loop<T>,
      .rnn_weight_gradient_scratch = rnn_weight_gradient_scratch<T>,
      .rnn_weight_gradient = rnn_weight_gradient<T>,
      .rnn_input_gradient_panels_size = rnn_input_gradient_panels_size<T>,
      .pack_rnn_input_gradient = pack_rnn_input_gradient<T>,
      .rnn_input_gradient = rnn_input_gradient<T>,
      .heads_panels_size = heads_panels_size<T>,
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
