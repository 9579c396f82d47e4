#include "kernels/rnn.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "batch.h"
#include "rnn_call.h"
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

// Prepacked weights as a tensor: a header, and the panels behind it.
template <typename T>
constexpr int64_t kHeader = PrepackedHeader::kBytes / sizeof(T);

template <typename T>
Tensor checked_prepacked(const Tensor& prepacked, const Name& name, Cell cell, int64_t recurrences, int64_t input_size,
                         int64_t hidden_size, ScalarType type) {
  check_cpu(prepacked, name);
  check_type(prepacked, name, type);
  check(prepacked.dim() == 1 && prepacked.numel() > kHeader<T> && prepacked.is_contiguous(), name,
        ": expected weights from rnn_prepack, got something else");
  check_memory(prepacked, name);
  PrepackedHeader header;
  std::memcpy(&header, prepacked.const_data_ptr(), sizeof header);
  const PrepackedHeader own = rnn_prepacked_header<T>(cell);
  const bool readable = header.version == own.version && header.dtype == own.dtype && header.scheme == own.scheme;
  check(readable, name, ": expected weights from this version's rnn_prepack of dtype ",
        torch::headeronly::toString(type), ", got something else");
  check(header.lanes == own.lanes, name, ": expected weights prepacked for vectors of ", own.lanes,
        " numbers, which the instruction set in use has, got them for ", header.lanes);
  check(header.cell == own.cell, name, ": expected weights prepacked for this mode, got those of another");
  const int64_t size =
      kHeader<T> + static_cast<int64_t>(rnn_prepacked_size<T>(cell, recurrences, input_size, hidden_size));
  check_sizes(prepacked, name, {size});
  return prepacked;
}

template <typename T>
OptionalTensor checked_prepacked(const OptionalTensor& prepacked, const Layer<T>& layer, ScalarType type) {
  if (!prepacked.has_value()) return std::nullopt;
  return checked_prepacked<T>(*prepacked, "prepacked", layer.cell, layer.recurrences, layer.input_size,
                              layer.hidden_size, type);
}

template <typename T>
const T* panels_of(const OptionalTensor& prepacked) {
  return prepacked.has_value() ? read<T>(*prepacked) + kHeader<T> : nullptr;
}

// What a forward pass reads; where its results go is for the caller to fill in.
template <typename T>
RnnForward<T> forward_of(const Call<T>& call, const OptionalTensor& prepacked) {
  RnnForward<T> args{};
  args.shape = shape_of(call);
  args.weights = call.layer.weights.data();
  args.prepacked = panels_of<T>(prepacked);
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
    const OptionalTensor prepacked = checked_prepacked(given_prepacked, call.layer, call.type);
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
    const OptionalTensor prepacked = checked_prepacked(given_prepacked, call.layer, call.type);
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

std::tuple<Tensor, Tensor, Tensor> rnn_frozen(Tensor given_input, OptionalTensor batch_sizes, Tensors given_prepacked,
                                              int64_t hidden_size, std::vector<bool> reverse, std::string mode,
                                              OptionalTensor given_h0, OptionalTensor given_c0) {
  return with_layer_type(given_input, "input", [&]<typename T>() {
    const ScalarType type = given_input.scalar_type();
    const Cell cell = cell_of(mode);
    const Batch batch(given_input, batch_sizes);
    const int64_t layers = static_cast<int64_t>(given_prepacked.size());
    const int64_t G = static_cast<int64_t>(reverse.size());
    check(layers > 0, "prepacked: expected the weights of at least one layer, got none");
    check(G > 0, "reverse: expected at least one flag, got none");
    check(hidden_size > 0, "hidden_size: expected a number above 0, got ", hidden_size);
    int64_t input_size = given_input.size(given_input.dim() - 1);
    check(input_size > 0, "input: expected features, got none");
    const Sizes states = {layers * G, batch.batch, hidden_size};
    const OptionalTensor h0 = checked(given_h0, "h0", type, states);
    const OptionalTensor c0 = checked_cell(given_c0, "c0", cell, states, given_input);
    const Tensor h_n = make(given_input, states);
    const Tensor c_n = make(given_input, {sizes_of(cell).has_cell ? states[0] : 0, states[1], states[2]});
    std::vector<RnnWeights<T>> weights;
    for (const bool reversed : reverse) weights.push_back({nullptr, nullptr, nullptr, nullptr, reversed});
    Tensor output = checked(given_input, "input", type, batch.with(input_size));
    for (int64_t layer = 0; layer < layers; ++layer) {
      const Tensor input = output;
      const size_t index = static_cast<size_t>(layer);
      const OptionalTensor prepacked = checked_prepacked<T>(given_prepacked[index], Name("prepacked", index), cell, G,
                                                            input_size, hidden_size, type);
      output = make(input, batch.with(G * hidden_size));
      const int64_t read_size = std::exchange(input_size, G * hidden_size);
      if (batch.tokens == 0) continue;
      const int64_t state = layer * G * batch.batch * hidden_size;
      RnnForward<T> args{};
      args.shape = {G, batch.steps, batch.batch, batch.tokens, read_size, hidden_size, read<int64_t>(batch.batch_sizes),
                    1, cell};
      args.weights = weights.data();
      args.prepacked = panels_of<T>(prepacked);
      args.input = read<T>(input);
      args.h0 = h0.has_value() ? read<T>(h0) + state : nullptr;
      args.c0 = c0.has_value() ? read<T>(c0) + state : nullptr;
      args.output = write<T>(output);
      args.h_n = write<T>(h_n) + state;
      args.c_n = sizes_of(cell).has_cell ? write<T>(c_n) + state : nullptr;
      run(args, inference_executor());
    }
    return std::make_tuple(output, h_n, c_n);
  });
}

Tensor rnn_prepack(Tensors weight_ih, Tensors weight_hh, Tensors bias_ih, Tensors bias_hh, std::vector<bool> reverse,
                   std::string mode, OptionalTensors norm) {
  check(!weight_hh.empty(), "weight_hh: expected at least one recurrence, got none");
  const Tensor& first = weight_ih.empty() ? weight_hh[0] : weight_ih[0];
  return with_layer_type(first, weight_ih.empty() ? "weight_hh" : "weight_ih", [&]<typename T>() {
    RnnArguments arguments{first, {}, weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode};
    arguments.norm = norm;
    const Layer<T> layer(arguments);
    const size_t size = rnn_prepacked_size<T>(layer.cell, layer.recurrences, layer.input_size, layer.hidden_size);
    const Tensor prepacked = make(first, {kHeader<T> + static_cast<int64_t>(size)});
    T* const memory = write<T>(prepacked);
    std::fill_n(memory, kHeader<T>, T{});
    const PrepackedHeader header = rnn_prepacked_header<T>(layer.cell);
    std::memcpy(memory, &header, sizeof header);
    pymtl::rnn_prepack(layer.cell, layer.weights.data(), layer.recurrences, layer.input_size, layer.hidden_size,
                       memory + kHeader<T>, torch_executor());
    return prepacked;
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
  m.impl("rnn_prepack", TORCH_BOX(&pymtl::ops::rnn_prepack));
}
