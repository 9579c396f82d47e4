// Dropout (Srivastava et al. 2014): each element becomes zero with probability p or is scaled by 1 / (1 - p).
// The caller draws the random bits, sixteen for an element; p is rounded to a multiple of 2^-16, and the scale
// is that of the rounded p. Its derivative is the same function of the same bits.
#pragma once

#include <cstdint>

#include "executor.h"

namespace pymtl {

template <typename T>
struct Dropout {
  int64_t count;
  double p;              // from 0 to 1
  const T* input;        // [count]
  const uint16_t* bits;  // [count], uniform
  T* output;             // [count]; may be input
};

template <typename T>
void dropout(const Dropout<T>& args, const Executor& executor);

}  // namespace pymtl
