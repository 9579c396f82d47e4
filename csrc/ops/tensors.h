// What every op needs between Torch's stable C++ interface and the kernels: checks that name the argument,
// typed pointers, results, and Torch's thread pool as an executor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/bfloat16.h"
#include "kernels/executor.h"
#include "kernels/pool.h"
#include "ops/stable_values.h"

namespace pymtl::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = std::optional<Tensors>;
using Sizes = std::vector<int64_t>;

// Raises RuntimeError with the parts of the message, if the condition does not hold. Parts that take time to make
// belong behind an `if`. Torch's own macro would put this file's path in front.
template <typename... Parts>
void check(bool holds, const Parts&... message) {
  if (holds) return;
  std::ostringstream out;
  (out << ... << message);
  throw std::runtime_error(out.str());
}

// Torch's functions in C tell whether they succeeded; its own macro for that has another name in every other version.
inline void check_call(AOTITorchError error, const char* function) {
  check(error == TORCH_SUCCESS, "torch: ", function, " failed");
}

inline std::string text(const Sizes& sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i == 0 ? "" : ", ") << sizes[i];
  out << ']';
  return out.str();
}

// An argument, or an element of a list as in weight_ih[1]. Spelled out only where an error is raised.
struct Name {
  const char* argument;
  std::optional<size_t> index;

  Name(const char* name) : argument(name) {}
  Name(const char* list, size_t position) : argument(list), index(position) {}
};

inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.argument;
  if (name.index.has_value()) out << '[' << *name.index << ']';
  return out;
}

inline Sizes sizes_of(const Tensor& tensor) {
  Sizes sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return sizes;
}

inline void check_sizes(const Tensor& tensor, const Name& name, const Sizes& expected) {
  bool equal = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; equal && i < expected.size(); ++i) equal = tensor.size(static_cast<int64_t>(i)) == expected[i];
  if (!equal) check(false, name, ": expected size ", text(expected), ", got ", text(sizes_of(tensor)));
}

inline void check_cpu(const Tensor& tensor, const Name& name) {
  check(tensor.is_cpu(), name, ": expected a tensor on the CPU, got one on another device");
}

inline void check_type(const Tensor& tensor, const Name& name, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, ": expected dtype ", torch::headeronly::toString(expected), ", got ",
        torch::headeronly::toString(tensor.scalar_type()));
}

inline std::string device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? "the CPU" : "device " + std::to_string(tensor.get_device());
}

// Where `like` is.
inline void check_device(const Tensor& tensor, const Name& name, const Tensor& like) {
  if (like.is_cpu()) return check_cpu(tensor, name);
  const bool same = tensor.is_cpu() == like.is_cpu() && tensor.get_device() == like.get_device();
  if (!same) check(false, name, ": expected a tensor on ", device_of(like), ", got one on ", device_of(tensor));
}

// A tensor keeps its sizes when its storage is freed or made smaller, as libraries do that shard a model among
// processes. The pointer does not tell: a view's is its offset then.
inline void check_memory(const Tensor& tensor, const Name& name) {
  int64_t bytes = 0;
  int64_t end = 0;  // elements from the beginning of the storage to behind the last one
  check_call(aoti_torch_get_storage_size(tensor.get(), &bytes), "aoti_torch_get_storage_size");
  check_call(aoti_torch_get_storage_offset(tensor.get(), &end), "aoti_torch_get_storage_offset");
  const int64_t count = tensor.numel();
  if (tensor.is_contiguous()) {
    end += count;
  } else {
    for (int64_t d = 0; d < tensor.dim(); ++d) end += (tensor.size(d) - 1) * tensor.stride(d);
    ++end;
  }
  check(
      count == 0 || end * static_cast<int64_t>(tensor.element_size()) <= bytes, name,
      ": expected a tensor with memory, got one whose storage was freed: it has ", bytes,
      " bytes (untyped_storage().resize_). If a library shards the model among processes, call the model through that "
      "library's wrapper, which brings the weights back");
}

// A contiguous tensor on the device of `like` with this type and these sizes, copied if need be. A GPU's kernels read
// two 16-bit numbers at once.
inline Tensor checked(const Tensor& tensor, const Name& name, ScalarType type, const Sizes& sizes, const Tensor& like) {
  check_device(tensor, name, like);
  check_type(tensor, name, type);
  check_sizes(tensor, name, sizes);
  check_memory(tensor, name);
  if (!tensor.is_contiguous()) return torch::stable::contiguous(tensor);
  const bool aligned = like.is_cpu() || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 4 == 0;
  return aligned ? tensor : torch::stable::clone(tensor);
}

inline OptionalTensor checked(const OptionalTensor& tensor, const Name& name, ScalarType type, const Sizes& sizes,
                              const Tensor& like) {
  if (!tensor.has_value()) return std::nullopt;
  return checked(*tensor, name, type, sizes, like);
}

// The same on the CPU.
inline Tensor checked(const Tensor& tensor, const Name& name, ScalarType type, const Sizes& sizes) {
  check_cpu(tensor, name);
  return checked(tensor, name, type, sizes, tensor);
}

inline OptionalTensor checked(const OptionalTensor& tensor, const Name& name, ScalarType type, const Sizes& sizes) {
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

// A result on the device of `like`, uninitialised. Straight from the allocator: new_empty goes by its name through the
// dispatcher, a microsecond each.
inline Tensor make(const Tensor& like, const Sizes& sizes, ScalarType type) {
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t device = 0;
  check_call(aoti_torch_get_device_type(like.get(), &device), "aoti_torch_get_device_type");
  AtenTensorHandle made = nullptr;
  const int32_t number = unboxed<int32_t>(boxed(type));
  const AOTITorchError error = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        strides.data(), number, device, like.get_device(), &made);
  if (error != TORCH_SUCCESS) check(false, "no memory for a result of size ", text(sizes));
  return Tensor(made);
}

inline Tensor make(const Tensor& like, const Sizes& sizes) { return make(like, sizes, like.scalar_type()); }

inline pymtl::Executor torch_executor() {
  const auto for_each = [](int64_t count, pymtl::Executor::Task task, void* state) {
    torch::stable::parallel_for(0, count, 1, [task, state](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) task(state, i);
    });
  };
  return {for_each, static_cast<int64_t>(torch::stable::get_num_threads())};
}

// For calls that no backward pass follows, many of which are short: torch's threads, or the pool's on a busy machine.
inline pymtl::Executor inference_executor() {
  const pymtl::Executor executor = torch_executor();
  return pymtl::steady_executor(executor.threads, executor.for_each);
}

// Calls function.operator()<float or double>().
template <typename Function>
auto with_real_type(const Tensor& tensor, const Name& name, Function&& function) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, name, ": expected dtype Float or Double, got ",
        torch::headeronly::toString(type));
  return type == ScalarType::Float ? function.template operator()<float>() : function.template operator()<double>();
}

// Calls function.operator()<float, double or BFloat16>().
template <typename Function>
auto with_layer_type(const Tensor& tensor, const Name& name, Function&& function) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::BFloat16) return function.template operator()<BFloat16>();
  check(type == ScalarType::Float || type == ScalarType::Double, name,
        ": expected dtype Float, Double or BFloat16, got ", torch::headeronly::toString(type));
  return type == ScalarType::Float ? function.template operator()<float>() : function.template operator()<double>();
}

// The dtype of Accum<T>.
inline ScalarType accum_type(ScalarType type) {
  return type == ScalarType::BFloat16 || type == ScalarType::Half ? ScalarType::Float : type;
}

}  // namespace pymtl::ops
