// The layout of an op's tokens: dense [T, B, ...] or packed [N, ...] with batch_sizes [T].
#pragma once

#include "tensors.h"

namespace pymtl::ops {

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
    check(given->dim() == 1, "batch_sizes: expected one dimension, got ", given->dim());
    batch_sizes = checked(*given, "batch_sizes", ScalarType::Long, {given->size(0)});
    steps = given->size(0);
    tokens = input.size(0);
    leading = {tokens};
    check(steps > 0, "batch_sizes: expected at least one step, got none");
    const int64_t* const sizes = read<int64_t>(*batch_sizes);
    batch = sizes[0];
    int64_t sum = 0;
    for (int64_t t = 0; t < steps; ++t) {
      check(sizes[t] >= 0 && (t == 0 || sizes[t] <= sizes[t - 1]), "batch_sizes: expected sizes that never ",
            "increase and are not negative, got ", sizes[t], " at step ", t);
      sum += sizes[t];
    }
    check(sum == tokens, "batch_sizes: expected a sum of ", tokens, ", the tokens of input, got ", sum);
  }

  Sizes with(int64_t features) const {
    Sizes sizes = leading;
    sizes.push_back(features);
    return sizes;
  }
};

}  // namespace pymtl::ops
