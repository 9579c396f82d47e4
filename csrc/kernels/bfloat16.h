// bfloat16: the upper half of a float. Numbers are stored so, and computed with in float.
#pragma once

#include <cstdint>

namespace pymtl {

struct BFloat16 {
  uint16_t bits;
};

// The type that a T is computed with.
template <typename T>
struct RealOf {
  using Type = T;
};
template <>
struct RealOf<BFloat16> {
  using Type = float;
};
template <typename T>
using Accum = typename RealOf<T>::Type;

}  // namespace pymtl
