// Products in TF32 for one call alone: torch's own follow a setting of the whole process.
#pragma once

#include "ops/tensors.h"

namespace pymtl::ops::cuda {

// The product of a [m, k] and b [k, n], float32, by the cuBLAS and the handle that torch works with, on the current
// device and stream. None where these are not to be found (a torch with cuBLAS linked in), where neither rows nor
// columns of an operand are contiguous, or where there is nothing to multiply.
OptionalTensor product_in_tf32(const Tensor& a, const Tensor& b);

}  // namespace pymtl::ops::cuda
