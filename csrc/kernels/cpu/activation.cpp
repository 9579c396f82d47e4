#include "../activation.h"

#include "kernels.h"

namespace pymtl {

template <typename T>
void exponential(const T* x, T* y, int64_t count) {
  active_kernels().of<T>().exponential(x, y, count);
}
template <typename T>
void sigmoid(const T* x, T* y, int64_t count) {
  active_kernels().of<T>().sigmoid(x, y, count);
}
template <typename T>
void hyperbolic_tangent(const T* x, T* y, int64_t count) {
  active_kernels().of<T>().hyperbolic_tangent(x, y, count);
}

template void exponential(const float*, float*, int64_t);
template void exponential(const double*, double*, int64_t);
template void sigmoid(const float*, float*, int64_t);
template void sigmoid(const double*, double*, int64_t);
template void hyperbolic_tangent(const float*, float*, int64_t);
template void hyperbolic_tangent(const double*, double*, int64_t);

}  // namespace pymtl
