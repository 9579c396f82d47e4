// Stands in for cuBLAS and for torch's handle of it: products in TF32 of matrices column by column, as cublas_api.h has
// them.
#include <bit>
#include <cstdint>

namespace {

int the_handle = 0;

float rounded(float x) { return std::bit_cast<float>((std::bit_cast<uint32_t>(x) + 0x1000) & ~uint32_t{0x1fff}); }

// Of rows by columns after the operation.
float entry(const void* matrix, int transposed, int64_t stride, int64_t row, int64_t column) {
  const auto* const at = static_cast<const float*>(matrix);
  return rounded(transposed == 0 ? at[column * stride + row] : at[row * stride + column]);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int torch_get_current_cuda_blas_handle(void** handle) {
  *handle = &the_handle;
  return 0;
}

extern "C" __attribute__((visibility("default"))) int cublasGemmEx_64(void* handle, int of_a, int of_b, int64_t m,
                                                                      int64_t n, int64_t k, const void* alpha,
                                                                      const void* a, int type_of_a, int64_t stride_of_a,
                                                                      const void* b, int type_of_b, int64_t stride_of_b,
                                                                      const void* beta, void* c, int type_of_c,
                                                                      int64_t stride_of_c, int compute, int algorithm) {
  constexpr int kInvalidValue = 7;
  const bool types = type_of_a == 0 && type_of_b == 0 && type_of_c == 0 && compute == 77 && algorithm == -1;
  const bool operations = (of_a == 0 || of_a == 1) && (of_b == 0 || of_b == 1);
  const bool sizes = m > 0 && n > 0 && k > 0 && stride_of_a >= (of_a == 0 ? m : k) &&
                     stride_of_b >= (of_b == 0 ? k : n) && stride_of_c >= m;
  const bool scalars = *static_cast<const float*>(alpha) == 1.0F && *static_cast<const float*>(beta) == 0.0F;
  if (handle != &the_handle || !types || !operations || !sizes || !scalars) return kInvalidValue;
  for (int64_t column = 0; column < n; ++column) {
    for (int64_t row = 0; row < m; ++row) {
      float sum = 0.0F;
      for (int64_t i = 0; i < k; ++i) {
        sum += entry(a, of_a, stride_of_a, row, i) * entry(b, of_b, stride_of_b, i, column);
      }
      static_cast<float*>(c)[column * stride_of_c + row] = sum;
    }
  }
  return 0;
}
