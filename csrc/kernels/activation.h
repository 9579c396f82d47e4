// The activation functions of the kernels over plain arrays, each within 2 units in the last place of
// the true value over the whole range of its type, subnormal results, infinities and NaN included.
#pragma once

#include <cstdint>

namespace pymtl {

// y[i] = f(x[i]) for i in [0, count). x and y may be the same array. T is float or double.
template <typename T>
void exponential(const T* x, T* y, int64_t count);
template <typename T>
void sigmoid(const T* x, T* y, int64_t count);
template <typename T>
void hyperbolic_tangent(const T* x, T* y, int64_t count);

}  // namespace pymtl
