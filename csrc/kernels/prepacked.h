// What stands in front of prepacked weights, so that none are read as something that they are not.
#pragma once

#include <cstdint>

#include "bfloat16.h"
#include "cells.h"

namespace pymtl {

struct PrepackedHeader {
  static constexpr uint32_t kVersion = 2;  // of the header and the layout of panels: a new one whenever they change
  static constexpr size_t kBytes = 64;     // that the panels begin behind: a cache line

  uint32_t version;
  uint32_t dtype;   // see prepacked_dtype
  uint32_t scheme;  // 0: numbers of the dtype itself
  uint32_t lanes;   // numbers in a vector of the instruction set
  uint32_t cell;
  uint32_t recurrences;
  uint64_t hidden_size;
};

template <typename T>
inline constexpr uint32_t prepacked_dtype = 0;  // float
template <>
inline constexpr uint32_t prepacked_dtype<double> = 1;
template <>
inline constexpr uint32_t prepacked_dtype<BFloat16> = 2;

}  // namespace pymtl
