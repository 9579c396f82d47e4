#include "kernels/cuda/packing.h"

#include "ops/cuda/batch.h"

namespace pymtl::ops::cuda {
namespace {

// The index work of a packing, on the device. Indices on the CPU are copied there.
struct Order {
  Stream stream;
  DeviceBatchSizes batch_sizes;
  int64_t steps;
  int64_t batch;
  int64_t capacity;  // rows of the packed tensor
  OptionalTensor sorted_indices;

  Order(const Tensor& tensor, const Tensor& given_sizes, const OptionalTensor& given_indices)
      : stream(tensor), batch_sizes(given_sizes, tensor, stream), steps(given_sizes.size(0)) {
    batch = batch_sizes.batch;
    if (!batch_sizes.exact) {
      check(given_indices.has_value() && given_indices->dim() == 1,
            "sorted_indices: expected the index of each sequence with batch_sizes on the GPU");
      batch = given_indices->size(0);
    }
    capacity = batch_sizes.exact ? batch_sizes.tokens : steps * batch;
    if (!given_indices.has_value()) return;
    if (!batch_sizes.exact || !given_indices->is_cpu()) {
      sorted_indices = checked(*given_indices, "sorted_indices", ScalarType::Long, {batch}, tensor);
      return;
    }
    Tensor there = make(tensor, {batch}, ScalarType::Long);
    sorted_indices = torch::stable::copy_(there, checked_order(*given_indices, batch), true);
  }

  pymtl::cuda::Packing packing(int64_t rows, int64_t row_bytes, bool batch_first) const {
    return {steps,
            batch,
            rows,
            read<int64_t>(batch_sizes.sizes),
            read<int64_t>(batch_sizes.ends),
            read<int64_t>(sorted_indices),
            row_bytes,
            batch_first ? steps * row_bytes : row_bytes,
            batch_first ? row_bytes : batch * row_bytes};
  }

  Sizes padded_sizes(bool batch_first) const { return batch_first ? Sizes{batch, steps} : Sizes{steps, batch}; }
};

int64_t bytes_of_rows(const Tensor& tensor, size_t leading) {
  int64_t bytes = static_cast<int64_t>(tensor.element_size());
  for (int64_t d = static_cast<int64_t>(leading); d < tensor.dim(); ++d) bytes *= tensor.size(d);
  return bytes;
}

Tensor pack(Tensor given_padded, Tensor batch_sizes, OptionalTensor sorted_indices, bool batch_first) {
  const Order order(given_padded, batch_sizes, sorted_indices);
  check(given_padded.dim() >= 2, "padded: expected at least two dimensions, got ", given_padded.dim());
  Sizes sizes = sizes_of(given_padded);
  const Sizes leading = order.padded_sizes(batch_first);
  sizes[0] = leading[0];
  sizes[1] = leading[1];
  const Tensor padded = checked(given_padded, "padded", given_padded.scalar_type(), sizes, given_padded);
  sizes.erase(sizes.begin());
  sizes[0] = order.capacity;
  const Tensor packed = make(padded, sizes);
  if (packed.numel() > 0) {
    pymtl::cuda::pack(order.packing(order.capacity, bytes_of_rows(padded, 2), batch_first), padded.const_data_ptr(),
                      packed.mutable_data_ptr(), order.stream.get());
  }
  return packed;
}

Tensor unpack(Tensor given_packed, Tensor batch_sizes, OptionalTensor sorted_indices, bool batch_first) {
  const Order order(given_packed, batch_sizes, sorted_indices);
  check(given_packed.dim() >= 1, "packed: expected at least one dimension, got a scalar");
  Sizes sizes = sizes_of(given_packed);
  sizes[0] = order.capacity;
  const Tensor packed = checked(given_packed, "packed", given_packed.scalar_type(), sizes, given_packed);
  sizes.erase(sizes.begin());
  const Sizes leading = order.padded_sizes(batch_first);
  sizes.insert(sizes.begin(), leading.begin(), leading.end());
  const Tensor padded = make(packed, sizes);
  if (padded.numel() > 0) {
    pymtl::cuda::unpack(order.packing(order.capacity, bytes_of_rows(packed, 1), batch_first), packed.const_data_ptr(),
                        padded.mutable_data_ptr(), order.stream.get());
  }
  return padded;
}

}  // namespace
}  // namespace pymtl::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(pymtl, PYMTL_DISPATCH_KEY, m) {
  m.impl("pack", TORCH_BOX(&pymtl::ops::cuda::pack));
  m.impl("unpack", TORCH_BOX(&pymtl::ops::cuda::unpack));
}
