// The dtypes that a GPU has kernels for.
#pragma once

#include "kernels/cuda/float16.h"
#include "ops/tensors.h"

namespace pymtl::ops::cuda {

// Calls function.operator()<float, double, BFloat16 or Float16>().
template <typename Function>
auto with_any_type(const Tensor& tensor, const Name& name, Function&& function) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::BFloat16) return function.template operator()<BFloat16>();
  if (type == ScalarType::Half) return function.template operator()<Float16>();
  return with_real_type(tensor, name, function);
}

}  // namespace pymtl::ops::cuda
