// The projection of all heads on a GPU: one matrix product, which is torch's.
#include "ops/cuda/products.h"
#include "ops/cuda/stream.h"

namespace pymtl::ops::cuda {
namespace {

Tensor heads(Tensor given_input, Tensor given_weight, OptionalTensor given_bias, int64_t parts) {
  const Stream stream(given_input);
  const ScalarType type = given_input.scalar_type();
  check(given_input.dim() == 2, "input: expected [rows, features], got ", given_input.dim(), "-D");
  check(given_weight.dim() == 2, "weight: expected [classes, features], got ", given_weight.dim(), "-D");
  const int64_t rows = given_input.size(0);
  const int64_t width = given_weight.size(0);
  const int64_t features = given_weight.size(1);
  check(parts > 0 && features % parts == 0, "parts: expected a divisor of the ", features, " features, got ", parts);
  const Tensor input = checked(given_input, "input", type, {rows, features}, given_input);
  const Tensor weight = checked(given_weight, "weight", type, {width, features}, input);
  const OptionalTensor bias = checked(given_bias, "bias", type, {width}, input);
  return linear(input, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> heads_backward(Tensor given_grad_output, Tensor given_input, Tensor given_weight,
                                                  std::vector<bool> needs) {
  const Stream stream(given_input);
  const ScalarType type = given_input.scalar_type();
  check(given_input.dim() == 2, "input: expected [rows, features], got ", given_input.dim(), "-D");
  check(given_weight.dim() == 2, "weight: expected [classes, features], got ", given_weight.dim(), "-D");
  check(needs.size() == 3, "needs: expected 3 flags, got ", needs.size());
  const int64_t rows = given_input.size(0);
  const int64_t width = given_weight.size(0);
  const int64_t features = given_weight.size(1);
  const Tensor grad_output = checked(given_grad_output, "grad_output", type, {rows, width}, given_input);
  const Tensor input = checked(given_input, "input", type, {rows, features}, given_input);
  const Tensor weight = checked(given_weight, "weight", type, {width, features}, given_input);
  return {needs[0] ? product(grad_output, weight, type) : make(input, {0}),
          needs[1] ? product(transposed(grad_output), input, type) : make(input, {0}),
          needs[2] ? sum_of_rows(grad_output) : make(input, {0})};
}

}  // namespace
}  // namespace pymtl::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(pymtl, PYMTL_DISPATCH_KEY, m) {
  m.impl("heads", TORCH_BOX(&pymtl::ops::cuda::heads));
  m.impl("heads_backward", TORCH_BOX(&pymtl::ops::cuda::heads_backward));
}
