// The recurrent ops on a GPU: persistent kernels for LSTMs whose weights they hold, per-step kernels for all else.
// Matrix products over all tokens are torch's.
#include "kernels/cuda/rnn.h"

#include <sstream>

#include "kernels/cuda/packing.h"
#include "ops/cuda/batch.h"
#include "ops/cuda/dtypes.h"
#include "ops/cuda/products.h"
#include "ops/cuda/rnn_steps.h"
#include "ops/cuda/stream.h"
#include "ops/rnn_call.h"

namespace pymtl::ops::cuda {
namespace {

using pymtl::cuda::RnnBackward;
using pymtl::cuda::RnnForward;
using pymtl::cuda::RnnShape;

template <typename T>
using Call = RnnCall<T, Batch>;

// Whether a persistent kernel takes the call: one that holds all weights for the whole sequence.
template <typename T>
bool is_persistent(const Call<T>& call) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const bool plain = call.layer.cell == Cell::lstm && !call.masks.any() && call.batch.tokens > 0;
    return plain && call.layer.hidden_size <= pymtl::cuda::rnn_hidden_size_limit<T>();
  }
}

template <typename T>
std::vector<pymtl::cuda::RnnWeights<T>> weights_of(const Layer<T>& layer) {
  std::vector<pymtl::cuda::RnnWeights<T>> weights;
  for (const auto& each : layer.weights) weights.push_back({each.w_hh, each.b_ih, each.b_hh, each.reverse});
  return weights;
}

template <typename T>
RnnShape shape_of(const Call<T>& call, bool allow_tf32) {
  const Batch& batch = call.batch;
  constexpr int64_t kMost = INT32_MAX - 16;
  check(batch.steps <= kMost && batch.batch <= kMost, "input: expected fewer than 2^31 steps and sequences, got ",
        batch.steps, " and ", batch.batch);
  return {call.layer.recurrences, batch.steps,   batch.batch, batch.tokens,
          call.layer.hidden_size, batch.sizes(), allow_tf32};
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

// Which columns of grad_gates belong to W_ih and to W_hh; only a GRU's are in another order than the weights' rows.
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

enum class Keep { nothing, for_backward };

// output, h_n, c_n and the reserve's gates and cells.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const RnnArguments& arguments, Keep keep) {
  return with_any_type(arguments.input, "input", [&]<typename T>() {
    const Stream stream(arguments.input);
    const Call<T> call(arguments, arguments.h0, stream);
    const Layer<T>& layer = call.layer;
    const Batch& batch = call.batch;
    const int64_t I = layer.input_size;
    const int64_t inputs = call.inputs;
    const Tensor& input = call.input;
    // Rows behind the last token, of which there may be some, are zeros, so that later products are numbers.
    const Tensor output =
        batch.exact() ? make(input, call.output_sizes()) : torch::stable::new_zeros(input, call.output_sizes());
    const RnnReserve reserve = call.make_reserve(output, keep == Keep::for_backward);
    const Tensor rows = torch::stable::view(input, {batch.tokens, inputs * I});
    const Tensor projected =
        layer.sizes.normalised
            ? converted(rows, accum_type(call.type))
            : by_input(or_none(arguments.weight_ih), inputs, [&](const Tensor& weight, size_t p) {
                const Tensor part = inputs == 1 ? rows : columns(rows, static_cast<int64_t>(p) * I, I);
                return product(part, transposed(weight), accum_type(call.type), arguments.allow_tf32);
              });
    if (!is_persistent(call)) {
      const StepWeights<T> weights(layer, arguments);
      const StepStates last = steps_forward(call, weights, projected, reserve, stream.get());
      return std::make_tuple(output, last.h, last.c, reserve.gates, reserve.cells);
    }
    const Tensor h_n = make(input, call.state());
    const Tensor c_n = make(input, call.state());
    if constexpr (!std::is_same_v<T, double>) {
      const auto weights = weights_of(layer);
      const RnnShape shape = shape_of(call, arguments.allow_tf32);
      const Tensor workspace = scratch(input, pymtl::cuda::rnn_forward_workspace<T>(shape));
      pymtl::cuda::rnn_forward(RnnForward<T>{shape, weights.data(), read<float>(projected), read<T>(call.h0),
                                             read<T>(call.c0), write<T>(output), write<T>(h_n), write<T>(c_n),
                                             write<T>(reserve.gates), write<float>(reserve.cells)},
                               write<char>(workspace), stream.get());
    }
    return std::make_tuple(output, h_n, c_n, reserve.gates, reserve.cells);
  });
}

std::tuple<Tensor, Tensor, Tensor> rnn_inference(const RnnArguments& arguments, const OptionalTensor& prepacked) {
  check(!prepacked.has_value(), "prepacked: expected None, since a GPU takes no prepacked weights, got a tensor");
  const auto [output, h_n, c_n, gates, cells] = forward(arguments, Keep::nothing);
  return {output, h_n, c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_training(const RnnArguments& arguments) {
  return forward(arguments, Keep::for_backward);
}

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensor, Tensor> rnn_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const RnnArguments& arguments, const Tensor& output, const Tensor& gates, const Tensor& cells,
    const std::vector<bool>& flags) {
  return with_any_type(arguments.input, "input", [&]<typename T>() {
    const Stream stream(arguments.input);
    const Needs needs(flags);
    const Call<T> call(arguments, arguments.h0, stream);
    const Layer<T>& layer = call.layer;
    const Batch& batch = call.batch;
    const RnnReserve reserve = call.checked(RnnReserve{output, gates, cells});
    const RnnResultGradients above = call.checked(RnnResultGradients{grad_output, grad_h_n, grad_c_n});
    const int64_t G = layer.recurrences;
    const int64_t I = layer.input_size;
    const int64_t H = layer.hidden_size;
    const int64_t N = batch.tokens;
    const int64_t inputs = call.inputs;
    const Tensor& input = call.input;
    const bool allow_tf32 = arguments.allow_tf32;

    const bool persistent = is_persistent(call);
    Tensor grad_h0 = make(input, needs.state && persistent ? call.state() : call.no_state());
    Tensor grad_c0 = make(input, needs.state && persistent ? call.cell_state() : call.no_state());
    const int64_t each = layer.sizes.gradients * H;  // of a recurrence's gradients of a token
    const Sizes gate_sizes = {N, G * each};
    const Tensor grad_gates = batch.exact() ? make(input, gate_sizes) : torch::stable::new_zeros(input, gate_sizes);
    // What was multiplied by W_hh at each token: h before it, of the same sequence.
    const Sizes before_sizes = {needs.weight_hh ? N : 0, G * H};
    const bool whole = persistent || batch.exact();  // whether all rows are written
    const Tensor before = whole ? make(input, before_sizes) : torch::stable::new_zeros(input, before_sizes);
    if (!persistent) {
      const StepWeights<T> weights(layer, arguments);
      const StepGradients initial = steps_backward(call, weights, reserve, above, grad_gates, before, stream.get());
      if (needs.state) {
        grad_h0 = initial.h0;
        grad_c0 = initial.c0;
      }
    } else if constexpr (!std::is_same_v<T, double>) {
      const auto weights = weights_of(layer);
      const RnnShape shape = shape_of(call, allow_tf32);
      const Tensor workspace = scratch(input, pymtl::cuda::rnn_backward_workspace<T>(shape));
      pymtl::cuda::rnn_backward(
          RnnBackward<T>{shape, weights.data(), read<T>(call.c0), read<T>(reserve.gates), read<float>(reserve.cells),
                         read<T>(above.output), read<T>(above.h_n), read<T>(above.c_n), write<T>(grad_gates),
                         write<T>(grad_h0), write<T>(grad_c0)},
          write<char>(workspace), stream.get());
      if (needs.weight_hh) {
        std::vector<char> from_the_end(arguments.reverse.begin(), arguments.reverse.end());
        pymtl::cuda::rnn_states_before(
            pymtl::cuda::StatesBefore{G, batch.steps, batch.batch, N, H * static_cast<int64_t>(sizeof(T)),
                                      batch.sizes(), batch.ends(), from_the_end.data(), reserve.output.const_data_ptr(),
                                      call.h0.has_value() ? call.h0->const_data_ptr() : nullptr,
                                      before.mutable_data_ptr()},
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
                                 : by_input(or_none(arguments.weight_ih), inputs, [&](const Tensor& weight, size_t p) {
                                     const Tensor own = parts.of_inputs(static_cast<int64_t>(p) * readers, readers);
                                     return product(own, weight, call.type, allow_tf32);
                                   });
      grad_input = torch::stable::reshape(of_rows, batch.with(inputs * I));
    }
    const auto of_weight = [&](const Tensor& grads, const Tensor& read) {
      const Tensor across = transposed(grads);
      if (N == 0) return torch::stable::new_zeros(input, {across.size(0), read.size(1)});
      return product(across, read, call.type, allow_tf32);
    };
    Tensors grad_w_ih, grad_w_hh, grad_bias;
    for (int64_t g = 0; g < G; ++g) {
      if (needs.weight_ih && !layer.sizes.normalised) {
        const Tensor own = inputs == 1 ? rows : columns(rows, g / readers * I, I);
        grad_w_ih.push_back(of_weight(parts.of_input(g), own));
      }
      if (needs.weight_hh) grad_w_hh.push_back(of_weight(parts.of_hidden(g), columns(before, g * H, H)));
      if (needs.bias && (layer.sizes.normalised || layer.has_biases)) grad_bias.push_back(sum_of_rows(parts.of(g)));
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
  m.impl("rnn_inference", TORCH_BOX(&pymtl::ops::RnnInferenceOp<pymtl::ops::cuda::rnn_inference>::call));
  m.impl("rnn_training", TORCH_BOX(&pymtl::ops::RnnTrainingOp<pymtl::ops::cuda::rnn_training>::call));
  m.impl("rnn_backward", TORCH_BOX(&pymtl::ops::RnnBackwardOp<pymtl::ops::cuda::rnn_backward>::call));
  m.impl("rnn_hidden_size_limit", TORCH_BOX(&pymtl::ops::cuda::rnn_hidden_size_limit));
  m.impl("rnn_choices", TORCH_BOX(&pymtl::ops::cuda::rnn_choices));
  m.impl("rnn_force_choice", TORCH_BOX(&pymtl::ops::cuda::rnn_force_choice));
}
