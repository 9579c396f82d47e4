// The kernels for 8-bit weights, compiled once per instruction set that has products of its own for them.
#include "quantised.h"

#include "layers.h"

namespace pymtl {

extern const NarrowRnn PYMTL_JOIN(int8_, PYMTL_ISA);
const NarrowRnn PYMTL_JOIN(int8_, PYMTL_ISA) = narrow_rnn<int8_t>(kInt8Scheme);

}  // namespace pymtl
