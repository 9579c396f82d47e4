// Torch's own operations that the ops are made of besides kernels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <utility>

#include "ops/cuda/cublas.h"
#include "ops/tensors.h"

namespace pymtl::ops::cuda {

// Calls an overload of torch's with these arguments; the one result.
template <typename... Args>
Tensor call(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{boxed(args)...};
  check_call(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  return unboxed<Tensor>(stack[0]);
}

inline Tensor concatenated(const Tensors& tensors, int64_t dim) {
  return tensors.size() == 1 ? tensors[0] : call("aten::cat", "", tensors, dim);
}

inline Tensor columns(const Tensor& matrix, int64_t first, int64_t count) {
  return call("aten::narrow", "", matrix, int64_t{1}, first, count);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// The product a b. For 16-bit operands, which are summed in float, the result may be float. For float32 it uses TF32 if
// allow_tf32 is set or torch's own setting says so. Not plain mm, whose operands autocast would cast.
inline Tensor product(const Tensor& a, const Tensor& b, ScalarType type, bool allow_tf32 = false) {
  if (allow_tf32 && a.scalar_type() == ScalarType::Float) {
    const OptionalTensor result = product_in_tf32(a, b);
    if (result.has_value()) return *result;
  }
  const Tensor result = call("aten::mm", "dtype", a, b, type);
  check_type(result, "product", type);
  return result;
}

// input [N, F], weight [C, F], bias [C] or none.
inline Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  return call("aten::linear", "", input, weight, bias);
}

inline Tensor sum_of_rows(const Tensor& matrix) {
  return call("aten::sum", "dim_IntList", matrix, std::optional<std::vector<int64_t>>(std::vector<int64_t>{0}), false,
              std::optional<ScalarType>());
}

}  // namespace pymtl::ops::cuda
