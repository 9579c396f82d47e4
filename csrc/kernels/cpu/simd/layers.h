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

// The kernels of the cell that is asked for.
template <typename T>
struct RnnKernels {
  static int64_t panels_size(Cell cell, int64_t input_size, int64_t hidden_size) {
    return with_cell(cell, [&]<typename C>() { return rnn_panels_size<T, C>(input_size, hidden_size); });
  }
  static void pack(Cell cell, const RnnWeights<T>& weights, int64_t input_size, int64_t hidden_size, int64_t part,
                   int64_t parts, T* panels) {
    with_cell(cell, [&]<typename C>() { pack_rnn<T, C>(weights, input_size, hidden_size, part, parts, panels); });
  }
  static size_t scratch(const RnnTimeLoop<T>& args) {
    return with_cell(args.cell, [&]<typename C>() { return rnn_scratch<T, C>(args); });
  }
  static void loop(const RnnTimeLoop<T>& args) {
    with_cell(args.cell, [&]<typename C>() { rnn_time_loop<T, C>(args); });
  }
  static int64_t backward_panels_size(Cell cell, int64_t hidden_size) {
    return with_cell(cell, [&]<typename C>() { return rnn_backward_panels_size<T, C>(hidden_size); });
  }
  static void pack_backward(Cell cell, const T* w_hh, int64_t hidden_size, int64_t part, int64_t parts, T* panels) {
    with_cell(cell, [&]<typename C>() { pack_rnn_backward<T, C>(w_hh, hidden_size, part, parts, panels); });
  }
  static void backward_loop(const RnnBackwardTimeLoop<T>& args) {
    with_cell(args.cell, [&]<typename C>() { rnn_backward_time_loop<T, C>(args); });
  }
  static size_t weight_gradient_scratch(const RnnWeightGradient<T>& args) {
    return with_cell(args.cell, [&]<typename C>() { return rnn_weight_gradient_scratch<T, C>(args); });
  }
  static void weight_gradient(const RnnWeightGradient<T>& args) {
    with_cell(args.cell, [&]<typename C>() { rnn_weight_gradient<T, C>(args); });
  }
  static int64_t input_gradient_panels_size(Cell cell, int64_t input_size, int64_t hidden_size) {
    return with_cell(cell, [&]<typename C>() { return rnn_input_gradient_panels_size<T, C>(input_size, hidden_size); });
  }
  static void pack_input_gradient(Cell cell, const T* w_ih, int64_t input_size, int64_t hidden_size, int64_t part,
                                  int64_t parts, T* panels) {
    with_cell(cell,
              [&]<typename C>() { pack_rnn_input_gradient<T, C>(w_ih, input_size, hidden_size, part, parts, panels); });
  }
  static void input_gradient(const RnnInputGradient<T>& args) {
    with_cell(args.cell, [&]<typename C>() { rnn_input_gradient<T, C>(args); });
  }
};

template <typename T>
constexpr LayersFor<T> layers_for() {
  return {
      .lanes = kLanes<T>,
      .rnn_panels_size = RnnKernels<T>::panels_size,
      .pack_rnn = RnnKernels<T>::pack,
      .rnn_scratch = RnnKernels<T>::scratch,
      .rnn_time_loop = RnnKernels<T>::loop,
      .rnn_backward_panels_size = RnnKernels<T>::backward_panels_size,
      .pack_rnn_backward = RnnKernels<T>::pack_backward,
      .rnn_backward_scratch = rnn_backward_scratch<T>,
      .rnn_backward_time_loop = RnnKernels<T>::backward_loop,
      .rnn_weight_gradient_scratch = RnnKernels<T>::weight_gradient_scratch,
      .rnn_weight_gradient = RnnKernels<T>::weight_gradient,
      .rnn_input_gradient_panels_size = RnnKernels<T>::input_gradient_panels_size,
      .pack_rnn_input_gradient = RnnKernels<T>::pack_input_gradient,
      .rnn_input_gradient = RnnKernels<T>::input_gradient,
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
