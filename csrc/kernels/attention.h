// Attention of queries over the tokens of sequences: of each query, how much it reads of each token of its sequence
// (softmax over them of scores), and the mean of their values with these weights. With several heads each has its own
// slice of queries, keys and values.
//
// Scores are products (Luong et al. 2015, "Effective Approaches to Attention-based Neural Machine Translation",
// equation 8) or additive (Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and
// Translate", appendix A.1.2). A query's bits do not depend on the others.
#pragma once

#include <cstddef>
#include <cstdint>

#include "executor.h"
#include "rnn.h"

namespace pymtl {

template <typename T>
struct Attention {
  RnnShape shape;            // steps, batch, tokens and batch_sizes of the sequences; hidden_size is F, of values
  int64_t queries;           // M
  int64_t key_size;          // D
  int64_t heads;             // J, which divides D and F
  const T* query;            // [M, D]
  const T* key;              // [N, D]
  const T* value;            // [N, F]
  const int64_t* sequences;  // [M] of each query, below B
  const T* score;            // [D] v of v . tanh(query + key), or null: query . key
};

template <typename T>
struct AttentionForward : Attention<T> {
  T* context;  // [M, F]
  T* weights;  // [M, J, T], 0 behind a sequence's last token
};

// Bytes of scratch memory, on a multiple of 64, for `attention_forward`.
template <typename T>
size_t attention_workspace(const AttentionForward<T>& args);

template <typename T>
void attention_forward(const AttentionForward<T>& args, void* workspace, const Executor& executor);

template <typename T>
struct AttentionBackward : Attention<T> {
  const T* weights;       // of the forward pass
  const T* grad_context;  // [M, F] or null
  const T* grad_weights;  // [M, J, T] or null
  T* grad_query;          // [M, D]
  T* grad_key;            // [N, D]
  T* grad_value;          // [N, F]
  T* grad_score;          // [D], or null without score
};

// Each sequence's queries are added up in their order, and the sequences' shares of grad_score in theirs.
template <typename T>
void attention_backward(const AttentionBackward<T>& args, const Executor& executor);

}  // namespace pymtl
