// What the backward recurrences in float share, with or without TF32: a cell of one unit and one row of the batch.
#pragma once

#include "kernels/cuda/rnn/activation.h"
#include "kernels/cuda/rnn/cluster.h"

namespace pymtl::cuda {

// What the forward pass saved for a unit at a token, except c, and the gradient of the output there.
struct Reserve {
  float gates[4];
  float grad_output;
  bool active;  // whether there is such a token
};

__device__ __forceinline__ void load_reserve(Reserve& reserve, const RnnBackward<float>& args, int64_t g, int64_t token,
                                             int64_t unit, bool active) {
  const RnnShape& shape = args.shape;
  const int64_t H = shape.hidden_size;
  reserve.active = active;
  if (!active) return;
  const float* const gates = args.gates + (g * shape.tokens + token) * 4 * H + unit;
#pragma unroll
  for (int q = 0; q < 4; ++q) reserve.gates[q] = gates[q * H];
  const int64_t above = (token * shape.recurrences + g) * H + unit;
  reserve.grad_output = args.grad_output != nullptr ? args.grad_output[above] : 0.0F;
}

// c of a unit after a step; c0 if it has no token there.
__device__ __forceinline__ float load_cell(const RnnBackward<float>& args, int64_t g, int64_t token, int64_t unit,
                                           bool active, float c0) {
  return active ? args.cells[(g * args.shape.tokens + token) * args.shape.hidden_size + unit] : c0;
}

// The gradients of an active cell's gates before activation. c is after the step, c_before before it. grad_h is of h
// after the step but for grad_output; grad_c is of c after the step, and becomes that of c before it.
__device__ __forceinline__ void gate_gradients(float (&grads)[4], const Reserve& reserve, float c, float c_before,
                                               float grad_h, float& grad_c) {
  const auto [i, f, g, o] = reserve.gates;
  const float tanh_c = exact_hyperbolic_tangent(c);
  const float of_h = grad_h + reserve.grad_output;
  const float of_c = grad_c + of_h * o * slope_of_tanh(tanh_c);
  grads[0] = of_c * g * slope_of_sigmoid(i);
  grads[1] = of_c * c_before * slope_of_sigmoid(f);
  grads[2] = of_c * i * slope_of_tanh(g);
  grads[3] = of_h * tanh_c * slope_of_sigmoid(o);
  grad_c = of_c * f;
}

}  // namespace pymtl::cuda
