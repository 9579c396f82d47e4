#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "rnn_prepacked.h"

namespace pymtl::ops {
namespace {

Tensor rnn_prepack(Tensors weight_ih, Tensors weight_hh, Tensors bias_ih, Tensors bias_hh, std::vector<bool> reverse,
                   std::string mode, OptionalTensors norm) {
  check(!weight_hh.empty(), "weight_hh: expected at least one recurrence, got none");
  const Tensor& first = weight_ih.empty() ? weight_hh[0] : weight_ih[0];
  return with_layer_type(first, weight_ih.empty() ? "weight_hh" : "weight_ih", [&]<typename T>() {
    RnnArguments arguments{first, {}, weight_ih, weight_hh, bias_ih, bias_hh, reverse, mode};
    arguments.norm = norm;
    const Layer<T> layer(arguments);
    const Tensor prepacked = with_header<T>(first, layer.cell, layer.recurrences, layer.input_size, layer.hidden_size);
    pymtl::rnn_prepack(layer.cell, layer.weights.data(), layer.recurrences, layer.input_size, layer.hidden_size,
                       write<T>(prepacked) + kHeader<T>, torch_executor());
    return prepacked;
  });
}

// Of integers each row has a scale; bfloat16 numbers have none.
Tensor rnn_prepack_narrow(OptionalTensors given_weight_ih, Tensors weight_hh, OptionalTensors scale_ih,
                          OptionalTensors scale_hh, OptionalTensors bias_ih, OptionalTensors bias_hh,
                          std::string mode) {
  const Tensors& weight_ih = or_none(given_weight_ih);
  const size_t count = weight_hh.size();
  check(count > 0, "weight_hh: expected at least one recurrence, got none");
  const Tensor& like = weight_hh[0];
  const ScalarType type = like.scalar_type();
  check(type == ScalarType::Char || type == ScalarType::BFloat16,
        "weight_hh: expected dtype Char (int8) or BFloat16, got ", torch::headeronly::toString(type));
  const bool integers = type == ScalarType::Char;
  const Cell cell = cell_of(mode, weight_ih.empty());
  const CellSizes& sizes = sizes_of(cell);
  check(like.dim() == 2 && like.size(1) > 0, "weight_hh: expected matrices with columns, got another shape");
  const int64_t hidden_size = like.size(1);
  const int64_t rows = sizes.gates * hidden_size;
  if (!weight_ih.empty()) {
    check(weight_ih[0].dim() == 2 && weight_ih[0].size(1) > 0,
          "weight_ih: expected matrices with columns, got another shape");
  }
  const int64_t input_size = weight_ih.empty() ? rows : weight_ih[0].size(1);
  const int64_t depth = std::max(hidden_size, weight_ih.empty() ? int64_t{0} : input_size);
  check(!integers || depth <= kMostInt8Depth, "weight_ih and weight_hh: expected at most ", kMostInt8Depth,
        " columns of 8-bit numbers, got ", depth);
  Tensors copies;
  copies.reserve(6 * count);
  // The g-th of a list of `expected`, or null where that is none.
  const auto memory = [&](const Tensors& list, const char* name, size_t expected, size_t g, ScalarType its_type,
                          const Sizes& shape) -> const void* {
    check(list.size() == expected, name, ": expected ", expected, " tensors, got ", list.size());
    if (list.empty()) return nullptr;
    copies.push_back(checked(list[g], Name(name, g), its_type, shape, like));
    return copies.back().const_data_ptr();
  };
  const size_t inputs = weight_ih.empty() ? 0 : count;
  const size_t biases = or_none(bias_ih).empty() ? 0 : count;
  std::vector<NarrowWeights> weights;
  for (size_t g = 0; g < count; ++g) {
    const auto floats = [&](const OptionalTensors& list, const char* name, size_t expected) {
      return static_cast<const float*>(memory(or_none(list), name, expected, g, ScalarType::Float, {rows}));
    };
    weights.push_back({memory(weight_ih, "weight_ih", inputs, g, type, {rows, input_size}),
                       memory(weight_hh, "weight_hh", count, g, type, {rows, hidden_size}),
                       floats(scale_ih, "scale_ih", integers ? inputs : 0),
                       floats(scale_hh, "scale_hh", integers ? count : 0), floats(bias_ih, "bias_ih", biases),
                       floats(bias_hh, "bias_hh", biases)});
  }
  const WeightFormat format = integers ? WeightFormat::int8 : WeightFormat::bfloat16;
  const int64_t recurrences = static_cast<int64_t>(count);
  const Tensor prepacked =
      with_header<float>(like, cell, recurrences, input_size, hidden_size, format, ScalarType::Float);
  pymtl::rnn_prepack(cell, format, weights.data(), recurrences, input_size, hidden_size,
                     write<float>(prepacked) + kHeader<float>, torch_executor());
  return prepacked;
}

}  // namespace
}  // namespace pymtl::ops

STABLE_TORCH_LIBRARY_IMPL(pymtl, CPU, m) {
  m.impl("rnn_prepack", TORCH_BOX(&pymtl::ops::rnn_prepack));
  m.impl("rnn_prepack_narrow", TORCH_BOX(&pymtl::ops::rnn_prepack_narrow));
}
