// The layout of an op's tokens: dense [T, B, ...] or packed [N, ...] with batch_sizes [T].
#pragma once

#include "tensors.h"

namespace pymtl::ops {

inline void check_one_dimension(const Tensor& batch_sizes) {
  check(batch_sizes.dim() == 1, "batch_sizes: expected one dimension, got ", batch_sizes.dim());
}

// batch_sizes [T], contiguous and never increasing, and their sum.
struct BatchSizes {
  Tensor sizes;
  int64_t steps;
  int64_t tokens = 0;

  explicit BatchSizes(const Tensor& given) : sizes(given) {
    check_one_dimension(given);
    steps = given.size(0);
    sizes = checked(given, "batch_sizes", ScalarType::Long, {steps});
    const int64_t* const values = read<int64_t>(sizes);
    for (int64_t t = 0; t < steps; ++t) {
      check(values[t] >= 0 && (t == 0 || values[t] <= values[t - 1]),
            "batch_sizes: expected sizes that never increase and are not negative, got ", values[t], " at step ", t);
      tokens += values[t];
    }
  }

  int64_t batch() const { return steps > 0 ? *read<int64_t>(sizes) : 0; }
};

// sorted_indices [B] on the CPU, contiguous, each index once.
inline Tensor checked_order(const Tensor& given, int64_t batch) {
  const Tensor order = checked(given, "sorted_indices", ScalarType::Long, {batch});
  const int64_t* const indices = read<int64_t>(order);
  std::vector<bool> seen(static_cast<size_t>(batch), false);
  for (int64_t row = 0; row < batch; ++row) {
    check(indices[row] >= 0 && indices[row] < batch && !seen[indices[row]],
          "sorted_indices: expected each index below ", batch, " once, got ", indices[row], " at position ", row);
    seen[indices[row]] = true;
  }
  return order;
}

struct Batch {
  int64_t steps;
  int64_t batch;
  int64_t tokens;
  OptionalTensor batch_sizes;
  Sizes leading;  // the sizes before the features

  Batch(const Tensor& input, const OptionalTensor& given) {
    check_cpu(input, "input");
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
    const BatchSizes packing(*given);
    check(packing.steps > 0, "batch_sizes: expected at least one step, got none");
    check(packing.tokens == input.size(0), "batch_sizes: expected a sum of ", input.size(0),
          ", the tokens of input, got ", packing.tokens);
    batch_sizes = packing.sizes;
    steps = packing.steps;
    batch = packing.batch();
    tokens = packing.tokens;
    leading = {tokens};
  }

  Sizes with(int64_t features) const {
    Sizes sizes = leading;
    sizes.push_back(features);
    return sizes;
  }
};

}  // namespace pymtl::ops
