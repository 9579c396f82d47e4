#include "kernels/heads.h"

#include "scratch.h"
#include "tensors.h"

namespace pymtl::ops {
namespace {

Tensor heads(Tensor given_input, Tensor given_weight, OptionalTensor given_bias, int64_t parts) {
  return with_layer_type(given_input, "input", [&]<typename T>() {
    const ScalarType type = given_input.scalar_type();
    check(given_input.dim() == 2, "input: expected [rows, features], got ", given_input.dim(), "-D");
    check(given_weight.dim() == 2, "weight: expected [classes, features], got ", given_weight.dim(), "-D");
    const int64_t rows = given_input.size(0);
    const int64_t width = given_weight.size(0);
    const int64_t features = given_weight.size(1);
    check(parts > 0 && features % parts == 0, "parts: expected a divisor of the ", features, " features, got ", parts);
    const Tensor input = checked(given_input, "input", type, {rows, features});
    const Tensor weight = checked(given_weight, "weight", type, {width, features});
    const OptionalTensor bias = checked(given_bias, "bias", type, {width});
    const Tensor output = make(input, {rows, width});
    if (output.numel() > 0) {
      const Heads<T> args{rows,           parts,           features / parts, width,
                          read<T>(input), read<T>(weight), read<T>(bias),    write<T>(output)};
      const Executor executor = torch_executor();
      const Scratch workspace(heads_workspace(args, executor));
      heads_forward(args, workspace.memory(), executor);
    }
    return output;
  });
}

std::tuple<Tensor, Tensor, Tensor> heads_backward(Tensor given_grad_output, Tensor given_input, Tensor given_weight,
                                                  std::vector<bool> needs) {
  return with_layer_type(given_input, "input", [&]<typename T>() {
    const ScalarType type = given_input.scalar_type();
    check(given_input.dim() == 2, "input: expected [rows, features], got ", given_input.dim(), "-D");
    check(given_weight.dim() == 2, "weight: expected [classes, features], got ", given_weight.dim(), "-D");
    check(needs.size() == 3, "needs: expected 3 flags, got ", needs.size());
    const int64_t rows = given_input.size(0);
    const int64_t width = given_weight.size(0);
    const int64_t features = given_weight.size(1);
    const Tensor grad_output = checked(given_grad_output, "grad_output", type, {rows, width});
    const Tensor input = checked(given_input, "input", type, {rows, features});
    const Tensor weight = checked(given_weight, "weight", type, {width, features});
    // Sums over no rows or no classes are zero, and no kernel runs.
    const bool empty = rows == 0 || width == 0;
    const auto result = [&](bool needed, const Sizes& sizes) {
      if (!needed) return make(input, {0});
      return empty ? torch::stable::new_zeros(input, sizes) : make(input, sizes);
    };
    const Tensor grad_input = result(needs[0], {rows, features});
    const Tensor grad_weight = result(needs[1], {width, features});
    const Tensor grad_bias = result(needs[2], {width});
    if (!empty) {
      const HeadsBackward<T> args{rows,
                                  features,
                                  width,
                                  read<T>(grad_output),
                                  read<T>(input),
                                  read<T>(weight),
                                  write<T>(grad_input),
                                  write<T>(grad_weight),
                                  write<T>(grad_bias)};
      const Executor executor = torch_executor();
      const Scratch workspace(heads_backward_workspace(args, executor));
      pymtl::heads_backward(args, workspace.memory(), executor);
    }
    return std::make_tuple(grad_input, grad_weight, grad_bias);
  });
}

}  // namespace
}  // namespace pymtl::ops

STABLE_TORCH_LIBRARY_IMPL(pymtl, CPU, m) {
  m.impl("heads", TORCH_BOX(&pymtl::ops::heads));
  m.impl("heads_backward", TORCH_BOX(&pymtl::ops::heads_backward));
}
