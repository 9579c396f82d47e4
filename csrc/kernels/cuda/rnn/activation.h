// Slopes of the cells' activations, of their values. CPU: kernels/cpu/simd/activation.h.
#pragma once

#include <math.h>

#include "kernels/cuda/device.h"

namespace pymtl::cuda {

// 1 - value^2 by one fused operation: with a rounded square, hardly more than its rounding error would be left near 1.
template <typename R>
__device__ __forceinline__ R slope_of_tanh(R value) {
  return fma(-value, value, R(1));
}

template <typename R>
__device__ __forceinline__ R slope_of_sigmoid(R value) {
  return value * (R(1) - value);
}

}  // namespace pymtl::cuda
