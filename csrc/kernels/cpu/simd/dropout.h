// Dropout over contiguous elements, in a form that compilers turn into vector instructions.
#pragma once

#include <cstdint>

namespace pymtl {
namespace {

// output = input * scale where bits >= drop, else input * 0: NaN and infinity give NaN, as in torch.
template <typename T>
void drop(const T* input, const uint16_t* bits, int64_t count, int32_t drop, T scale, T* output) {
  for (int64_t i = 0; i < count; ++i) output[i] = input[i] * (static_cast<int32_t>(bits[i]) >= drop ? scale : T(0));
}

}  // namespace
}  // namespace pymtl
