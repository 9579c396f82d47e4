// What every op needs between Torch's stable C++ interface and the kernels: checks that name the argument,
// typed pointers, results, and Torch's thread pool as an executor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/executor.h"

namespace pymtl::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// Raises RuntimeError with the parts of the message, if the condition does not hold. Torch's own macro would put
// this file's path in front.
template <typename... Parts>
void check(bool holds, const Parts&... message) {
  if (holds) return;
  std::ostringstream out;
  (out << ... << message);
  throw std::runtime_error(out.str());
}

inline std::string text(const Sizes& sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i == 0 ? "" : ", ") << sizes[i];
  out << ']';
  return out.str();
}

// The name of an element of a list argument, as in weight_ih[1].
inline std::string element(const char* list, size_t index) {
  std::ostringstream out;
  out << list << '[' << index << ']';
  return out.str();
}

inline Sizes sizes_of(const Tensor& tensor) {
  Sizes sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return sizes;
}

inline void check_sizes(const Tensor& tensor, const std::string& name, const Sizes& expected) {
  const Sizes actual = sizes_of(tensor);
  check(actual == expected, name, ": expected size ", text(expected), ", got ", text(actual));
}

inline void check_cpu(const Tensor& tensor, const std::string& name) {
  check(tensor.is_cpu(), name, ": expected a tensor on the CPU, got one on another device");
}

inline void check_type(const Tensor& tensor, const std::string& name, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, ": expected dtype ", torch::headeronly::toString(expected), ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
}

// A contiguous tensor on the CPU with this type and these sizes, copied if need be.
inline Tensor checked(const Tensor& tensor, const std::string& name, ScalarType type, const Sizes& sizes) {
  check_cpu(tensor, name);
  check_type(tensor, name, type);
  check_sizes(tensor, name, sizes);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor checked(const OptionalTensor& tensor, const std::string& name, ScalarType type,
                              const Sizes& sizes) {
  if (!tensor.has_value()) return std::nullopt;
  return checked(*tensor, name, type, sizes);
}

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* read(const OptionalTensor& tensor) {
  return tensor.has_value() ? read<T>(*tensor) : nullptr;
}

// The elements of a result, or null if it is empty because nobody wants it.
template <typename T>
T* write(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor make(const Tensor& like, const Sizes& sizes) { return torch::stable::new_empty(like, sizes); }

inline Tensor make(const Tensor& like, const Sizes& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

inline pymtl::Executor torch_executor() {
  const auto for_each = [](int64_t count, pymtl::Executor::Task task, void* state) {
    torch::stable::parallel_for(0, count, 1, [task, state](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) task(state, i);
    });
  };
  return {for_each, static_cast<int64_t>(torch::stable::get_num_threads())};
}

// Calls function.operator()<float or double>().
template <typename Function>
auto with_real_type(const Tensor& tensor, const std::string& name, Function&& function) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, name, ": expected dtype Float or Double, got ",
        torch::headeronly::toString(type));
  return type == ScalarType::Float ? function.template operator()<float>() : function.template operator()<double>();
}

}  // namespace pymtl::ops
