// Sentence features from the packed states of an encoder: mean and maximum over each sequence's tokens, and their sum
// weighted by attention.
// A recurrence that ran backwards is summed backwards, the order of the pooling fused into the time loop,
// so both give the same bits. The mean's sums carry their rounding errors along (Kahan 1965).
#pragma once

#include <cstdint>

#include "executor.h"
#include "rnn.h"

namespace pymtl {

enum class Pooling { mean, max };

template <typename T>
struct Pool {
  RnnShape shape;       // recurrences, steps, batch, tokens, hidden_size, batch_sizes are read
  const bool* reverse;  // [G]
  Pooling kind;
  const T* input;   // [N, G*H]
  T* output;        // [B, G*H]
  int64_t* argmax;  // [B, G*H] the token each maximum came from; for Pooling::max, else null
};

template <typename T>
void pool_forward(const Pool<T>& args, const Executor& executor);

template <typename T>
struct PoolBackward {
  RnnShape shape;
  Pooling kind;
  const T* grad_output;   // [B, G*H]
  const int64_t* argmax;  // [B, G*H] for Pooling::max, else null
  T* grad_input;          // [N, G*H]
};

template <typename T>
void pool_backward(const PoolBackward<T>& args, const Executor& executor);

// Attention (Lin et al. 2017, "A Structured Self-attentive Sentence Embedding", equations 5 and 6, from the scores on):
// of J heads each sums its own slice of the features, weighted by softmax over the sequence's tokens of its scores.
template <typename T>
struct AttentionPool {
  RnnShape shape;   // as Pool's, of one recurrence; hidden_size is F, which J divides
  int64_t heads;    // J
  const T* input;   // [N, F]
  const T* scores;  // [N, J]
  T* output;        // [B, F]
};

template <typename T>
void attention_pool_forward(const AttentionPool<T>& args, const Executor& executor);

template <typename T>
struct AttentionPoolBackward {
  AttentionPool<T> forward;  // its output is not read
  const T* grad_output;      // [B, F]
  T* grad_input;             // [N, F]
  T* grad_scores;            // [N, J]
};

template <typename T>
void attention_pool_backward(const AttentionPoolBackward<T>& args, const Executor& executor);

}  // namespace pymtl
