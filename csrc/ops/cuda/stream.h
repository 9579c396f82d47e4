// Where an op's work on a GPU goes.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops/tensors.h"

#define PYMTL_DISPATCH_KEY CUDA

namespace pymtl::ops::cuda {

inline bool is_on_device(const Tensor& tensor) { return tensor.is_cuda(); }

// Makes the device of an op's tensors the current one, and knows torch's current stream there.
class Stream {
 public:
  explicit Stream(const Tensor& like) : guard_(like.get_device()) {
    check_call(aoti_torch_get_current_cuda_stream(like.get_device(), &stream_), "aoti_torch_get_current_cuda_stream");
  }

  void* get() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace pymtl::ops::cuda
