#include "kernels/attention.h"

#include "batch.h"
#include "scratch.h"
#include "tensors.h"

namespace pymtl::ops {
namespace {

// Checked arguments, without where results go.
template <typename T>
struct Call {
  BatchSizes packing;
  Tensor query, key, value, sequences;
  OptionalTensor score;
  Attention<T> args{};
  ScalarType type;

  Call(const Tensor& given_query, const Tensor& given_key, const Tensor& given_value, const Tensor& given_sequences,
       const Tensor& batch_sizes, int64_t heads, const OptionalTensor& given_score)
      : packing(batch_sizes),
        query(given_query),
        key(given_key),
        value(given_value),
        sequences(given_sequences),
        type(given_query.scalar_type()) {
    for (const auto& [name, tensor] :
         {std::pair("query", &query), std::pair("key", &key), std::pair("value", &value)}) {
      check(tensor->dim() == 2, name, ": expected two dimensions, got ", tensor->dim());
    }
    const int64_t queries = query.size(0), D = query.size(1), F = value.size(1);
    check(heads > 0 && D % heads == 0 && F % heads == 0, "heads: expected a divisor of ", D, " and ", F,
          " features, got ", heads);
    query = checked(query, "query", type, {queries, D});
    key = checked(key, "key", type, {packing.tokens, D});
    value = checked(value, "value", type, {packing.tokens, F});
    score = checked(given_score, "score", type, {D});
    sequences = checked(sequences, "sequences", ScalarType::Long, {queries});
    const int64_t* const rows = read<int64_t>(sequences);
    for (int64_t m = 0; m < queries; ++m) {
      check(rows[m] >= 0 && rows[m] < packing.batch(), "sequences: expected numbers below ", packing.batch(),
            ", how many there are, got ", rows[m]);
    }
    args.shape = {1, packing.steps, packing.batch(), packing.tokens, 0, F, read<int64_t>(packing.sizes)};
    args.queries = queries;
    args.key_size = D;
    args.heads = heads;
    args.query = read<T>(query);
    args.key = read<T>(key);
    args.value = read<T>(value);
    args.sequences = rows;
    args.score = read<T>(score);
  }
};

std::tuple<Tensor, Tensor> attend(Tensor query, Tensor key, Tensor value, Tensor sequences, Tensor batch_sizes,
                                  int64_t heads, OptionalTensor score) {
  return with_real_type(query, "query", [&]<typename T>() {
    const Call<T> call(query, key, value, sequences, batch_sizes, heads, score);
    const Tensor context = make(call.query, {call.args.queries, call.value.size(1)});
    const Tensor weights = make(call.query, {call.args.queries, heads, call.packing.steps});
    if (call.args.queries > 0) {
      const AttentionForward<T> args{call.args, write<T>(context), write<T>(weights)};
      const Scratch workspace(attention_workspace(args));
      attention_forward(args, workspace.memory(), torch_executor());
    }
    return std::make_tuple(context, weights);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(OptionalTensor given_grad_context,
                                                           OptionalTensor given_grad_weights, Tensor query, Tensor key,
                                                           Tensor value, Tensor sequences, Tensor batch_sizes,
                                                           int64_t heads, OptionalTensor score, Tensor given_weights) {
  return with_real_type(query, "query", [&]<typename T>() {
    const Call<T> call(query, key, value, sequences, batch_sizes, heads, score);
    const Sizes of_weights = {call.args.queries, heads, call.packing.steps};
    const Tensor weights = checked(given_weights, "weights", call.type, of_weights);
    const OptionalTensor grad_context =
        checked(given_grad_context, "grad_context", call.type, {call.args.queries, call.value.size(1)});
    const OptionalTensor grad_weights = checked(given_grad_weights, "grad_weights", call.type, of_weights);
    const Tensor grad_query = make(call.query, sizes_of(call.query));
    const Tensor grad_key = make(call.query, sizes_of(call.key));
    const Tensor grad_value = make(call.query, sizes_of(call.value));
    const Tensor grad_score = make(call.query, {call.score.has_value() ? call.args.key_size : 0});
    if (call.packing.tokens > 0) {
      attention_backward(AttentionBackward<T>{call.args, read<T>(weights), read<T>(grad_context), read<T>(grad_weights),
                                              write<T>(grad_query), write<T>(grad_key), write<T>(grad_value),
                                              call.score.has_value() ? write<T>(grad_score) : nullptr},
                         torch_executor());
    }
    return std::make_tuple(grad_query, grad_key, grad_value, grad_score);
  });
}

}  // namespace
}  // namespace pymtl::ops

STABLE_TORCH_LIBRARY_IMPL(pymtl, CPU, m) {
  m.impl("attend", TORCH_BOX(&pymtl::ops::attend));
  m.impl("attend_backward", TORCH_BOX(&pymtl::ops::attend_backward));
}
