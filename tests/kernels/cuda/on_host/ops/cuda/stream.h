// Stands in for csrc/ops/cuda/stream.h where the ops of a GPU are compiled for the host: tensors on the CPU pass for
// tensors on a GPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>

#include "ops/tensors.h"

#define PYMTL_DISPATCH_KEY CPU

namespace pymtl::ops::cuda {

// Whether sizes pass for being on the GPU, too: then nobody looks at them.
inline bool is_on_device(const Tensor&) {
  const char* const sizes = std::getenv("PYMTL_SIZES_ON_GPU");
  return sizes != nullptr && *sizes == '1';
}

class Stream {
 public:
  explicit Stream(const Tensor&) {}
  void* get() const { return nullptr; }
};

}  // namespace pymtl::ops::cuda
