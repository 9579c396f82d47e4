// All kernels, compiled once per instruction set: the build passes the flags and PYMTL_ISA, its name.
#include "activation_simd.h"
#include "crf_simd.h"
#include "dropout_simd.h"
#include "heads_simd.h"
#include "joint_loss_simd.h"
#include "kernels.h"
#include "lstm_backward_simd.h"
#include "lstm_gradients_simd.h"
#include "lstm_simd.h"
#include "peak_simd.h"
#include "pooling_simd.h"

#define PYMTL_JOIN_(a, b) a##b
#define PYMTL_JOIN(a, b) PYMTL_JOIN_(a, b)

namespace pymtl {
namespace {

template <typename T, Vec<T> (*function)(Vec<T>)>
void map(const T* x, T* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    store_part(y + i, function(load_part(x + i, count - i, T(0))), count - i);
  }
}

template <typename T>
constexpr KernelsFor<T> kernels_for() {
  return {
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
      .drop = drop<T>,
      .pool_rows = pool_rows<T>,
      .loss_rows = loss_rows<T>,
      .crf_factors = crf_factors<T>,
      .crf_forward_walk = crf_forward_walk<T>,
      .crf_backward_walk = crf_backward_walk<T>,
      .crf_transition_gradient = crf_transition_gradient<T>,
      .crf_transition_gradient_scratch = crf_transition_gradient_scratch<T>,
      .crf_best_step = crf_best_step<T>,
      .multiply_adds = multiply_adds<T>,
      .exponential = map<T, exp<T>>,
      .sigmoid = map<T, sigmoid<T>>,
      .hyperbolic_tangent = map<T, tanh<T>>,
  };
}

}  // namespace

extern const Kernels PYMTL_JOIN(kernels_, PYMTL_ISA);
const Kernels PYMTL_JOIN(kernels_, PYMTL_ISA) = {kernels_for<float>(), kernels_for<double>()};

}  // namespace pymtl
