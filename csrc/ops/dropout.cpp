#include "kernels/dropout.h"

#include "tensors.h"

namespace pymtl::ops {
namespace {

Tensor dropout(Tensor given_input, Tensor given_bits, double p) {
  return with_real_type(given_input, "input", [&]<typename T>() {
    check(p >= 0 && p <= 1, "p: expected a probability from 0 to 1, got ", p);
    const Tensor input = checked(given_input, "input", given_input.scalar_type(), sizes_of(given_input));
    const int64_t count = input.numel();
    const Tensor bits = checked(given_bits, "bits", ScalarType::Long, {(count + 3) / 4});
    const Tensor output = make(input, sizes_of(input));
    if (count > 0) {
      pymtl::dropout(Dropout<T>{count, p, read<T>(input), read<uint16_t>(bits), write<T>(output)}, torch_executor());
    }
    return output;
  });
}

}  // namespace
}  // namespace pymtl::ops

STABLE_TORCH_LIBRARY_IMPL(pymtl, CPU, m) { m.impl("dropout", TORCH_BOX(&pymtl::ops::dropout)); }
