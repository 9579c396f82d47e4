#include "ops/cuda/cublas.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace pymtl::ops::cuda {
namespace {

// This uses the cuBLAS that torch has loaded and no other. Its file name depends on torch's version of CUDA, so nothing
// here links to it. Integers stand for the enumerations of cublas_api.h, whose values do not change.
using Gemm = int (*)(void* handle, int of_a, int of_b, int64_t m, int64_t n, int64_t k, const void* alpha,
                     const void* a, int type_of_a, int64_t stride_of_a, const void* b, int type_of_b,
                     int64_t stride_of_b, const void* beta, void* c, int type_of_c, int64_t stride_of_c, int compute,
                     int algorithm);
using CurrentHandle = AOTITorchError (*)(void** handle);

// A function of torch's CUDA library or of the libraries that it needs; of this one's where the ops run on a host.
template <typename Function>
Function find(const char* name) {
  void* const torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<Function>(dlsym(torch != nullptr ? torch : RTLD_DEFAULT, name));
}

// A matrix as cuBLAS sees it, column by column: this one's transpose, or with `transposed` the matrix itself.
struct Operand {
  bool known;
  int transposed;
  int64_t stride;

  explicit Operand(const Tensor& matrix) {
    const int64_t rows = matrix.size(0);
    const int64_t columns = matrix.size(1);
    const bool by_rows = (columns == 1 || matrix.stride(1) == 1) && matrix.stride(0) >= columns;
    const bool by_columns = (rows == 1 || matrix.stride(0) == 1) && matrix.stride(1) >= rows;
    known = by_rows || by_columns;
    transposed = by_rows ? 0 : 1;
    stride = matrix.stride(by_rows ? 0 : 1);
  }
};

}  // namespace

OptionalTensor product_in_tf32(const Tensor& a, const Tensor& b) {
  static const auto gemm = find<Gemm>("cublasGemmEx_64");
  static const auto current_handle = find<CurrentHandle>("torch_get_current_cuda_blas_handle");
  if (gemm == nullptr || current_handle == nullptr) return std::nullopt;
  const int64_t m = a.size(0);
  const int64_t n = b.size(1);
  const int64_t k = a.size(1);
  const Operand left(a);
  const Operand right(b);
  if (!left.known || !right.known || m == 0 || n == 0 || k == 0) return std::nullopt;
  const Tensor c = make(a, {m, n});
  void* handle = nullptr;
  check_call(current_handle(&handle), "torch_get_current_cuda_blas_handle");
  constexpr int kFloat = 0;           // CUDA_R_32F
  constexpr int kComputeInTf32 = 77;  // CUBLAS_COMPUTE_32F_FAST_TF32
  constexpr int kAnyAlgorithm = -1;   // CUBLAS_GEMM_DEFAULT
  const float one = 1.0F;
  const float zero = 0.0F;
  // Column by column c is its transpose: that of b times that of a.
  const int status = gemm(handle, right.transposed, left.transposed, n, m, k, &one, b.const_data_ptr(), kFloat,
                          right.stride, a.const_data_ptr(), kFloat, left.stride, &zero, c.mutable_data_ptr(), kFloat, n,
                          kComputeInTf32, kAnyAlgorithm);
  check(status == 0, "cuBLAS: cublasGemmEx gave status ", status);
  return c;
}

}  // namespace pymtl::ops::cuda
