// Values as Torch's stable interface passes them. The conversions are private to torch (torch::stable::detail), so they
// stand here alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace pymtl::ops {

template <typename T>
StableIValue boxed(const T& value) {
  return torch::stable::detail::from(value);
}

template <typename T>
T unboxed(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}

}  // namespace pymtl::ops
