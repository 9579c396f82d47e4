#include "kernels/packing.h"

#include "batch.h"

namespace pymtl::ops {
namespace {

void check_lengths(const Tensor& lengths, int64_t steps) {
  const int64_t* const values = read<int64_t>(lengths);
  for (int64_t row = 0; row < lengths.size(0); ++row) {
    check(values[row] > 0 && values[row] <= steps, "lengths: expected lengths from 1 to ", steps,
          ", the padded batch's steps, got ", values[row], " at position ", row);
  }
}

std::tuple<Tensor, Tensor, Tensor> packing_order(Tensor given_lengths, int64_t steps) {
  check(given_lengths.dim() == 1, "lengths: expected one dimension, got ", given_lengths.dim());
  check(steps >= 0, "steps: expected a number of at least 0, got ", steps);
  const int64_t batch = given_lengths.size(0);
  const Tensor lengths = checked(given_lengths, "lengths", ScalarType::Long, {batch});
  check_lengths(lengths, steps);
  const int64_t* const values = read<int64_t>(lengths);
  const Tensor batch_sizes = make(lengths, {steps});
  const Tensor sorted = make(lengths, {batch});
  const Tensor unsorted = make(lengths, {batch});
  pymtl::packing_order(values, batch, steps, write<int64_t>(batch_sizes), write<int64_t>(sorted),
                       write<int64_t>(unsorted));
  return {batch_sizes, sorted, unsorted};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> segment_order(Tensor given_resets, OptionalTensor given_lengths,
                                                                 bool batch_first) {
  check(given_resets.dim() == 2, "resets: expected two dimensions, got ", given_resets.dim());
  const Tensor resets = checked(given_resets, "resets", ScalarType::Bool, sizes_of(given_resets));
  const int64_t batch = resets.size(batch_first ? 0 : 1);
  const int64_t steps = resets.size(batch_first ? 1 : 0);
  check(steps > 0, "resets: expected at least one step, got none");
  const OptionalTensor lengths = checked(given_lengths, "lengths", ScalarType::Long, {batch});
  if (lengths.has_value()) check_lengths(*lengths, steps);
  Resets args{};
  args.steps = steps;
  args.batch = batch;
  args.resets = read<bool>(resets);
  args.lengths = read<int64_t>(lengths);
  args.step_stride = batch_first ? 1 : batch;
  args.sequence_stride = batch_first ? steps : 1;
  const SegmentCounts counts = count_segments(args);
  const auto indices = [&resets](int64_t count) { return make(resets, {count}, ScalarType::Long); };
  const Tensor batch_sizes = indices(steps);
  const Tensor tokens = indices(counts.tokens);
  const Tensor first = indices(batch);
  const Tensor last = indices(batch);
  const Tensor sequences = indices(counts.segments);
  pymtl::segment_order(args, write<int64_t>(batch_sizes), write<int64_t>(tokens), write<int64_t>(first),
                       write<int64_t>(last), write<int64_t>(sequences));
  return {batch_sizes, tokens, first, last, sequences};
}

// The index work of a packing, checked so that every index it leads to is inside the padded tensor.
struct Order {
  BatchSizes batch_sizes;
  int64_t batch;
  OptionalTensor sorted_indices;

  Order(const Tensor& given_sizes, const OptionalTensor& given_indices)
      : batch_sizes(given_sizes), batch(batch_sizes.batch()) {
    if (given_indices.has_value()) sorted_indices = checked_order(*given_indices, batch);
  }

  Packing packing(int64_t row_bytes, bool batch_first) const {
    return {batch_sizes.steps,
            batch,
            read<int64_t>(batch_sizes.sizes),
            read<int64_t>(sorted_indices),
            row_bytes,
            batch_first ? row_bytes : batch * row_bytes,
            batch_first ? batch_sizes.steps * row_bytes : row_bytes};
  }

  Sizes padded_sizes(bool batch_first) const {
    return batch_first ? Sizes{batch, batch_sizes.steps} : Sizes{batch_sizes.steps, batch};
  }
};

int64_t bytes_of_rows(const Tensor& tensor, size_t leading) {
  int64_t bytes = static_cast<int64_t>(tensor.element_size());
  for (int64_t d = static_cast<int64_t>(leading); d < tensor.dim(); ++d) bytes *= tensor.size(d);
  return bytes;
}

Tensor pack(Tensor given_padded, Tensor batch_sizes, OptionalTensor sorted_indices, bool batch_first) {
  const Order order(batch_sizes, sorted_indices);
  check(given_padded.dim() >= 2, "padded: expected at least two dimensions, got ", given_padded.dim());
  Sizes sizes = sizes_of(given_padded);
  const Sizes leading = order.padded_sizes(batch_first);
  sizes[0] = leading[0];
  sizes[1] = leading[1];
  const Tensor padded = checked(given_padded, "padded", given_padded.scalar_type(), sizes);
  sizes.erase(sizes.begin());
  sizes[0] = order.batch_sizes.tokens;
  const Tensor packed = make(padded, sizes);
  if (packed.numel() > 0) {
    pymtl::pack(order.packing(bytes_of_rows(padded, 2), batch_first), padded.const_data_ptr(),
                packed.mutable_data_ptr(), torch_executor());
  }
  return packed;
}

Tensor unpack(Tensor given_packed, Tensor batch_sizes, OptionalTensor sorted_indices, bool batch_first) {
  const Order order(batch_sizes, sorted_indices);
  check(given_packed.dim() >= 1, "packed: expected at least one dimension, got a scalar");
  Sizes sizes = sizes_of(given_packed);
  sizes[0] = order.batch_sizes.tokens;
  const Tensor packed = checked(given_packed, "packed", given_packed.scalar_type(), sizes);
  sizes.erase(sizes.begin());
  const Sizes leading = order.padded_sizes(batch_first);
  sizes.insert(sizes.begin(), leading.begin(), leading.end());
  const Tensor padded = make(packed, sizes);
  if (padded.numel() > 0) {
    pymtl::unpack(order.packing(bytes_of_rows(packed, 1), batch_first), packed.const_data_ptr(),
                  padded.mutable_data_ptr(), torch_executor());
  }
  return padded;
}

}  // namespace
}  // namespace pymtl::ops

STABLE_TORCH_LIBRARY_IMPL(pymtl, CPU, m) {
  m.impl("packing_order", TORCH_BOX(&pymtl::ops::packing_order));
  m.impl("segment_order", TORCH_BOX(&pymtl::ops::segment_order));
  m.impl("pack", TORCH_BOX(&pymtl::ops::pack));
  m.impl("unpack", TORCH_BOX(&pymtl::ops::unpack));
}
