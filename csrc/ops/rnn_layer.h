// The arguments that the recurrent layers' ops take on every device.
#pragma once

#include "kernels/rnn.h"
#include "tensors.h"

namespace pymtl::ops {

// torch.nn.RNNBase's modes.
inline Cell cell_of(const std::string& mode, bool normalised = false) {
  if (mode == "LSTM") return normalised ? Cell::normalised_lstm : Cell::lstm;
  if (mode == "GRU") return normalised ? Cell::normalised_gru : Cell::gru;
  if (mode == "RNN_TANH") return normalised ? Cell::normalised_rnn_tanh : Cell::rnn_tanh;
  check(mode == "RNN_RELU", "mode: expected LSTM, GRU, RNN_TANH or RNN_RELU, got ", mode);
  return normalised ? Cell::normalised_rnn_relu : Cell::rnn_relu;
}

// A layer's weights, of the dtype and on the device of `like`, checked and contiguous; the list keeps copies alive that
// a kernel points into.
template <typename T>
struct Layer {
  Cell cell;
  CellSizes sizes;
  int64_t recurrences;
  int64_t input_size;
  int64_t hidden_size;
  Tensors kept;
  std::vector<RnnWeights<T>> weights;

  // Without weight_ih the cells are normalised; norm: g_hh of all recurrences, then an LSTM's g_c, then its b_c or
  // none.
  Layer(const Tensors& weight_ih, const Tensors& weight_hh, const Tensors& bias_ih, const Tensors& bias_hh,
        const std::vector<bool>& reverse, const std::string& mode, const OptionalTensors& given_norm,
        const Tensor& like)
      : cell(cell_of(mode, weight_ih.empty() && !weight_hh.empty())), sizes(sizes_of(cell)) {
    const size_t count = sizes.normalised ? weight_hh.size() : weight_ih.size();
    check(count > 0, "weight_ih: expected at least one recurrence, got none");
    check(weight_hh.size() == count, "weight_hh: expected ", count, " tensors, got ", weight_hh.size());
    check(bias_ih.empty() || bias_ih.size() == count, "bias_ih: expected ", count, " tensors or none, got ",
          bias_ih.size());
    check(bias_hh.size() == bias_ih.size(), "bias_hh: expected ", bias_ih.size(), " tensors, got ", bias_hh.size());
    check(reverse.size() == count, "reverse: expected ", count, " flags, got ", reverse.size());
    const int64_t input_rank = sizes.normalised ? 2 : weight_ih[0].dim();
    check(input_rank == 2 && weight_hh[0].dim() == 2, "weight_ih and weight_hh: expected matrices, got ", input_rank,
          "-D and ", weight_hh[0].dim(), "-D tensors");
    recurrences = static_cast<int64_t>(count);
    hidden_size = weight_hh[0].size(1);
    input_size = sizes.normalised ? sizes.gates * hidden_size : weight_ih[0].size(1);
    const Tensors norm = given_norm.value_or(Tensors{});
    check_norm(norm);
    check(input_size > 0 && hidden_size > 0, "weight_ih and weight_hh: expected sizes above zero, got ", input_size,
          " and ", hidden_size, " columns");
    const int64_t rows = sizes.gates * hidden_size;
    for (size_t g = 0; g < count; ++g) {
      weights.push_back(
          {sizes.normalised ? nullptr : keep(weight_ih[g], Name("weight_ih", g), like, {rows, input_size}),
           keep(weight_hh[g], Name("weight_hh", g), like, {rows, hidden_size}),
           bias_ih.empty() ? nullptr : keep(bias_ih[g], Name("bias_ih", g), like, {rows}),
           bias_hh.empty() ? nullptr : keep(bias_hh[g], Name("bias_hh", g), like, {rows}), reverse[g]});
      if (norm.empty()) continue;
      const auto part = [&](size_t group, const char* name, int64_t size) {
        const size_t at = group * count + g;
        return at < norm.size() ? keep(norm[at], Name(name, g), like, {size}) : nullptr;
      };
      weights.back().norm = {part(0, "gain_hh", rows), part(1, "gain_c", hidden_size), part(2, "bias_c", hidden_size)};
    }
  }

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

  const T* keep(const Tensor& tensor, const Name& name, const Tensor& like, const Sizes& sizes) {
    kept.push_back(checked(tensor, name, like.scalar_type(), sizes, like));
    return read<T>(kept.back());
  }
};

// Recurrent dropout and zoneout, checked and contiguous.
template <typename T>
struct Masks {
  OptionalTensor dropout, zoneout_h, zoneout_c;

  // output: the sizes of the layer's output.
  Masks(const OptionalTensor& given_dropout, const OptionalTensor& given_h, const OptionalTensor& given_c,
        const Layer<T>& layer, int64_t batch, const Sizes& output, const Tensor& like)
      : width_(layer.recurrences * layer.hidden_size) {
    check(layer.sizes.has_cell || !given_c.has_value(), "zoneout_c: expected none, which only an LSTM has");
    const Sizes state = {layer.recurrences, batch, layer.hidden_size};
    dropout = checked(given_dropout, "dropout", like.scalar_type(), state, like);
    zoneout_h = factors(given_h, "zoneout_h", output, like);
    zoneout_c = factors(given_c, "zoneout_c", output, like);
  }

  bool any() const { return dropout.has_value() || zoneout_h.has_value() || zoneout_c.has_value(); }

  RnnMasks<T> masks() const {
    return {read<T>(dropout), read<T>(zoneout_h), read<T>(zoneout_c), stride(zoneout_h), stride(zoneout_c)};
  }

 private:
  // Of every token, or of every unit alone.
  OptionalTensor factors(const OptionalTensor& given, const Name& name, const Sizes& output, const Tensor& like) const {
    const bool of_units = given.has_value() && given->dim() == 1;
    return checked(given, name, like.scalar_type(), of_units ? Sizes{width_} : output, like);
  }

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

// A cell's state c [count, B, H]; other cells than the LSTM's have none.
inline OptionalTensor checked_cell(const OptionalTensor& given, const Name& name, Cell cell, const Sizes& sizes,
                                   const Tensor& like) {
  check(sizes_of(cell).has_cell || !given.has_value(), name, ": expected none, which only an LSTM has");
  return checked(given, name, like.scalar_type(), sizes, like);
}

inline Tensor make_cell(const Tensor& like, Cell cell, Sizes sizes) {
  if (!sizes_of(cell).has_cell) sizes[0] = 0;
  return make(like, sizes);
}

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

inline Tensors or_none(const OptionalTensors& list) { return list.value_or(Tensors{}); }

}  // namespace pymtl::ops
