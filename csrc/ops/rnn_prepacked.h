// Prepacked weights as a tensor: a header, and the panels behind it.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>

#include "rnn_call.h"

namespace pymtl::ops {

// The header, counted in T.
template <typename T>
constexpr int64_t kHeader = PrepackedHeader::kBytes / sizeof(T);

// Checks what stands in front of a layer's panels, and returns their format.
template <typename T>
WeightFormat check_header(const T* prepacked, const Name& name, Cell cell, int64_t recurrences, int64_t hidden_size,
                          ScalarType type) {
  PrepackedHeader header;
  std::memcpy(&header, prepacked, sizeof header);
  const bool narrow = type == ScalarType::Float && header.scheme <= static_cast<uint32_t>(PanelScheme::int8_fours);
  const WeightFormat format = narrow ? format_of(static_cast<PanelScheme>(header.scheme)) : WeightFormat::own;
  const PrepackedHeader own = rnn_prepacked_header<T>(cell, recurrences, hidden_size, format);
  const bool readable = header.version == own.version && header.dtype == own.dtype && (narrow || header.scheme == 0);
  check(readable, name, ": expected weights from this version's rnn_prepack of dtype ",
        torch::headeronly::toString(type), ", got something else");
  check(header.lanes == own.lanes, name, ": expected weights prepacked for vectors of ", own.lanes,
        " numbers, which the instruction set in use has, got them for ", header.lanes);
  check(header.scheme == own.scheme, name,
        ": expected 8-bit weights in the order of the instruction set in use, got them prepacked under another");
  check(header.cell == own.cell, name, ": expected weights prepacked for this mode, got those of another");
  check(header.recurrences == own.recurrences && header.hidden_size == own.hidden_size, name,
        ": expected weights prepacked for ", recurrences, " recurrences of hidden size ", hidden_size,
        ", got those of ", header.recurrences, " of ", header.hidden_size);
  return format;
}

inline void check_prepacked(const Tensor& prepacked, int64_t least, ScalarType type) {
  const Name name = "prepacked";
  check_cpu(prepacked, name);
  check_type(prepacked, name, type);
  check(prepacked.dim() == 1 && prepacked.numel() > least && prepacked.is_contiguous(), name,
        ": expected weights from rnn_prepack, got something else");
  check_memory(prepacked, name);
}

template <typename T>
int64_t prepacked_size(Cell cell, int64_t recurrences, int64_t input_size, int64_t hidden_size, WeightFormat format) {
  return kHeader<T> + static_cast<int64_t>(rnn_prepacked_size<T>(cell, recurrences, input_size, hidden_size, format));
}

// A layer's panels, or null, and their format.
template <typename T>
struct Panels {
  const T* panels = nullptr;
  WeightFormat format = WeightFormat::own;
};

template <typename T>
Panels<T> checked_prepacked(const OptionalTensor& prepacked, const Layer<T>& layer, ScalarType type) {
  if (!prepacked.has_value()) return {};
  check_prepacked(*prepacked, kHeader<T>, type);
  const T* const memory = read<T>(*prepacked);
  const WeightFormat format = check_header(memory, "prepacked", layer.cell, layer.recurrences, layer.hidden_size, type);
  check_sizes(*prepacked, "prepacked",
              {prepacked_size<T>(layer.cell, layer.recurrences, layer.input_size, layer.hidden_size, format)});
  return {memory + kHeader<T>, format};
}

// Memory for prepacked weights, behind their header.
template <typename T>
Tensor with_header(const Tensor& like, Cell cell, int64_t recurrences, int64_t input_size, int64_t hidden_size,
                   WeightFormat format = WeightFormat::own, std::optional<ScalarType> type = std::nullopt) {
  const Tensor prepacked = make(like, {prepacked_size<T>(cell, recurrences, input_size, hidden_size, format)},
                                type.value_or(like.scalar_type()));
  T* const memory = write<T>(prepacked);
  std::fill_n(memory, kHeader<T>, T{});
  const PrepackedHeader header = rnn_prepacked_header<T>(cell, recurrences, hidden_size, format);
  std::memcpy(memory, &header, sizeof header);
  return prepacked;
}

}  // namespace pymtl::ops
