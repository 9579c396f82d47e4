// The kernels for bfloat16, compiled once per instruction set: apart from the others, since AVX512-BF16 is of use to
// these alone.
#include "layers.h"

namespace pymtl {

extern const LayersFor<BFloat16> PYMTL_JOIN(bfloat16_, PYMTL_ISA);
const LayersFor<BFloat16> PYMTL_JOIN(bfloat16_, PYMTL_ISA) = layers_for<BFloat16>();

}  // namespace pymtl
