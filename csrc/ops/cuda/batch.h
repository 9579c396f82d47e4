// The layout of an op's tokens on a GPU: dense [T, B, ...], or packed [N, ...] with batch_sizes [T]. These are on the
// CPU, as torch.nn.utils.rnn.PackedSequence has them, and checked; or on the GPU, where nothing waits to look at them:
// then N may be more than their sum, and is T * B where nothing else tells B.
#pragma once

#include "kernels/cuda/packing.h"
#include "ops/batch.h"
#include "ops/cuda/products.h"
#include "ops/cuda/stream.h"

namespace pymtl::ops::cuda {

// Sizes of steps on the device, and the number of tokens up to the end of each.
struct DeviceBatchSizes {
  Tensor sizes;  // [T]
  Tensor ends;   // [T]
  bool exact;    // known on the host, too
  int64_t batch = 0;
  int64_t tokens = 0;

  DeviceBatchSizes(const Tensor& given, const Tensor& like, const Stream& stream)
      : sizes(given), ends(given), exact(!is_on_device(given)) {
    if (exact) {
      check(!pymtl::cuda::is_recorded(stream.get()),
            "batch_sizes: expected them on the GPU while a CUDA graph is recorded, got them on the CPU");
      const BatchSizes packing(given);
      batch = packing.batch();
      tokens = packing.tokens;
      // Both in one copy, which does not wait: the host's memory is read before the call returns.
      const Tensor both = make(packing.sizes, {2, packing.steps});
      const int64_t* const from = read<int64_t>(packing.sizes);
      int64_t* const to = static_cast<int64_t*>(both.mutable_data_ptr());
      for (int64_t t = 0, end = 0; t < packing.steps; ++t) {
        to[t] = from[t];
        to[packing.steps + t] = end += from[t];
      }
      Tensor there = make(like, {2, packing.steps}, ScalarType::Long);
      torch::stable::copy_(there, both, true);
      sizes = torch::stable::select(there, 0, 0);
      ends = torch::stable::select(there, 0, 1);
      return;
    }
    check_one_dimension(given);
    sizes = checked(given, "batch_sizes", ScalarType::Long, {given.size(0)}, like);
    ends = call("aten::cumsum", "", sizes, int64_t{0}, std::optional<ScalarType>());
  }

  // B, where there are so many rows of `name`.
  int64_t batch_of(int64_t rows, const char* name) const {
    if (exact) {
      check(tokens == rows, "batch_sizes: expected a sum of ", rows, ", the tokens of ", name, ", got ", tokens);
      return batch;
    }
    const int64_t steps = sizes.size(0);
    check(steps > 0 && rows % steps == 0, name, ": expected as many rows for each of ", steps,
          " steps with batch_sizes on the GPU, got ", rows, " in all");
    return rows / steps;
  }
};

struct Batch {
  int64_t steps;
  int64_t batch;
  int64_t tokens;
  std::optional<DeviceBatchSizes> packing;
  Sizes leading;  // the sizes before the features

  // state: h0 [G, B, H], which tells B where sizes on the GPU do not.
  Batch(const Tensor& input, const OptionalTensor& given, const OptionalTensor& state, const Stream& stream) {
    if (!given.has_value()) {
      check(input.dim() == 3, "input: expected [steps, batch, features] without batch_sizes, got ", input.dim(), "-D");
      steps = input.size(0);
      batch = input.size(1);
      tokens = steps * batch;
      leading = {steps, batch};
      check(steps > 0, "input: expected sequence length to be larger than 0");
      return;
    }
    check(input.dim() == 2, "input: expected [tokens, features] with batch_sizes, got ", input.dim(), "-D");
    packing.emplace(*given, input, stream);
    steps = given->size(0);
    check(steps > 0, "batch_sizes: expected at least one step, got none");
    tokens = input.size(0);
    leading = {tokens};
    const bool told = !packing->exact && state.has_value() && state->dim() == 3;
    batch = told ? state->size(1) : packing->batch_of(tokens, "input");
  }

  bool exact() const { return !packing.has_value() || packing->exact; }
  const int64_t* sizes() const { return packing.has_value() ? read<int64_t>(packing->sizes) : nullptr; }
  const int64_t* ends() const { return packing.has_value() ? read<int64_t>(packing->ends) : nullptr; }

  Sizes with(int64_t features) const {
    Sizes all = leading;
    all.push_back(features);
    return all;
  }
};

}  // namespace pymtl::ops::cuda
