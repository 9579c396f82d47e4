// The recurrent ops on a GPU: LSTMs whose weights it holds at once in one kernel, all else step by step. Matrix
// products over all tokens are torch's.
#include "kernels/cuda/rnn.h"

#include <sstream>

#include "kernels/cuda/packing.h"
#include "ops/cuda/batch.h"
#include "ops/cuda/dtypes.h"
#include "ops/cuda/products.h"
#include "ops/cuda/rnn_steps.h"
#include "ops/cuda/stream.h"
#include "ops/rnn_layer.h"

namespace pymtl::ops::cuda {
namespace {

using pymtl::cuda::RnnBackward;
using pymtl::cuda::RnnForward;
using pymtl::cuda::RnnShape;

// Whether one kernel walks the whole sequence, with all weights held.
template <typename T>
bool is_held(const Layer<T>& layer, const Masks<T>& masks, const Batch& batch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const bool plain = layer.cell == Cell::lstm && !masks.any() && batch.tokens > 0;
    return plain && layer.hidden_size <= pymtl::cuda::rnn_hidden_size_limit<T>();
  }
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

// Which of the gradients of a token's gates are of what; all but a GRU's stand as the rows of the weights do.
class GradientColumns {
 public:
  template <typename T>
  GradientColumns(const Layer<T>& layer, const Tensor& grad_gates)
      : grads_(grad_gates),
        each_(layer.sizes.gradients * layer.hidden_size),
        gates_(layer.sizes.gates * layer.hidden_size),
        hidden_size_(layer.hidden_size),
        rotated_(sizes_of(layer.cell).gates == 3) {
    const int64_t plain = rotated_ ? hidden_size_ : 0;
    hidden_ = layer.sizes.normalised ? plain + gates_ : plain;
  }

  Tensor of(int64_t g) const { return columns(grads_, g * each_, each_); }
  Tensor of_hidden(int64_t g) const { return columns(grads_, g * each_ + hidden_, gates_); }
  Tensor of_input(int64_t g) const {
    if (!rotated_) return columns(grads_, g * each_, gates_);
    return concatenated(
        {columns(grads_, g * each_ + hidden_size_, 2 * hidden_size_), columns(grads_, g * each_, hidden_size_)}, 1);
  }
  // Of `count` recurrences from `first` on, side by side.
  Tensor of_inputs(int64_t first, int64_t count) const {
    if (each_ == gates_) return columns(grads_, first * each_, count * each_);
    Tensors parts;
    for (int64_t g = first; g < first + count; ++g) parts.push_back(of_input(g));
    return concatenated(parts, 1);
  }

 private:
  Tensor grads_;   // [N, G * gradients * H]
  int64_t each_;   // gradients * H
  int64_t gates_;  // gates * H
  int64_t hidden_size_;
  int64_t hidden_;  // the first of what W_hh has a part in
  bool rotated_;    // n, r, z, q of a GRU, whose weights have r, z, n
};

Tensor scratch(const Tensor& like, size_t bytes) { return make(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte); }

struct ForwardResult {
  Tensor output, h_n, c_n, gates, cells;
};

enum class Keep { nothing, for_backward };

ForwardResult forward(const Tensor& given_input, const OptionalTensor& batch_sizes, const Tensors& weight_ih,
                      const Tensors& weight_hh, const Tensors& bias_ih, const Tensors& bias_hh,
                      const std::vector<bool>& reverse, const std::string& mode, const OptionalTensor& given_h0,
                      const OptionalTensor& given_c0, const OptionalTensor& dropout, const OptionalTensor& zoneout_h,
                      const OptionalTensor& zoneout_c, const OptionalTensors& norm, bool allow_tf32, Keep keep) {
  return with_any_type(given_input, "input", [&]<typename T>() {
    const Stream stream(given_input);
    const ScalarType type = given_input.scalar_type();
    const Batch batch(given_input, batch_sizes, given_h0, stream);
    const Layer<T> layer(weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode, norm, given_input);
    const int64_t G = layer.recurrences;
    const int64_t H = layer.hidden_size;
    const int64_t I = layer.input_size;
    const int64_t inputs = inputs_of(layer, given_input);
    const Sizes state = {G, batch.batch, H};
    const Tensor input = checked(given_input, "input", type, batch.with(inputs * I), given_input);
    const OptionalTensor h0 = checked(given_h0, "h0", type, state, input);
    const OptionalTensor c0 = checked_cell(given_c0, "c0", layer.cell, state, input);
    const Masks<T> masks(dropout, zoneout_h, zoneout_c, layer, batch.batch, batch.with(G * H), input);
    const bool train = keep == Keep::for_backward;
    const int64_t kept = sizes_of(layer.cell, masks.zoneout_h.has_value()).kept;
    // Rows behind the last token, of which there may be some, are zeros, so that later products are numbers.
    const Sizes output_sizes = batch.with(G * H);
    const Tensor output = batch.exact() ? make(input, output_sizes) : torch::stable::new_zeros(input, output_sizes);
    const Tensor gates = make(input, {train ? G : 0, batch.tokens, kept * H});
    const Tensor cells = make(input, {train && layer.sizes.has_cell ? G : 0, batch.tokens, H}, real_type(type));
    const Tensor rows = torch::stable::view(input, {batch.tokens, inputs * I});
    const Tensor projected = layer.sizes.normalised
                                 ? converted(rows, real_type(type))
                                 : by_input(weight_ih, inputs, [&](const Tensor& weight, size_t p) {
                                     const Tensor part =
                                         inputs == 1 ? rows : columns(rows, static_cast<int64_t>(p) * I, I);
                                     return product(part, transposed(weight), real_type(type), allow_tf32);
                                   });
    if (!is_held(layer, masks, batch)) {
      const StepWeights<T> weights(layer, weight_hh, bias_ih, bias_hh, norm);
      const StepStates last =
          steps_forward(layer, weights, batch, masks, projected, h0, c0, output, gates, cells, stream.get());
      return ForwardResult{output, last.h, last.c, gates, cells};
    }
    const ForwardResult result{output, make(input, state), make(input, state), gates, cells};
    if constexpr (!std::is_same_v<T, double>) {
      const auto weights = weights_of(layer);
      const RnnShape shape = shape_of(layer, batch, allow_tf32);
      const Tensor workspace = scratch(input, pymtl::cuda::rnn_forward_workspace<T>(shape));
      pymtl::cuda::rnn_forward(RnnForward<T>{shape, weights.data(), read<float>(projected), read<T>(h0), read<T>(c0),
                                             write<T>(result.output), write<T>(result.h_n), write<T>(result.c_n),
                                             write<T>(result.gates), write<float>(result.cells)},
                               write<char>(workspace), stream.get());
    }
    return result;
  });
}

std::tuple<Tensor, Tensor, Tensor> rnn_inference(Tensor input, OptionalTensor batch_sizes, OptionalTensors weight_ih,
                                                 Tensors weight_hh, OptionalTensors bias_ih, OptionalTensors bias_hh,
                                                 std::vector<bool> reverse, std::string mode, OptionalTensor h0,
                                                 OptionalTensor c0, OptionalTensor dropout, OptionalTensor zoneout_h,
                                                 OptionalTensor zoneout_c, OptionalTensors norm, bool allow_tf32,
                                                 OptionalTensor packed) {
  check(!packed.has_value(), "packed: expected none, which the GPU has no use for");
  const ForwardResult result =
      forward(input, batch_sizes, or_none(weight_ih), weight_hh, or_none(bias_ih), or_none(bias_hh), reverse, mode, h0,
              c0, dropout, zoneout_h, zoneout_c, norm, allow_tf32, Keep::nothing);
  return {result.output, result.h_n, result.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_training(
    Tensor input, OptionalTensor batch_sizes, Tensors weight_ih, Tensors weight_hh, Tensors bias_ih, Tensors bias_hh,
    std::vector<bool> reverse, std::string mode, OptionalTensor h0, OptionalTensor c0, OptionalTensor dropout,
    OptionalTensor zoneout_h, OptionalTensor zoneout_c, OptionalTensors norm, bool allow_tf32) {
  const ForwardResult result = forward(input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode, h0,
                                       c0, dropout, zoneout_h, zoneout_c, norm, allow_tf32, Keep::for_backward);
  return {result.output, result.h_n, result.c_n, result.gates, result.cells};
}

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensor, Tensor> rnn_backward(
    OptionalTensor given_grad_output, OptionalTensor given_grad_h_n, OptionalTensor given_grad_c_n, Tensor given_input,
    OptionalTensor batch_sizes, Tensors weight_ih, Tensors weight_hh, Tensors bias_ih, Tensors bias_hh,
    std::vector<bool> reverse, std::string mode, OptionalTensor given_h0, OptionalTensor given_c0,
    OptionalTensor dropout, OptionalTensor zoneout_h, OptionalTensor zoneout_c, OptionalTensors norm, bool allow_tf32,
    Tensor given_output, Tensor given_gates, Tensor given_cells, std::vector<bool> flags) {
  return with_any_type(given_input, "input", [&]<typename T>() {
    const Stream stream(given_input);
    const ScalarType type = given_input.scalar_type();
    const Needs needs(flags);
    const Batch batch(given_input, batch_sizes, given_h0, stream);
    const Layer<T> layer(weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode, norm, given_input);
    const int64_t G = layer.recurrences;
    const int64_t I = layer.input_size;
    const int64_t H = layer.hidden_size;
    const int64_t N = batch.tokens;
    const Sizes state = {G, batch.batch, H};
    const int64_t inputs = inputs_of(layer, given_input);
    const Tensor input = checked(given_input, "input", type, batch.with(inputs * I), given_input);
    const Masks<T> masks(dropout, zoneout_h, zoneout_c, layer, batch.batch, batch.with(G * H), input);
    const int64_t kept = sizes_of(layer.cell, masks.zoneout_h.has_value()).kept;
    const Tensor output = checked(given_output, "output", type, batch.with(G * H), input);
    const Tensor gates = checked(given_gates, "gates", type, {G, N, kept * H}, input);
    const Sizes cell_sizes = {layer.sizes.has_cell ? G : 0, N, H};
    const Tensor cells = checked(given_cells, "cells", real_type(type), cell_sizes, input);
    const OptionalTensor h0 = checked(given_h0, "h0", type, state, input);
    const OptionalTensor c0 = checked_cell(given_c0, "c0", layer.cell, state, input);
    const OptionalTensor grad_output = checked(given_grad_output, "grad_output", type, batch.with(G * H), input);
    const OptionalTensor grad_h_n = checked(given_grad_h_n, "grad_h_n", type, state, input);
    const OptionalTensor grad_c_n = checked_cell(given_grad_c_n, "grad_c_n", layer.cell, state, input);

    const bool held = is_held(layer, masks, batch);
    const Sizes no_state = {0, batch.batch, H};
    Tensor grad_h0 = make(input, needs.state && held ? state : no_state);
    Tensor grad_c0 = make_cell(input, layer.cell, needs.state && held ? state : no_state);
    const int64_t each = layer.sizes.gradients * H;  // of a recurrence's gradients of a token
    const Sizes gate_sizes = {N, G * each};
    const Tensor grad_gates = batch.exact() ? make(input, gate_sizes) : torch::stable::new_zeros(input, gate_sizes);
    // What was multiplied by W_hh at each token: h before it, of the same sequence.
    const Sizes before_sizes = {needs.weight_hh ? N : 0, G * H};
    const bool whole = held || batch.exact();  // whether all rows are written
    const Tensor before = whole ? make(input, before_sizes) : torch::stable::new_zeros(input, before_sizes);
    if (!held) {
      const StepWeights<T> weights(layer, weight_hh, bias_ih, bias_hh, norm);
      const StepResults given{h0, c0, output, gates, cells, grad_output, grad_h_n, grad_c_n};
      const StepGradients initial =
          steps_backward(layer, weights, batch, masks, given, grad_gates, before, stream.get());
      if (needs.state) {
        grad_h0 = initial.h0;
        grad_c0 = initial.c0;
      }
    } else if constexpr (!std::is_same_v<T, double>) {
      const auto weights = weights_of(layer);
      const RnnShape shape = shape_of(layer, batch, allow_tf32);
      const Tensor workspace = scratch(input, pymtl::cuda::rnn_backward_workspace<T>(shape));
      pymtl::cuda::rnn_backward(RnnBackward<T>{shape, weights.data(), read<T>(c0), read<T>(gates), read<float>(cells),
                                               read<T>(grad_output), read<T>(grad_h_n), read<T>(grad_c_n),
                                               write<T>(grad_gates), write<T>(grad_h0), write<T>(grad_c0)},
                                write<char>(workspace), stream.get());
      if (needs.weight_hh) {
        std::vector<char> from_the_end(reverse.begin(), reverse.end());
        pymtl::cuda::rnn_states_before(
            pymtl::cuda::StatesBefore{G, batch.steps, batch.batch, N, H * static_cast<int64_t>(sizeof(T)),
                                      batch.sizes(), batch.ends(), from_the_end.data(), output.const_data_ptr(),
                                      h0.has_value() ? h0->const_data_ptr() : nullptr, before.mutable_data_ptr()},
            stream.get());
      }
    }

    const GradientColumns parts(layer, grad_gates);
    const int64_t readers = G / inputs;
    const Tensor rows = torch::stable::view(input, {N, inputs * I});
    Tensor grad_input = make(input, {0});
    if (needs.input) {
      const Tensor of_rows = layer.sizes.normalised
                                 ? parts.of_inputs(0, G)
                                 : by_input(weight_ih, inputs, [&](const Tensor& weight, size_t p) {
                                     const Tensor own = parts.of_inputs(static_cast<int64_t>(p) * readers, readers);
                                     return product(own, weight, type, allow_tf32);
                                   });
      grad_input = torch::stable::reshape(of_rows, batch.with(inputs * I));
    }
    const auto of_weight = [&](const Tensor& grads, const Tensor& read) {
      const Tensor across = transposed(grads);
      if (N == 0) return torch::stable::new_zeros(input, {across.size(0), read.size(1)});
      return product(across, read, type, allow_tf32);
    };
    Tensors grad_w_ih, grad_w_hh, grad_bias;
    for (int64_t g = 0; g < G; ++g) {
      if (needs.weight_ih && !layer.sizes.normalised) {
        const Tensor own = inputs == 1 ? rows : columns(rows, g / readers * I, I);
        grad_w_ih.push_back(of_weight(parts.of_input(g), own));
      }
      if (needs.weight_hh) grad_w_hh.push_back(of_weight(parts.of_hidden(g), columns(before, g * H, H)));
      if (needs.bias && (layer.sizes.normalised || !bias_ih.empty())) grad_bias.push_back(sum_of_rows(parts.of(g)));
    }
    return std::make_tuple(grad_input, grad_w_ih, grad_w_hh, grad_bias, grad_h0, grad_c0);
  });
}

// The largest hidden size whose weights one kernel holds on the device of `like`, in the dtype of `like`.
int64_t rnn_hidden_size_limit(Tensor like) {
  return with_any_type(like, "like", [&]<typename T>() -> int64_t {
    if constexpr (std::is_same_v<T, double>) {
      return 0;
    } else {
      const Stream stream(like);
      return pymtl::cuda::rnn_hidden_size_limit<T>();
    }
  });
}

std::string rnn_choices(Tensor like, int64_t recurrences, int64_t batch, int64_t hidden_size, bool allow_tf32,
                        bool backward) {
  check(recurrences >= 1 && batch >= 1 && hidden_size >= 1,
        "recurrences, batch and hidden_size: expected 1 or more, got ", recurrences, ", ", batch, " and ", hidden_size);
  return with_any_type(like, "like", [&]<typename T>() -> std::string {
    std::ostringstream lines;
    if constexpr (!std::is_same_v<T, double>) {
      const Stream stream(like);
      const RnnShape shape{recurrences, 1, batch, batch, hidden_size, nullptr, allow_tf32};
      for (const auto& choice : pymtl::cuda::rnn_choices<T>(shape, backward)) {
        lines << choice.name << ": " << choice.at_once << " at once, waves " << choice.waves << ", us a step "
              << choice.step << (choice.chosen ? " *" : "") << '\n';
      }
    }
    return lines.str();
  });
}

void rnn_force_choice(Tensor, std::string name) { pymtl::cuda::rnn_force_choice(name); }

}  // namespace
}  // namespace pymtl::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(pymtl, PYMTL_DISPATCH_KEY, m) {
  m.impl("rnn_inference", TORCH_BOX(&pymtl::ops::cuda::rnn_inference));
  m.impl("rnn_training", TORCH_BOX(&pymtl::ops::cuda::rnn_training));
  m.impl("rnn_backward", TORCH_BOX(&pymtl::ops::cuda::rnn_backward));
  m.impl("rnn_hidden_size_limit", TORCH_BOX(&pymtl::ops::cuda::rnn_hidden_size_limit));
  m.impl("rnn_choices", TORCH_BOX(&pymtl::ops::cuda::rnn_choices));
  m.impl("rnn_force_choice", TORCH_BOX(&pymtl::ops::cuda::rnn_force_choice));
}
