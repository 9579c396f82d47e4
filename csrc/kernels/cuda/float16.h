// IEEE half precision: numbers are stored so, and computed with in float.
#pragma once

#include "kernels/bfloat16.h"

namespace pymtl {

struct Float16 {
  uint16_t bits;
};

template <>
struct RealOf<Float16> {
  using Type = float;
};

}  // namespace pymtl
