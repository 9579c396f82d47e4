// All kernels but those for bfloat16, compiled once per instruction set: the build passes the flags and PYMTL_ISA, its
// name.
#include "../kernels.h"

#include "activation.h"
#include "attention.h"
#include "char_cnn.h"
#include "crf.h"
#include "dropout.h"
#include "joint_loss.h"
#include "layers.h"
#include "peak.h"
#include "pooling.h"

namespace pymtl {
namespace {

template <typename T, typename Function>
void map(const T* x, T* y, int64_t count, const Function& function) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    store_part(y + i, function(load_part(x + i, count - i)), count - i);
  }
}

template <typename T>
void exponentials(const T* x, T* y, int64_t count) {
  map(x, y, count, [](Vec<T> value) PYMTL_INLINE_LAMBDA { return exp<T>(value); });
}

template <typename T>
void sigmoids(const T* x, T* y, int64_t count) {
  map(x, y, count, [](Vec<T> value) PYMTL_INLINE_LAMBDA { return sigmoid<T>(value); });
}

template <typename T>
void hyperbolic_tangents(const T* x, T* y, int64_t count) {
  map(x, y, count, [](Vec<T> value) PYMTL_INLINE_LAMBDA { return tanh<T>(value); });
}

template <typename T>
constexpr KernelsFor<T> kernels_for() {
  return {
      .drop = drop<T>,
      .char_cnn_words = char_cnn_words<T>,
      .pool_rows = pool_rows<T>,
      .attention_pool_row = attention_pool_row<T>,
      .attention_pool_gradient = attention_pool_gradient<T>,
      .attention_query = attention_query<T>,
      .attention_gradient = attention_gradient<T>,
      .loss_rows = loss_rows<T>,
      .crf_factors = crf_factors<T>,
      .crf_forward_time_loop = crf_forward_time_loop<T>,
      .crf_backward_time_loop = crf_backward_time_loop<T>,
      .crf_transition_gradient = crf_transition_gradient<T>,
      .crf_transition_gradient_scratch = crf_transition_gradient_scratch<T>,
      .crf_best_step = crf_best_step<T>,
      .read_all = read_all<T>,
      .exponential = exponentials<T>,
      .sigmoid = sigmoids<T>,
      .hyperbolic_tangent = hyperbolic_tangents<T>,
  };
}

}  // namespace

extern const Kernels PYMTL_JOIN(kernels_, PYMTL_ISA);
const Kernels PYMTL_JOIN(kernels_, PYMTL_ISA) = {kernels_for<float>(), kernels_for<double>(), layers_for<float>(),
                                                 layers_for<double>(), narrow_rnn<BFloat16>(PanelScheme::bfloat16)};

}  // namespace pymtl
