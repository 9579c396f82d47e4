#include "kernels/rnn.h"

#include <algorithm>
#include <charconv>
#include <string>

#include "batch.h"
#include "rnn_call.h"
#include "rnn_prepacked.h"
#include "scratch.h"
#include "tensors.h"

namespace pymtl::ops {
namespace {

template <typename T>
using Call = RnnCall<T, Batch>;

template <typename T>
RnnShape shape_of(const Call<T>& call) {
  const Layer<T>& layer = call.layer;
  return {layer.recurrences,
          call.batch.steps,
          call.batch.batch,
          call.batch.tokens,
          layer.input_size,
          layer.hidden_size,
          read<int64_t>(call.batch.batch_sizes),
          call.inputs,
          layer.cell};
}

// What a forward pass reads; where its results go is for the caller to fill in.
template <typename T>
RnnForward<T> forward_of(const Call<T>& call, const Panels<T>& prepacked) {
  RnnForward<T> args{};
  args.shape = shape_of(call);
  args.weights = call.layer.weights.data();
  args.prepacked = prepacked.panels;
  args.format = prepacked.format;
  args.input = read<T>(call.input);
  args.h0 = read<T>(call.h0);
  args.c0 = read<T>(call.c0);
  args.masks = call.masks.masks();
  return args;
}

template <typename T>
void run(const RnnForward<T>& args, const Executor& executor) {
  const Scratch workspace(rnn_forward_workspace(args, executor));
  rnn_forward(args, workspace.memory(), executor);
}

enum class Keep { nothing, for_backward };

// output, h_n, c_n and the reserve's gates and cells.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const RnnArguments& arguments,
                                                           const OptionalTensor& given_prepacked, Keep keep) {
  return with_layer_type(arguments.input, "input", [&]<typename T>() {
    const Call<T> call(arguments);
    const Panels<T> prepacked = checked_prepacked(given_prepacked, call.layer, call.type);
    const Tensor output = make(call.input, call.output_sizes());
    const Tensor h_n = make(call.input, call.state());
    const Tensor c_n = make(call.input, call.cell_state());
    const RnnReserve reserve = call.make_reserve(output, keep == Keep::for_backward);
    if (call.batch.tokens > 0) {
      RnnForward<T> args = forward_of(call, prepacked);
      args.output = write<T>(output);
      args.h_n = write<T>(h_n);
      args.c_n = write<T>(c_n);
      args.gates = write<T>(reserve.gates);
      args.cells = write<Accum<T>>(reserve.cells);
      run(args, keep == Keep::for_backward ? torch_executor() : inference_executor());
    }
    return std::make_tuple(output, h_n, c_n, reserve.gates, reserve.cells);
  });
}

std::tuple<Tensor, Tensor, Tensor> rnn_inference(const RnnArguments& arguments, const OptionalTensor& prepacked) {
  const auto [output, h_n, c_n, gates, cells] = forward(arguments, prepacked, Keep::nothing);
  return {output, h_n, c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_training(const RnnArguments& arguments) {
  return forward(arguments, std::nullopt, Keep::for_backward);
}

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensor, Tensor> rnn_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const RnnArguments& arguments, const Tensor& output, const Tensor& gates, const Tensor& cells,
    const std::vector<bool>& flags) {
  return with_layer_type(arguments.input, "input", [&]<typename T>() {
    const Needs needs(flags);
    const Call<T> call(arguments);
    const Layer<T>& layer = call.layer;
    const RnnReserve reserve = call.checked(RnnReserve{output, gates, cells});
    const RnnResultGradients above = call.checked(RnnResultGradients{grad_output, grad_h_n, grad_c_n});
    const int64_t G = layer.recurrences;
    const int64_t H = layer.hidden_size;
    const int64_t N = call.batch.tokens;
    const Tensor& input = call.input;

    const Tensor grad_h0 = make(input, needs.state ? call.state() : call.no_state());
    const Tensor grad_c0 = make(input, needs.state ? call.cell_state() : call.no_state());
    const Tensor grad_input = needs.input ? make(input, sizes_of(input)) : make(input, {0});
    Tensors grad_w_ih, grad_w_hh, grad_bias;
    std::vector<RnnWeightGradients<T>> grad_weights(static_cast<size_t>(G));
    for (RnnWeightGradients<T>& wanted : grad_weights) {
      // Without tokens no kernel runs and the gradients are zero.
      const auto want = [&](bool needed, Tensors& list, const Sizes& sizes) -> T* {
        if (!needed) return nullptr;
        list.push_back(N > 0 ? make(input, sizes) : torch::stable::new_zeros(input, sizes));
        return write<T>(list.back());
      };
      const int64_t rows = layer.sizes.gates * H;
      wanted.w_ih = want(needs.weight_ih && !layer.sizes.normalised, grad_w_ih, {rows, layer.input_size});
      wanted.w_hh = want(needs.weight_hh, grad_w_hh, {rows, H});
      wanted.bias =
          want(needs.bias && (layer.has_biases || layer.sizes.normalised), grad_bias, {layer.sizes.gradients * H});
    }
    if (N > 0) {
      RnnBackward<T> args{};
      args.shape = shape_of(call);
      args.weights = layer.weights.data();
      args.input = read<T>(input);
      args.h0 = read<T>(call.h0);
      args.c0 = read<T>(call.c0);
      args.output = read<T>(reserve.output);
      args.gates = read<T>(reserve.gates);
      args.cells = read<Accum<T>>(reserve.cells);
      args.grad_output = read<T>(above.output);
      args.grad_h_n = read<T>(above.h_n);
      args.grad_c_n = read<T>(above.c_n);
      args.grad_input = write<T>(grad_input);
      args.grad_weights = grad_weights.data();
      args.grad_h0 = write<T>(grad_h0);
      args.grad_c0 = write<T>(grad_c0);
      args.masks = call.masks.masks();
      const Executor executor = torch_executor();
      const size_t bytes = rnn_backward_workspace(args, executor);
      const Scratch workspace(bytes + static_cast<size_t>(G * N * layer.sizes.gradients * H) * sizeof(T));
      args.grad_gates = reinterpret_cast<T*>(static_cast<char*>(workspace.memory()) + bytes);
      pymtl::rnn_backward(args, workspace.memory(), executor);
    }
    return std::make_tuple(grad_input, grad_w_ih, grad_w_hh, grad_bias, grad_h0, grad_c0);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_heads(
    Tensor input, OptionalTensor batch_sizes, OptionalTensors weight_ih, Tensors weight_hh, OptionalTensors bias_ih,
    OptionalTensors bias_hh, std::vector<bool> reverse, std::string mode, OptionalTensor h0, OptionalTensor c0,
    OptionalTensor given_prepacked, OptionalTensor given_head_weight, OptionalTensor given_head_bias, bool mean,
    bool max) {
  const RnnArguments arguments{std::move(input),   std::move(batch_sizes), std::move(weight_ih), std::move(weight_hh),
                               std::move(bias_ih), std::move(bias_hh),     std::move(reverse),   std::move(mode),
                               std::move(h0),      std::move(c0)};
  return with_layer_type(arguments.input, "input", [&]<typename T>() {
    const Call<T> call(arguments);
    const Sizes features = {call.batch.batch, call.layer.recurrences * call.layer.hidden_size};
    const Panels<T> prepacked = checked_prepacked(given_prepacked, call.layer, call.type);
    if (given_head_weight.has_value()) {
      check(given_head_weight->dim() == 2, "head_weight: expected a matrix, got ", given_head_weight->dim(), "-D");
    }
    const int64_t C = given_head_weight.has_value() ? given_head_weight->size(0) : 0;
    const OptionalTensor head_weight = checked(given_head_weight, "head_weight", call.type, {C, features[1]});
    const OptionalTensor head_bias = checked(given_head_bias, "head_bias", call.type, {C});

    const Tensor logits = make(call.input, call.batch.with(C));
    const Tensor means = make(call.input, {mean ? features[0] : 0, features[1]});
    const Tensor maxima = make(call.input, {max ? features[0] : 0, features[1]});
    const Tensor h_n = make(call.input, call.state());
    const Tensor c_n = make(call.input, call.cell_state());
    if (call.batch.tokens > 0) {
      RnnForward<T> args = forward_of(call, prepacked);
      args.h_n = write<T>(h_n);
      args.c_n = write<T>(c_n);
      args.heads = {C, read<T>(head_weight), read<T>(head_bias), write<T>(logits), write<T>(means), write<T>(maxima)};
      run(args, inference_executor());
    }
    return std::make_tuple(logits, means, maxima, h_n, c_n);
  });
}

// What rnn_frozen is told of its layers, which are all alike.
struct Stack {
  Cell cell;
  int64_t hidden_size;
  int64_t layers;
  std::string directions;  // of a layer's recurrences: f or r

  explicit Stack(const std::string& text) {
    const size_t mode = text.find(' ');
    const char* at = text.data() + (mode == std::string::npos ? text.size() : mode);
    const char* const end = text.data() + text.size();
    hidden_size = number_at(at, end);
    layers = number_at(at, end);
    if (at != end && *at == ' ') directions.assign(at + 1, end);
    check(
        hidden_size > 0 && layers > 0 && !directions.empty() && directions.find_first_not_of("fr") == std::string::npos,
        "layers: expected mode, hidden size, number of layers and directions as in LSTM 128 2 fr, got ", text);
    cell = cell_of(text.substr(0, mode));
  }

  // The number behind a space, after which `at` goes on; 0 if there is none.
  static int64_t number_at(const char*& at, const char* end) {
    int64_t number = 0;
    if (at != end && *at == ' ') at = std::from_chars(at + 1, end, number).ptr;
    return number;
  }

  int64_t recurrences() const { return static_cast<int64_t>(directions.size()); }
};

std::tuple<Tensor, Tensor, Tensor> rnn_frozen(Tensor given_input, OptionalTensor batch_sizes, Tensor prepacked,
                                              std::string layers, OptionalTensor given_h0, OptionalTensor given_c0) {
  return with_layer_type(given_input, "input", [&]<typename T>() {
    const ScalarType type = given_input.scalar_type();
    const Stack stack(layers);
    const Batch batch(given_input, batch_sizes);
    const int64_t G = stack.recurrences();
    const int64_t H = stack.hidden_size;
    const bool has_cell = sizes_of(stack.cell).has_cell;
    const int64_t first_size = given_input.size(given_input.dim() - 1);
    check(first_size > 0, "input: expected features, got none");
    check_prepacked(prepacked, kHeader<T>, type);
    const int64_t bytes = prepacked.numel() * static_cast<int64_t>(sizeof(T));  // a weight takes at least one
    check(H <= bytes / H && stack.layers <= bytes / H, "layers: expected sizes no larger than the ", bytes,
          " prepacked bytes allow, got ", layers);
    const WeightFormat format = check_header(read<T>(prepacked), Name("prepacked", 0), stack.cell, G, H, type);
    const int64_t first = prepacked_size<T>(stack.cell, G, first_size, H, format);
    const int64_t above = prepacked_size<T>(stack.cell, G, G * H, H, format);
    check_sizes(prepacked, "prepacked", {first + (stack.layers - 1) * above});
    const Sizes states = {stack.layers * G, batch.batch, H};
    const OptionalTensor h0 = checked(given_h0, "h0", type, states);
    const OptionalTensor c0 = checked_cell(given_c0, "c0", stack.cell, states, given_input);
    const Tensor h_n = make(given_input, states);
    const Tensor c_n = make(given_input, {has_cell ? states[0] : 0, states[1], states[2]});
    std::vector<RnnWeights<T>> weights;
    weights.reserve(stack.directions.size());
    for (const char direction : stack.directions) {
      weights.push_back({nullptr, nullptr, nullptr, nullptr, direction == 'r'});
    }
    const Executor executor = inference_executor();
    const T* packed = read<T>(prepacked);
    Tensor output = checked(given_input, "input", type, batch.with(first_size));
    for (int64_t layer = 0; layer < stack.layers; ++layer) {
      if (layer > 0) {
        const Name name("prepacked", static_cast<size_t>(layer));
        check(check_header(packed, name, stack.cell, G, H, type) == format, name,
              ": expected weights in the format of the first layer's, got those of another");
      }
      const Tensor input = output;
      output = make(input, batch.with(G * H));
      const int64_t state = layer * G * batch.batch * H;
      RnnForward<T> args{};
      args.shape = {G,
                    batch.steps,
                    batch.batch,
                    batch.tokens,
                    layer == 0 ? first_size : G * H,
                    H,
                    read<int64_t>(batch.batch_sizes),
                    1,
                    stack.cell};
      args.weights = weights.data();
      args.prepacked = packed + kHeader<T>;
      args.format = format;
      args.input = read<T>(input);
      args.h0 = h0.has_value() ? read<T>(h0) + state : nullptr;
      args.c0 = c0.has_value() ? read<T>(c0) + state : nullptr;
      args.output = write<T>(output);
      args.h_n = write<T>(h_n) + state;
      args.c_n = has_cell ? write<T>(c_n) + state : nullptr;
      if (batch.tokens > 0) run(args, executor);
      packed += layer == 0 ? first : above;
    }
    return std::make_tuple(output, h_n, c_n);
  });
}

}  // namespace
}  // namespace pymtl::ops

STABLE_TORCH_LIBRARY_IMPL(pymtl, CPU, m) {
  m.impl("rnn_inference", TORCH_BOX(&pymtl::ops::RnnInferenceOp<pymtl::ops::rnn_inference>::call));
  m.impl("rnn_training", TORCH_BOX(&pymtl::ops::RnnTrainingOp<pymtl::ops::rnn_training>::call));
  m.impl("rnn_backward", TORCH_BOX(&pymtl::ops::RnnBackwardOp<pymtl::ops::rnn_backward>::call));
  m.impl("rnn_heads", TORCH_BOX(&pymtl::ops::rnn_heads));
  m.impl("rnn_frozen", TORCH_BOX(&pymtl::ops::rnn_frozen));
}
