// Attention of queries over the tokens of sequences.
#pragma once

#include <limits>

#include "../kernels.h"
#include "activation.h"

namespace pymtl {
namespace {

// a . b, in two sums of the vectors in turn.
template <typename T>
T dot(const T* a, const T* b, int64_t size) {
  Vec<T> even = {}, odd = {};
  int64_t i = 0;
  for (; i + kLanes<T> < size; i += 2 * kLanes<T>) {
    even = fma(load(a + i), load(b + i), even);
    const int64_t valid = size - i - kLanes<T>;
    odd = fma(load_part(a + i + kLanes<T>, valid), load_part(b + i + kLanes<T>, valid), odd);
  }
  if (i < size) even = fma(load_part(a + i, size - i), load_part(b + i, size - i), even);
  return sum_lanes<T>(even + odd);
}

// to += factor * from
template <typename T>
void add_scaled(T factor, const T* from, T* to, int64_t size) {
  const Vec<T> scale = broadcast(factor);
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    const int64_t valid = size - i;
    store_part(to + i, fma(scale, load_part(from + i, valid), load_part(to + i, valid)), valid);
  }
}

template <typename T>
void clear(T* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes<T>) store_part(to + i, Vec<T>{}, size - i);
}

// v . tanh(query + key)
template <typename T>
T additive_score(const T* query, const T* key, const T* score, int64_t size) {
  Vec<T> sum = {};
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    const int64_t valid = size - i;
    const Vec<T> mixed = tanh<T>(load_part(query + i, valid) + load_part(key + i, valid));
    sum = fma(load_part(score + i, valid), mixed, sum);
  }
  return sum_lanes<T>(sum);
}

// Scores [length] become their softmax.
template <typename T>
void softmax_in_place(T* scores, int64_t length) {
  T largest = -std::numeric_limits<T>::infinity();
  for (int64_t t = 0; t < length; ++t) {
    if (scores[t] > largest || scores[t] != scores[t]) largest = scores[t];
  }
  Vec<T> sums = {};
  for (int64_t t = 0; t < length; t += kLanes<T>) {
    const int64_t valid = length - t;
    const Vec<T> shifted = load_part(scores + t, valid, -std::numeric_limits<T>::infinity()) - broadcast(largest);
    const Vec<T> values = exp_nonpositive<T>(shifted);
    sums = sums + values;
    store_part(scores + t, values, valid);
  }
  const Vec<T> sum = broadcast(sum_lanes<T>(sums));
  for (int64_t t = 0; t < length; t += kLanes<T>) {
    store_part(scores + t, load_part(scores + t, length - t) / sum, length - t);
  }
}

inline int64_t length_of(const RnnShape& shape, const int64_t* starts, int64_t row) {
  int64_t length = 0;
  while (length < shape.steps && starts[length + 1] - starts[length] > row) ++length;
  return length;
}

template <typename T>
void attention_query(const AttentionForward<T>& args, const int64_t* starts, int64_t m) {
  const int64_t row = args.sequences[m], length = length_of(args.shape, starts, row);
  const int64_t D = args.key_size, F = args.shape.hidden_size;
  const int64_t keys = D / args.heads, values = F / args.heads;
  for (int64_t j = 0; j < args.heads; ++j) {
    T* const weights = args.weights + (m * args.heads + j) * args.shape.steps;
    const T* const query = args.query + m * D + j * keys;
    for (int64_t t = 0; t < length; ++t) {
      const T* const key = args.key + (starts[t] + row) * D + j * keys;
      weights[t] =
          args.score == nullptr ? dot<T>(query, key, keys) : additive_score<T>(query, key, args.score + j * keys, keys);
    }
    softmax_in_place<T>(weights, length);
    clear<T>(weights + length, args.shape.steps - length);
    T* const context = args.context + m * F + j * values;
    clear<T>(context, values);
    for (int64_t t = 0; t < length; ++t) {
      add_scaled<T>(weights[t], args.value + (starts[t] + row) * F + j * values, context, values);
    }
  }
}

// Of additive scores, what a query's and a key's share of v . tanh(query + key) have in common, times `factor`.
template <typename T>
void add_additive_gradients(T factor, const T* query, const T* key, const T* score, int64_t size, T* grad_query,
                            T* grad_key, T* grad_score) {
  const Vec<T> scale = broadcast(factor);
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    const int64_t valid = size - i;
    const Vec<T> mixed = tanh<T>(load_part(query + i, valid) + load_part(key + i, valid));
    const Vec<T> inner = scale * load_part(score + i, valid) * slope_of_tanh<T>(mixed);
    store_part(grad_query + i, load_part(grad_query + i, valid) + inner, valid);
    store_part(grad_key + i, load_part(grad_key + i, valid) + inner, valid);
    store_part(grad_score + i, fma(scale, mixed, load_part(grad_score + i, valid)), valid);
  }
}

// Of one sequence and the queries that read it.
//   dw_t = dc . v_t + dw      dv_t += w_t dc      ds_t = w_t (dw_t - sum_u w_u dw_u)
//   dq += ds_t k_t            dk_t += ds_t q
template <typename T>
void attention_gradient(const AttentionBackward<T>& args, const int64_t* starts, int64_t row, const int64_t* queries,
                        int64_t count, T* scores, T* grad_score) {
  const int64_t length = length_of(args.shape, starts, row);
  const int64_t D = args.key_size, F = args.shape.hidden_size;
  const int64_t keys = D / args.heads, values = F / args.heads;
  for (int64_t t = 0; t < length; ++t) {
    clear<T>(args.grad_key + (starts[t] + row) * D, D);
    clear<T>(args.grad_value + (starts[t] + row) * F, F);
  }
  if (grad_score != nullptr) clear<T>(grad_score, D);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t m = queries[i];
    clear<T>(args.grad_query + m * D, D);
    for (int64_t j = 0; j < args.heads; ++j) {
      const int64_t at = (m * args.heads + j) * args.shape.steps;
      const T* const weights = args.weights + at;
      const T* const grad_context = args.grad_context == nullptr ? nullptr : args.grad_context + m * F + j * values;
      double mean = 0;
      for (int64_t t = 0; t < length; ++t) {
        const int64_t of_value = (starts[t] + row) * F + j * values;
        T own = args.grad_weights == nullptr ? T(0) : args.grad_weights[at + t];
        if (grad_context != nullptr) {
          own += dot<T>(grad_context, args.value + of_value, values);
          add_scaled<T>(weights[t], grad_context, args.grad_value + of_value, values);
        }
        scores[t] = own;
        mean += static_cast<double>(weights[t]) * own;
      }
      const int64_t of_query = m * D + j * keys;
      for (int64_t t = 0; t < length; ++t) {
        // Differences of numbers that are close: what is lost here comes out larger in sums over tokens.
        const T own = static_cast<T>(weights[t] * (scores[t] - mean));
        const int64_t of_key = (starts[t] + row) * D + j * keys;
        if (args.score == nullptr) {
          add_scaled<T>(own, args.key + of_key, args.grad_query + of_query, keys);
          add_scaled<T>(own, args.query + of_query, args.grad_key + of_key, keys);
        } else {
          add_additive_gradients<T>(own, args.query + of_query, args.key + of_key, args.score + j * keys, keys,
                                    args.grad_query + of_query, args.grad_key + of_key, grad_score + j * keys);
        }
      }
    }
  }
}

}  // namespace
}  // namespace pymtl
