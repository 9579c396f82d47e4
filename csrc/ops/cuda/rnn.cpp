// The recurrent ops on a GPU: LSTMs whose weights it holds at once. Matrix products over all tokens are torch's.
#include "kernels/cuda/rnn.h"

#include "kernels/cuda/packing.h"
#include "ops/cuda/batch.h"
#include "ops/cuda/dtypes.h"
#include "ops/cuda/products.h"
#include "ops/cuda/stream.h"
#include "ops/rnn_layer.h"

namespace pymtl::ops::cuda {
namespace {

using pymtl::cuda::RnnBackward;
using pymtl::cuda::RnnForward;
using pymtl::cuda::RnnShape;

void check_plain(const std::string& mode, const OptionalTensor& dropout, const OptionalTensor& zoneout_h,
                 const OptionalTensor& zoneout_c, const OptionalTensors& norm) {
  check(mode == "LSTM", "mode: expected LSTM, which the GPU has kernels for, got ", mode);
  const bool masks = dropout.has_value() || zoneout_h.has_value() || zoneout_c.has_value();
  check(!masks, "dropout, zoneout_h, zoneout_c: expected none, which the GPU has no kernels for");
  check(!norm.has_value() || norm->empty(), "norm: expected none, which the GPU has no kernels for");
}

template <typename T>
std::vector<pymtl::cuda::RnnWeights<T>> weights_of(const Layer<T>& layer) {
  std::vector<pymtl::cuda::RnnWeights<T>> weights;
  for (const auto& each : layer.weights) weights.push_back({each.w_hh, each.b_ih, each.b_hh, each.reverse});
  return weights;
}

template <typename T>
RnnShape shape_of(const Layer<T>& layer, const Batch& batch, bool allow_tf32) {
  constexpr int64_t kMost = INT32_MAX - 16;
  check(batch.steps <= kMost && batch.batch <= kMost, "input: expected fewer than 2^31 steps and sequences, got ",
        batch.steps, " and ", batch.batch);
  return {layer.recurrences, batch.steps, batch.batch, batch.tokens, layer.hidden_size, batch.sizes(), allow_tf32};
}

// Splits the recurrences by the input they read, and puts what `of` makes of each part side by side.
template <typename Of>
Tensor by_input(const Tensors& weights, int64_t inputs, const Of& of) {
  const size_t each = weights.size() / static_cast<size_t>(inputs);
  Tensors parts;
  for (size_t p = 0; p < static_cast<size_t>(inputs); ++p) {
    const auto first = weights.begin() + static_cast<std::ptrdiff_t>(p * each);
    parts.push_back(of(concatenated(Tensors(first, first + static_cast<std::ptrdiff_t>(each)), 0), p));
  }
  return concatenated(parts, 1);
}

Tensor scratch(const Tensor& like, size_t bytes) { return make(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte); }

struct ForwardResult {
  Tensor output, h_n, c_n, gates, cells;
};

enum class Keep { nothing, for_backward };

ForwardResult forward(const Tensor& given_input, const OptionalTensor& batch_sizes, const Tensors& weight_ih,
                      const Tensors& weight_hh, const Tensors& bias_ih, const Tensors& bias_hh,
                      const std::vector<bool>& reverse, const std::string& mode, const OptionalTensor& given_h0,
                      const OptionalTensor& given_c0, bool allow_tf32, Keep keep) {
  return with_rnn_type(given_input, "input", [&]<typename T>() {
    const Stream stream(given_input);
    const ScalarType type = given_input.scalar_type();
    const Batch batch(given_input, batch_sizes, given_h0, stream);
    const Layer<T> layer(weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode, std::nullopt, given_input);
    const int64_t G = layer.recurrences;
    const int64_t H = layer.hidden_size;
    const int64_t I = layer.input_size;
    const int64_t inputs = inputs_of(layer, given_input);
    const Tensor input = checked(given_input, "input", type, batch.with(inputs * I), given_input);
    const OptionalTensor h0 = checked(given_h0, "h0", type, {G, batch.batch, H}, input);
    const OptionalTensor c0 = checked(given_c0, "c0", type, {G, batch.batch, H}, input);
    const bool train = keep == Keep::for_backward;
    // Rows behind the last token, of which there may be some, are zeros, so that later products are numbers.
    const Sizes output_sizes = batch.with(G * H);
    const Tensor output = batch.exact() ? make(input, output_sizes) : torch::stable::new_zeros(input, output_sizes);
    const ForwardResult result{output, make(input, {G, batch.batch, H}), make(input, {G, batch.batch, H}),
                               make(input, {train ? G : 0, batch.tokens, 4 * H}),
                               make(input, {train ? G : 0, batch.tokens, H}, ScalarType::Float)};
    if (batch.tokens == 0) return result;
    const Tensor rows = torch::stable::view(input, {batch.tokens, inputs * I});
    const Tensor projected = by_input(weight_ih, inputs, [&](const Tensor& weight, size_t p) {
      const Tensor part = inputs == 1 ? rows : columns(rows, static_cast<int64_t>(p) * I, I);
      return product(part, transposed(weight), ScalarType::Float, allow_tf32);
    });
    const auto weights = weights_of(layer);
    const RnnShape shape = shape_of(layer, batch, allow_tf32);
    const Tensor workspace = scratch(input, pymtl::cuda::rnn_forward_workspace<T>(shape));
    pymtl::cuda::rnn_forward(
        RnnForward<T>{shape, weights.data(), read<float>(projected), read<T>(h0), read<T>(c0), write<T>(result.output),
                      write<T>(result.h_n), write<T>(result.c_n), write<T>(result.gates), write<float>(result.cells)},
        write<char>(workspace), stream.get());
    return result;
  });
}

std::tuple<Tensor, Tensor, Tensor> rnn_inference(Tensor input, OptionalTensor batch_sizes, OptionalTensors weight_ih,
                                                 Tensors weight_hh, OptionalTensors bias_ih, OptionalTensors bias_hh,
                                                 std::vector<bool> reverse, std::string mode, OptionalTensor h0,
                                                 OptionalTensor c0, OptionalTensor dropout, OptionalTensor zoneout_h,
                                                 OptionalTensor zoneout_c, OptionalTensors norm, bool allow_tf32,
                                                 OptionalTensor packed) {
  check_plain(mode, dropout, zoneout_h, zoneout_c, norm);
  check(!packed.has_value(), "packed: expected none, which the GPU has no use for");
  const ForwardResult result = forward(input, batch_sizes, or_none(weight_ih), weight_hh, or_none(bias_ih),
                                       or_none(bias_hh), reverse, mode, h0, c0, allow_tf32, Keep::nothing);
  return {result.output, result.h_n, result.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_training(
    Tensor input, OptionalTensor batch_sizes, Tensors weight_ih, Tensors weight_hh, Tensors bias_ih, Tensors bias_hh,
    std::vector<bool> reverse, std::string mode, OptionalTensor h0, OptionalTensor c0, OptionalTensor dropout,
    OptionalTensor zoneout_h, OptionalTensor zoneout_c, OptionalTensors norm, bool allow_tf32) {
  check_plain(mode, dropout, zoneout_h, zoneout_c, norm);
  const ForwardResult result = forward(input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode, h0,
                                       c0, allow_tf32, Keep::for_backward);
  return {result.output, result.h_n, result.c_n, result.gates, result.cells};
}

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensor, Tensor> rnn_backward(
    OptionalTensor given_grad_output, OptionalTensor given_grad_h_n, OptionalTensor given_grad_c_n, Tensor given_input,
    OptionalTensor batch_sizes, Tensors weight_ih, Tensors weight_hh, Tensors bias_ih, Tensors bias_hh,
    std::vector<bool> reverse, std::string mode, OptionalTensor given_h0, OptionalTensor given_c0,
    OptionalTensor dropout, OptionalTensor zoneout_h, OptionalTensor zoneout_c, OptionalTensors norm, bool allow_tf32,
    Tensor given_output, Tensor given_gates, Tensor given_cells, std::vector<bool> flags) {
  check_plain(mode, dropout, zoneout_h, zoneout_c, norm);
  return with_rnn_type(given_input, "input", [&]<typename T>() {
    const Stream stream(given_input);
    const ScalarType type = given_input.scalar_type();
    const Needs needs(flags);
    const Batch batch(given_input, batch_sizes, given_h0, stream);
    const Layer<T> layer(weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode, std::nullopt, given_input);
    const int64_t G = layer.recurrences;
    const int64_t I = layer.input_size;
    const int64_t H = layer.hidden_size;
    const int64_t N = batch.tokens;
    const Sizes state = {G, batch.batch, H};
    const int64_t inputs = inputs_of(layer, given_input);
    const Tensor input = checked(given_input, "input", type, batch.with(inputs * I), given_input);
    const Tensor output = checked(given_output, "output", type, batch.with(G * H), input);
    const Tensor gates = checked(given_gates, "gates", type, {G, N, 4 * H}, input);
    const Tensor cells = checked(given_cells, "cells", ScalarType::Float, {G, N, H}, input);
    const OptionalTensor h0 = checked(given_h0, "h0", type, state, input);
    const OptionalTensor c0 = checked(given_c0, "c0", type, state, input);
    const OptionalTensor grad_output = checked(given_grad_output, "grad_output", type, batch.with(G * H), input);
    const OptionalTensor grad_h_n = checked(given_grad_h_n, "grad_h_n", type, state, input);
    const OptionalTensor grad_c_n = checked(given_grad_c_n, "grad_c_n", type, state, input);

    const Sizes state_sizes = {needs.state ? G : 0, batch.batch, H};
    const Tensor grad_h0 = make(input, state_sizes);
    const Tensor grad_c0 = make(input, state_sizes);
    Tensor grad_input = make(input, {0});
    Tensors grad_w_ih, grad_w_hh, grad_bias;
    if (N == 0) {  // no kernel runs, and the gradients are zero
      if (needs.input) grad_input = make(input, batch.with(inputs * I));
      for (size_t g = 0; g < static_cast<size_t>(G); ++g) {
        if (needs.weight_ih) grad_w_ih.push_back(torch::stable::new_zeros(input, sizes_of(weight_ih[g])));
        if (needs.weight_hh) grad_w_hh.push_back(torch::stable::new_zeros(input, sizes_of(weight_hh[g])));
        if (needs.bias && !bias_ih.empty()) grad_bias.push_back(torch::stable::new_zeros(input, {4 * H}));
      }
      return std::make_tuple(grad_input, grad_w_ih, grad_w_hh, grad_bias, grad_h0, grad_c0);
    }
    const Sizes gate_sizes = {N, G * 4 * H};
    const Tensor grad_gates = batch.exact() ? make(input, gate_sizes) : torch::stable::new_zeros(input, gate_sizes);
    const auto weights = weights_of(layer);
    const RnnShape shape = shape_of(layer, batch, allow_tf32);
    const Tensor workspace = scratch(input, pymtl::cuda::rnn_backward_workspace<T>(shape));
    pymtl::cuda::rnn_backward(RnnBackward<T>{shape, weights.data(), read<T>(c0), read<T>(gates), read<float>(cells),
                                             read<T>(grad_output), read<T>(grad_h_n), read<T>(grad_c_n),
                                             write<T>(grad_gates), write<T>(grad_h0), write<T>(grad_c0)},
                              write<char>(workspace), stream.get());

    const int64_t readers = G / inputs;
    const Tensor rows = torch::stable::view(input, {N, inputs * I});
    if (needs.input) {
      const Tensor whole = by_input(weight_ih, inputs, [&](const Tensor& weight, size_t p) {
        const int64_t width = readers * 4 * H;
        const Tensor part = inputs == 1 ? grad_gates : columns(grad_gates, static_cast<int64_t>(p) * width, width);
        return product(part, weight, type, allow_tf32);
      });
      grad_input = torch::stable::view(whole, batch.with(inputs * I));
    }
    // h before each token, of the same sequence.
    const Tensor before = make(input, {needs.weight_hh ? N : 0, G * H});
    if (needs.weight_hh) {
      std::vector<char> from_the_end(reverse.begin(), reverse.end());
      pymtl::cuda::rnn_states_before(
          pymtl::cuda::StatesBefore{G, batch.steps, batch.batch, N, H * static_cast<int64_t>(sizeof(T)), batch.sizes(),
                                    batch.ends(), from_the_end.data(), output.const_data_ptr(),
                                    h0.has_value() ? h0->const_data_ptr() : nullptr, before.mutable_data_ptr()},
          stream.get());
    }
    for (int64_t g = 0; g < G; ++g) {
      const Tensor own = columns(grad_gates, g * 4 * H, 4 * H);
      const Tensor across = transposed(own);
      if (needs.weight_ih) {
        const Tensor part = inputs == 1 ? rows : columns(rows, g / readers * I, I);
        grad_w_ih.push_back(product(across, part, type, allow_tf32));
      }
      if (needs.weight_hh) grad_w_hh.push_back(product(across, columns(before, g * H, H), type, allow_tf32));
      if (needs.bias && !bias_ih.empty()) grad_bias.push_back(sum_of_rows(own));
    }
    return std::make_tuple(grad_input, grad_w_ih, grad_w_hh, grad_bias, grad_h0, grad_c0);
  });
}

// The largest hidden size that the device of `like` has a kernel for, in the dtype of `like`.
int64_t rnn_hidden_size_limit(Tensor like) {
  return with_rnn_type(like, "like", [&]<typename T>() {
    const Stream stream(like);
    return pymtl::cuda::rnn_hidden_size_limit<T>();
  });
}

}  // namespace
}  // namespace pymtl::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(pymtl, PYMTL_DISPATCH_KEY, m) {
  m.impl("rnn_inference", TORCH_BOX(&pymtl::ops::cuda::rnn_inference));
  m.impl("rnn_training", TORCH_BOX(&pymtl::ops::cuda::rnn_training));
  m.impl("rnn_backward", TORCH_BOX(&pymtl::ops::cuda::rnn_backward));
  m.impl("rnn_hidden_size_limit", TORCH_BOX(&pymtl::ops::cuda::rnn_hidden_size_limit));
}
