// The arguments that the recurrent layers' ops take on every device, checked once for all of them.
#pragma once

#include <iterator>
#include <tuple>
#include <utility>

#include "kernels/rnn.h"
#include "tensors.h"

namespace pymtl::ops {

// The cell of one of torch.nn.RNNBase's modes.
inline Cell cell_of(const std::string& mode, bool normalised = false) {
  size_t cell = 0;
  while (cell < std::size(kCells) && (kCells[cell].mode != mode || kCells[cell].normalised != normalised)) ++cell;
  check(cell < std::size(kCells), "mode: expected LSTM, GRU, RNN_TANH or RNN_RELU, got ", mode);
  return static_cast<Cell>(cell);
}

// The list itself: every copy of a tensor counts a reference up and down.
inline const Tensors& or_none(const OptionalTensors& list) {
  static const Tensors none;
  return list.has_value() ? *list : none;
}

// The arguments of a call, named and ordered as in the ops' schemas (RNN_ARGUMENTS in library.cpp, which says what they
// are).
struct RnnArguments {
  Tensor input;
  OptionalTensor batch_sizes;
  OptionalTensors weight_ih;
  Tensors weight_hh;
  OptionalTensors bias_ih;
  OptionalTensors bias_hh;
  std::vector<bool> reverse;
  std::string mode;
  OptionalTensor h0 = {};
  OptionalTensor c0 = {};
  OptionalTensor dropout = {};
  OptionalTensor zoneout_h = {};
  OptionalTensor zoneout_c = {};
  OptionalTensors norm = {};
  bool allow_tf32 = false;
};

template <typename...>
struct Types {};

using RnnArgumentTypes = Types<Tensor, OptionalTensor, OptionalTensors, Tensors, OptionalTensors, OptionalTensors,
                               std::vector<bool>, std::string, OptionalTensor, OptionalTensor, OptionalTensor,
                               OptionalTensor, OptionalTensor, OptionalTensors, bool>;

// The function that Torch calls with every argument by itself. It calls `op` with RnnArguments in their place, between
// the arguments that come before and after them in the schema.
template <auto op, typename Before, typename After, typename Own = RnnArgumentTypes>
struct Unpacked;

template <auto op, typename... Before, typename... After, typename... Own>
struct Unpacked<op, Types<Before...>, Types<After...>, Types<Own...>> {
  static auto call(Before... before, Own... own, After... after) {
    return op(std::move(before)..., RnnArguments{std::move(own)...}, std::move(after)...);
  }
};

template <auto op>
using RnnInferenceOp = Unpacked<op, Types<>, Types<OptionalTensor>>;
template <auto op>
using RnnTrainingOp = Unpacked<op, Types<>, Types<>>;
template <auto op>
using RnnBackwardOp = Unpacked<op, Types<OptionalTensor, OptionalTensor, OptionalTensor>,
                               Types<Tensor, Tensor, Tensor, std::vector<bool>>>;

// A layer's weights, of the dtype and on the device of its input, checked and contiguous; the list keeps copies alive
// that a kernel points into.
template <typename T>
struct Layer {
  Cell cell;
  CellSizes sizes;
  int64_t recurrences;
  int64_t input_size;
  int64_t hidden_size;
  bool has_biases;
  Tensors copies;
  std::vector<RnnWeights<T>> weights;

  // Without weight_ih the cells are normalised; norm: g_hh of all recurrences, then an LSTM's g_c, then its b_c or
  // none.
  explicit Layer(const RnnArguments& given)
      : cell(cell_of(given.mode, or_none(given.weight_ih).empty() && !given.weight_hh.empty())),
        sizes(pymtl::sizes_of(cell)) {
    const Tensors& weight_ih = or_none(given.weight_ih);
    const Tensors& weight_hh = given.weight_hh;
    const Tensors& bias_ih = or_none(given.bias_ih);
    const Tensors& bias_hh = or_none(given.bias_hh);
    const Tensors& norm = or_none(given.norm);
    const Tensor& like = given.input;
    const size_t count = sizes.normalised ? weight_hh.size() : weight_ih.size();
    check(count > 0, "weight_ih: expected at least one recurrence, got none");
    check(weight_hh.size() == count, "weight_hh: expected ", count, " tensors, got ", weight_hh.size());
    check(bias_ih.empty() || bias_ih.size() == count, "bias_ih: expected ", count, " tensors or none, got ",
          bias_ih.size());
    check(bias_hh.size() == bias_ih.size(), "bias_hh: expected ", bias_ih.size(), " tensors, got ", bias_hh.size());
    check(given.reverse.size() == count, "reverse: expected ", count, " flags, got ", given.reverse.size());
    const int64_t input_rank = sizes.normalised ? 2 : weight_ih[0].dim();
    check(input_rank == 2 && weight_hh[0].dim() == 2, "weight_ih and weight_hh: expected matrices, got ", input_rank,
          "-D and ", weight_hh[0].dim(), "-D tensors");
    recurrences = static_cast<int64_t>(count);
    hidden_size = weight_hh[0].size(1);
    input_size = sizes.normalised ? sizes.gates * hidden_size : weight_ih[0].size(1);
    has_biases = !bias_ih.empty();
    check_norm(norm);
    check(input_size > 0 && hidden_size > 0, "weight_ih and weight_hh: expected sizes above zero, got ", input_size,
          " and ", hidden_size, " columns");
    const int64_t rows = sizes.gates * hidden_size;
    const auto keep = [&](const Tensors& list, const char* name, size_t at, size_t g, const Sizes& expected) {
      copies.push_back(checked(list[at], Name(name, g), like.scalar_type(), expected, like));
      return read<T>(copies.back());
    };
    weights.reserve(count);
    copies.reserve(weight_ih.size() + weight_hh.size() + bias_ih.size() + bias_hh.size() + norm.size());
    for (size_t g = 0; g < count; ++g) {
      weights.push_back({sizes.normalised ? nullptr : keep(weight_ih, "weight_ih", g, g, {rows, input_size}),
                         keep(weight_hh, "weight_hh", g, g, {rows, hidden_size}),
                         has_biases ? keep(bias_ih, "bias_ih", g, g, {rows}) : nullptr,
                         has_biases ? keep(bias_hh, "bias_hh", g, g, {rows}) : nullptr, given.reverse[g]});
      if (norm.empty()) continue;
      const auto part = [&](size_t group, const char* name, int64_t size) {
        const size_t at = group * count + g;
        return at < norm.size() ? keep(norm, name, at, g, {size}) : nullptr;
      };
      weights.back().norm = {part(0, "gain_hh", rows), part(1, "gain_c", hidden_size), part(2, "bias_c", hidden_size)};
    }
  }

  // Sizes of the states [G, B, H], and of c, which only an LSTM has.
  Sizes state(int64_t batch) const { return {recurrences, batch, hidden_size}; }
  Sizes cell_state(int64_t batch) const { return {sizes.has_cell ? recurrences : 0, batch, hidden_size}; }

 private:
  void check_norm(const Tensors& norm) const {
    const size_t count = static_cast<size_t>(recurrences);
    if (!sizes.normalised) return check(norm.empty(), "norm: expected none with weight_ih, got ", norm.size());
    if (sizes.has_cell) {
      check(norm.size() == 2 * count || norm.size() == 3 * count, "norm: expected ", 2 * count, " or ", 3 * count,
            " tensors, got ", norm.size());
    } else {
      check(norm.size() == count, "norm: expected ", count, " tensors, got ", norm.size());
    }
  }
};

// An argument about c, which only an LSTM may have.
inline OptionalTensor checked_cell(const OptionalTensor& given, const Name& name, Cell cell, const Sizes& sizes,
                                   const Tensor& like) {
  check(pymtl::sizes_of(cell).has_cell || !given.has_value(), name,
        ": expected None, since only an LSTM has a cell state, got a tensor");
  return checked(given, name, like.scalar_type(), sizes, like);
}

// Recurrent dropout and zoneout, checked and contiguous.
template <typename T>
struct Masks {
  OptionalTensor dropout, zoneout_h, zoneout_c;

  // output: the sizes of the layer's output.
  Masks(const RnnArguments& given, const Layer<T>& layer, int64_t batch, const Sizes& output)
      : width_(layer.recurrences * layer.hidden_size) {
    const Tensor& like = given.input;
    dropout = checked(given.dropout, "dropout", like.scalar_type(), layer.state(batch), like);
    // A factor of each token and unit, or of each unit for all tokens.
    const auto sizes_for = [&](const OptionalTensor& factors) {
      return factors.has_value() && factors->dim() == 1 ? Sizes{width_} : output;
    };
    zoneout_h = checked(given.zoneout_h, "zoneout_h", like.scalar_type(), sizes_for(given.zoneout_h), like);
    zoneout_c = checked_cell(given.zoneout_c, "zoneout_c", layer.cell, sizes_for(given.zoneout_c), like);
  }

  bool any() const { return dropout.has_value() || zoneout_h.has_value() || zoneout_c.has_value(); }

  RnnMasks<T> masks() const {
    return {read<T>(dropout), read<T>(zoneout_h), read<T>(zoneout_c), stride(zoneout_h), stride(zoneout_c)};
  }

 private:
  int64_t stride(const OptionalTensor& factors) const { return factors.has_value() && factors->dim() > 1 ? width_ : 0; }

  int64_t width_;
};

// P: how many inputs of the layer's size stand side by side in a row of `input`, and are shared out evenly.
// Every normalised recurrence reads what was projected for it.
template <typename T>
int64_t inputs_of(const Layer<T>& layer, const Tensor& input) {
  if (layer.sizes.normalised) return layer.recurrences;
  const int64_t width = input.size(input.dim() - 1);
  const bool side_by_side = width > 0 && width % layer.input_size == 0;
  const int64_t inputs = side_by_side ? width / layer.input_size : 1;
  return layer.recurrences % inputs == 0 ? inputs : 1;
}

// What the forward pass leaves for the backward pass, besides the output: the reserve.
struct RnnReserve {
  Tensor output;  // as the call's
  Tensor gates;   // [G, N, reserve * H]
  Tensor cells;   // [G, N, H] in Accum<T>; of an LSTM
};

// The gradients of a call's results; one that is missing is zeros.
struct RnnResultGradients {
  OptionalTensor output, h_n, c_n;
};

// A call: its arguments checked, contiguous and of the input's dtype, and the sizes that follow from them. Batch is the
// class that reads batch_sizes on the device; `where` holds its further arguments.
template <typename T, typename Batch>
struct RnnCall {
  ScalarType type;
  Batch batch;
  Layer<T> layer;
  int64_t inputs;  // P
  Tensor input;
  OptionalTensor h0, c0;
  Masks<T> masks;

  template <typename... Where>
  explicit RnnCall(const RnnArguments& given, const Where&... where)
      : type(given.input.scalar_type()),
        batch(given.input, given.batch_sizes, where...),
        layer(given),
        inputs(inputs_of(layer, given.input)),
        input(ops::checked(given.input, "input", type, batch.with(inputs * layer.input_size), given.input)),
        h0(ops::checked(given.h0, "h0", type, state(), input)),
        c0(checked_cell(given.c0, "c0", layer.cell, state(), input)),
        masks(given, layer, batch.batch, output_sizes()) {}

  Sizes state() const { return layer.state(batch.batch); }
  Sizes cell_state() const { return layer.cell_state(batch.batch); }
  Sizes no_state() const { return {0, batch.batch, layer.hidden_size}; }
  Sizes output_sizes() const { return batch.with(layer.recurrences * layer.hidden_size); }
  int64_t reserve_blocks() const { return layer.sizes.reserve_with(masks.zoneout_h.has_value()); }

  // Uninitialised but for the output; empty where no backward pass is to come.
  RnnReserve make_reserve(const Tensor& output, bool wanted) const {
    return {output, make(input, gate_sizes(wanted)), make(input, cell_sizes(wanted), accum_type(type))};
  }
  RnnReserve checked(const RnnReserve& given) const {
    return {ops::checked(given.output, "output", type, output_sizes(), input),
            ops::checked(given.gates, "gates", type, gate_sizes(true), input),
            ops::checked(given.cells, "cells", accum_type(type), cell_sizes(true), input)};
  }
  RnnResultGradients checked(const RnnResultGradients& given) const {
    return {ops::checked(given.output, "grad_output", type, output_sizes(), input),
            ops::checked(given.h_n, "grad_h_n", type, state(), input),
            checked_cell(given.c_n, "grad_c_n", layer.cell, state(), input)};
  }

 private:
  Sizes gate_sizes(bool wanted) const {
    return {wanted ? layer.recurrences : 0, batch.tokens, reserve_blocks() * layer.hidden_size};
  }
  Sizes cell_sizes(bool wanted) const {
    return {wanted && layer.sizes.has_cell ? layer.recurrences : 0, batch.tokens, layer.hidden_size};
  }
};

// The gradients one may ask for, in the order of the op's argument `needs`.
struct Needs {
  bool input, weight_ih, weight_hh, bias, state;

  explicit Needs(const std::vector<bool>& flags) {
    check(flags.size() == 5, "needs: expected 5 flags, got ", flags.size());
    input = flags[0];
    weight_ih = flags[1];
    weight_hh = flags[2];
    bias = flags[3];
    state = flags[4];
  }
};

}  // namespace pymtl::ops
