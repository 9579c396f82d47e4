// What the recurrence's kernels on tensor cores share: fragments of W_hh, and the gradients of a cell.
//
// A thread is lane 4 r + j of its warp; see multiply_tile.
#pragma once

#include "kernels/cuda/rnn/activation.h"
#include "kernels/cuda/rnn/cluster.h"

namespace pymtl::cuda {

// A fragment of W_hh: of the rows of gates `gate` and gate + 1 for one unit, 4 pairs along k from `k` on. Zeros
// outside.
template <typename T>
__device__ __forceinline__ void load_weights(uint32_t (&a)[4], const T* w_hh, int64_t H, int gate, int64_t unit,
                                             int64_t k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t column = k + i / 2 * 8;
    const int64_t left = unit < H ? H - column : 0;
    const T* const at = w_hh + ((gate + i % 2) * H + unit) * H + column;
    a[i] = load_pair(at, left < 0 ? 0 : static_cast<int>(left < 2 ? left : 2), H % 2 == 0);
  }
}

// A fragment of W_hh^T: units `row` and row + 8 of h by the gates 2 p (pairs from unit `unit`) and 2 p + 1.
template <typename T>
__device__ __forceinline__ void load_weights_across(uint32_t (&a)[4], const T* w_hh, int64_t H, int64_t row, int p,
                                                    int64_t unit) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t column = row + i % 2 * 8;
    const T* const at = w_hh + ((2 * p + i / 2) * H + unit) * H + column;
    const uint32_t first = column < H && unit < H ? at[0].bits : 0;
    const uint32_t second = column < H && unit + 1 < H ? at[H].bits : 0;
    a[i] = first | second << 16;
  }
}

// Parts of sums [units, rows] in shared memory, where threads write pairs of rows of unit r, and read of row r the
// units 2j and 2j + 1, each all lanes in banks of their own: where unit and a row of a column of 8 stand.
template <int kColumns>
__device__ __forceinline__ int part_index(int unit, int column, int row) {
  return ((unit / 8 * kColumns + column) * 8 + unit % 2 * 4 + unit % 8 / 2) * 8 + row;
}

// What the forward pass saved for two neighbouring units at a token, except c, and the gradients of the output there.
struct Reserve {
  uint32_t gates[4];
  uint32_t grad_output;
  int valid;  // how many of the two have a token here
};

template <typename T>
__device__ __forceinline__ void load_reserve(Reserve& reserve, const RnnBackward<T>& args, int64_t g, int64_t token,
                                             int64_t unit, int valid, bool aligned) {
  const RnnShape& shape = args.shape;
  const int64_t H = shape.hidden_size;
  reserve.valid = valid;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    reserve.gates[q] = load_pair(args.gates + ((g * shape.tokens + token) * 4 + q) * H + unit, valid, aligned);
  }
  const int above = args.grad_output != nullptr ? valid : 0;
  reserve.grad_output = load_pair(args.grad_output + (token * shape.recurrences + g) * H + unit, above, aligned);
}

// c of two neighbouring units after a step; c0 where they have no token there.
template <typename T>
__device__ __forceinline__ void load_cells(float (&cells)[2], const RnnBackward<T>& args, int64_t g, int64_t token,
                                           int64_t unit, int valid, const float (&c0)[2]) {
  const float* const at = args.cells + (g * args.shape.tokens + token) * args.shape.hidden_size + unit;
#pragma unroll
  for (int i = 0; i < 2; ++i) cells[i] = i < valid ? at[i] : c0[i];
}

// The gradients of the gates before activation, as pairs, zeros where there is no token. c is after the step, c_before
// before it. grad_h is of h after the step but for grad_output; grad_c is of c after the step, and becomes that of c
// before it.
template <typename T>
__device__ __forceinline__ void gate_gradients(uint32_t (&pairs)[4], const Reserve& reserve, const float (&c)[2],
                                               const float (&c_before)[2], const float (&grad_h)[2],
                                               float (&grad_c)[2]) {
  float grads[4][2] = {};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (e >= reserve.valid) continue;
    const auto gate = [&](int q) { return e == 0 ? first_of<T>(reserve.gates[q]) : second_of<T>(reserve.gates[q]); };
    const float i = gate(0);
    const float f = gate(1);
    const float g = gate(2);
    const float o = gate(3);
    const float tanh_c = hyperbolic_tangent(c[e]);
    const float above = e == 0 ? first_of<T>(reserve.grad_output) : second_of<T>(reserve.grad_output);
    const float of_h = grad_h[e] + above;
    const float of_c = grad_c[e] + of_h * o * slope_of_tanh(tanh_c);
    grads[0][e] = of_c * g * slope_of_sigmoid(i);
    grads[1][e] = of_c * c_before[e] * slope_of_sigmoid(f);
    grads[2][e] = of_c * i * slope_of_tanh(g);
    grads[3][e] = of_h * tanh_c * slope_of_sigmoid(o);
    grad_c[e] = of_c * f;
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) pairs[q] = pair_of<T>(grads[q][0], grads[q][1]);
}

}  // namespace pymtl::cuda
