// What stands in front of prepacked weights, so that none are read as something that they are not.
#pragma once

#include <cstdint>

#include "bfloat16.h"
#include "cells.h"

namespace pymtl {

// How a matrix of weights is kept, where that is not in numbers of the dtype that is computed with.
enum class WeightFormat { own, bfloat16, int8 };

// How the numbers of a panel lie in memory. Those of 8 bits are in the order that the instruction set multiplies in.
enum class PanelScheme : uint32_t {
  own,         // of the dtype itself
  bfloat16,    // pairs of consecutive depth
  int8_pairs,  // pairs of consecutive depth
  int8_fours   // fours of consecutive depth
};

inline WeightFormat format_of(PanelScheme scheme) {
  return scheme == PanelScheme::own        ? WeightFormat::own
         : scheme == PanelScheme::bfloat16 ? WeightFormat::bfloat16
                                           : WeightFormat::int8;
}

struct PrepackedHeader {
  static constexpr uint32_t kVersion = 3;  // of the header and the layout of panels: a new one whenever they change
  static constexpr size_t kBytes = 64;     // that the panels begin behind: a cache line

  uint32_t version;
  uint32_t dtype;   // see prepacked_dtype
  uint32_t scheme;  // a PanelScheme
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
