// Recurrences step by step: a product with W_hh, which torch makes, then a kernel for all of them (see
// kernels/cuda/rnn_step.h).
#pragma once

#include <algorithm>

#include "kernels/cuda/rnn_step.h"
#include "ops/cuda/batch.h"
#include "ops/cuda/products.h"
#include "ops/rnn_call.h"

namespace pymtl::ops::cuda {

// The weights of a call that are multiplied or read within the recurrence, each kind side by side, [G, ...].
template <typename T>
struct StepWeights {
  Tensor w_hh;  // [G, gates * H, H]
  OptionalTensor b_ih, b_hh, g_hh, g_c, b_c;

  StepWeights(const Layer<T>& layer, const RnnArguments& given)
      : w_hh(torch::stable::view(side_by_side(given.weight_hh),
                                 {layer.recurrences, layer.sizes.gates * layer.hidden_size, layer.hidden_size})) {
    if (layer.has_biases) {
      b_ih = side_by_side(*given.bias_ih);
      b_hh = side_by_side(*given.bias_hh);
    }
    const Tensors& norm = or_none(given.norm);
    const auto part = [&](size_t kind) -> OptionalTensor {
      const size_t count = given.weight_hh.size();
      if ((kind + 1) * count > norm.size()) return std::nullopt;
      const auto first = norm.begin() + static_cast<std::ptrdiff_t>(kind * count);
      return side_by_side(Tensors(first, first + static_cast<std::ptrdiff_t>(count)));
    };
    g_hh = part(0);
    g_c = part(1);
    b_c = part(2);
  }

  RnnNorm<T> norm() const { return {read<T>(g_hh), read<T>(g_c), read<T>(b_c)}; }

 private:
  // Contiguous, also where there is one alone, which may be any view.
  static Tensor side_by_side(const Tensors& tensors) { return torch::stable::contiguous(concatenated(tensors, 0)); }
};

// The batched product a b in Accum<T>. For float32 it uses TF32 where torch's own matrix products do: unlike the
// products over all tokens (see product()), it does not follow the setting for cuDNN's recurrent layers.
inline Tensor batched_product(const Tensor& a, const Tensor& b) {
  const ScalarType type = accum_type(a.scalar_type());
  const Tensor result = call("aten::bmm", "dtype", a, b, type);
  check_type(result, "product", type);
  return result;
}

inline Tensor of_recurrences(const Tensor& tensor, const pymtl::cuda::RnnSteps& at) {
  return call("aten::narrow", "", tensor, int64_t{0}, at.first, at.count);
}

// A copy of the given states [G, B, H] in a type, to be written to; or zeros.
inline Tensor states_of(const OptionalTensor& given, const Tensor& like, const Sizes& sizes, ScalarType type) {
  if (!given.has_value()) return torch::stable::new_zeros(like, sizes, type);
  Tensor states = make(like, sizes, type);
  return torch::stable::copy_(states, *given);
}

// The tensor in a type: itself if it is of that.
inline Tensor converted(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : states_of(tensor, tensor, sizes_of(tensor), type);
}

// Calls loop(at) for as many recurrences at a time as a kernel takes.
template <typename T, typename TimeLoop>
void with_recurrences(const Layer<T>& layer, const Batch& batch, const TimeLoop& loop) {
  if (batch.batch == 0) return;
  // The sequences of all recurrences are a launch's blocks.
  constexpr int64_t kMost = INT32_MAX / pymtl::cuda::kRecurrences;
  check(batch.batch <= kMost, "input: expected at most ", kMost, " sequences, got ", batch.batch);
  for (int64_t first = 0; first < layer.recurrences; first += pymtl::cuda::kRecurrences) {
    const int64_t count = std::min<int64_t>(layer.recurrences - first, pymtl::cuda::kRecurrences);
    uint32_t reverse = 0;
    for (int64_t k = 0; k < count; ++k) {
      if (layer.weights[static_cast<size_t>(first + k)].reverse) reverse |= uint32_t{1} << k;
    }
    loop(pymtl::cuda::RnnSteps{layer.cell, layer.recurrences, first, count, reverse, batch.steps, batch.batch,
                               batch.tokens, layer.hidden_size, batch.sizes(), batch.ends()});
  }
}

struct StepStates {
  Tensor h, c;  // [G, B, H]; c of an LSTM, else of no recurrence
};

// projected: [N, G * gates * H] in Accum<T>. The reserve with the output is written to; the last states are returned.
template <typename T>
StepStates steps_forward(const RnnCall<T, Batch>& call, const StepWeights<T>& weights, const Tensor& projected,
                         const RnnReserve& reserve, void* stream) {
  const Masks<T>& masks = call.masks;
  const Tensor h = states_of(call.h0, call.input, call.state(), call.type);
  const Tensor c = states_of(call.c0, call.input, call.cell_state(), accum_type(call.type));
  const Tensor operand = masks.dropout.has_value() ? ops::cuda::call("aten::mul", "Tensor", h, *masks.dropout) : h;
  pymtl::cuda::RnnStepForward<T> args{};
  args.projected = read<Accum<T>>(projected);
  args.b_ih = read<T>(weights.b_ih);
  args.b_hh = read<T>(weights.b_hh);
  args.norm = weights.norm();
  args.masks = masks.masks();
  args.h = write<T>(h);
  args.operand = masks.dropout.has_value() ? write<T>(operand) : nullptr;
  args.c = write<Accum<T>>(c);
  args.output = write<T>(reserve.output);
  args.gates = write<T>(reserve.gates);
  args.cells = write<Accum<T>>(reserve.cells);
  with_recurrences(call.layer, call.batch, [&](const pymtl::cuda::RnnSteps& at) {
    args.at = at;
    const Tensor across = torch::stable::transpose(of_recurrences(weights.w_hh, at), 1, 2);
    const Tensor multiplied = of_recurrences(operand, at);
    for (int64_t step = 0; step < call.batch.steps; ++step) {
      const Tensor sums = batched_product(multiplied, across);
      args.sums = write<Accum<T>>(sums);
      pymtl::cuda::rnn_step_forward(args, step, stream);
    }
  });
  return {h, converted(c, call.type)};
}

struct StepGradients {
  Tensor h0, c0;  // [G, B, H]; c0 of an LSTM, else of no recurrence
};

// grad_gates: [N, G * gradients * H] in T. before: [N, G*H] or empty: not wanted. Both are written to.
template <typename T>
StepGradients steps_backward(const RnnCall<T, Batch>& call, const StepWeights<T>& weights, const RnnReserve& reserve,
                             const RnnResultGradients& above, const Tensor& grad_gates, const Tensor& before,
                             void* stream) {
  const ScalarType real = accum_type(call.type);
  const int64_t H = call.layer.hidden_size;
  const Tensor grad_h = states_of(above.h_n, call.input, call.state(), real);
  const Tensor grad_c = states_of(above.c_n, call.input, call.cell_state(), real);
  const Tensor grad_h0 = make(call.input, call.state());
  pymtl::cuda::RnnStepBackward<T> args{};
  args.norm = weights.norm();
  args.masks = call.masks.masks();
  args.h0 = read<T>(call.h0);
  args.c0 = read<T>(call.c0);
  args.output = read<T>(reserve.output);
  args.gates = read<T>(reserve.gates);
  args.cells = read<Accum<T>>(reserve.cells);
  args.grad_output = read<T>(above.output);
  args.grad_h = write<Accum<T>>(grad_h);
  args.grad_c = write<Accum<T>>(grad_c);
  args.grad_gates = write<T>(grad_gates);
  args.before = write<T>(before);
  with_recurrences(call.layer, call.batch, [&](const pymtl::cuda::RnnSteps& at) {
    args.at = at;
    const Tensor weight = of_recurrences(weights.w_hh, at);
    const int64_t B = call.batch.batch;
    const Tensor operand = torch::stable::new_zeros(call.input, {at.count, B, call.layer.sizes.gates * H});
    Tensor product = torch::stable::new_zeros(call.input, {at.count, B, H}, real);
    args.operand = write<T>(operand);
    for (int64_t step = call.batch.steps - 1; step >= 0; --step) {
      args.product = read<Accum<T>>(product);
      pymtl::cuda::rnn_step_backward(args, step, stream);
      product = batched_product(operand, weight);
    }
    args.product = read<Accum<T>>(product);
    pymtl::cuda::rnn_step_initial_gradient(args, write<T>(grad_h0), stream);
  });
  return {grad_h0, converted(grad_c, call.type)};
}

}  // namespace pymtl::ops::cuda
