// Mean and maximum of h over the tokens of each sequence, in the order the recurrence ran over them, and attention.
#pragma once

#include <limits>

#include "../kernels.h"
#include "activation.h"

namespace pymtl {
namespace {

template <typename T>
void pool_rows(const Pool<T>& args, const int64_t* starts, int64_t first, int64_t last) {
  const int64_t size = args.shape.hidden_size;
  const int64_t stride = args.shape.recurrences * size;
  for (int64_t row = first; row < last; ++row) {
    int64_t length = 0;
    while (length < args.shape.steps && starts[length + 1] - starts[length] > row) ++length;
    for (int64_t g = 0; g < args.shape.recurrences; ++g) {
      for (int64_t unit = 0; unit < size; unit += kLanes<T>) {
        const int64_t valid = size - unit;
        const int64_t column = g * size + unit;
        const bool mean = args.kind == Pooling::mean;
        Vec<T> value = mean ? Vec<T>{} : broadcast(-std::numeric_limits<T>::infinity());
        Vec<T> error = {};
        int64_t best[kLanes<T>] = {};
        for (int64_t k = 0; k < length; ++k) {
          const int64_t token = starts[args.reverse[g] ? length - 1 - k : k] + row;
          const Vec<T> h = load_part(args.input + token * stride + column, valid);
          if (mean) {
            add_compensated<T>(h, value, error);
            continue;
          }
          const Vec<T> greater = maximum<T>(value, h);
          for (int lane = 0; lane < kLanes<T>; ++lane) {
            // The first token, then every one that replaces the maximum; a NaN replaces it once.
            const bool replaced = greater[lane] != value[lane] && !(value[lane] != value[lane]);
            if (k == 0 || replaced) best[lane] = token;
          }
          value = greater;
        }
        if (mean) value = value / broadcast(static_cast<T>(length));
        store_part(args.output + row * stride + column, value, valid);
        for (int64_t lane = 0; !mean && lane < kLanes<T> && lane < valid; ++lane) {
          args.argmax[row * stride + column + lane] = best[lane];
        }
      }
    }
  }
}

// One head's weights over a sequence: softmax of its scores.
template <typename T>
struct AttentionWeights {
  const T* scores;  // of the head, tokens `heads` apart
  int64_t heads;
  const int64_t* starts;  // [steps + 1] the first token of each step
  int64_t row;
  int64_t length = 0;
  T largest = -std::numeric_limits<T>::infinity();
  T sum = 0;

  AttentionWeights(const AttentionPool<T>& args, const int64_t* all_starts, int64_t sequence, int64_t head)
      : scores(args.scores + head), heads(args.heads), starts(all_starts), row(sequence) {
    while (length < args.shape.steps && starts[length + 1] - starts[length] > row) ++length;
    for (int64_t t = 0; t < length; ++t) {
      const T score = scores[token(t) * heads];
      if (score > largest || score != score) largest = score;
    }
    for (int64_t t = 0; t < length; ++t) sum += exponential(t);
  }

  int64_t token(int64_t t) const { return starts[t] + row; }
  T exponential(int64_t t) const {
    return exp_nonpositive<T>(broadcast(scores[token(t) * heads]) - broadcast(largest))[0];
  }
  T weight(int64_t t) const { return exponential(t) / sum; }
};

template <typename T>
void attention_pool_row(const AttentionPool<T>& args, const int64_t* starts, int64_t row) {
  const int64_t F = args.shape.hidden_size;
  const int64_t slice = F / args.heads;
  for (int64_t j = 0; j < args.heads; ++j) {
    const AttentionWeights<T> attention(args, starts, row, j);
    T* const to = args.output + row * F + j * slice;
    for (int64_t f = 0; f < slice; f += kLanes<T>) store_part(to + f, Vec<T>{}, slice - f);
    for (int64_t t = 0; t < attention.length; ++t) {
      const Vec<T> weight = broadcast(attention.weight(t));
      const T* const from = args.input + attention.token(t) * F + j * slice;
      for (int64_t f = 0; f < slice; f += kLanes<T>) {
        const int64_t valid = slice - f;
        store_part(to + f, fma(weight, load_part(from + f, valid), load_part(to + f, valid)), valid);
      }
    }
  }
}

// dx_t = w_t dy      dw_t = dy . x_t      ds_t = w_t (dw_t - sum_u w_u dw_u)
template <typename T>
void attention_pool_gradient(const AttentionPoolBackward<T>& args, const int64_t* starts, int64_t row) {
  const AttentionPool<T>& forward = args.forward;
  const int64_t F = forward.shape.hidden_size;
  const int64_t slice = F / forward.heads;
  for (int64_t j = 0; j < forward.heads; ++j) {
    const AttentionWeights<T> attention(forward, starts, row, j);
    const T* const grad = args.grad_output + row * F + j * slice;
    T mean = 0;
    for (int64_t t = 0; t < attention.length; ++t) {
      const T weight = attention.weight(t);
      const int64_t at = attention.token(t) * F + j * slice;
      Vec<T> products = {};
      for (int64_t f = 0; f < slice; f += kLanes<T>) {
        const int64_t valid = slice - f;
        const Vec<T> dy = load_part(grad + f, valid);
        products = fma(dy, load_part(forward.input + at + f, valid), products);
        store_part(args.grad_input + at + f, broadcast(weight) * dy, valid);
      }
      const T of_weight = sum_lanes<T>(products);
      args.grad_scores[attention.token(t) * forward.heads + j] = of_weight;
      mean += weight * of_weight;
    }
    for (int64_t t = 0; t < attention.length; ++t) {
      T& score = args.grad_scores[attention.token(t) * forward.heads + j];
      score = attention.weight(t) * (score - mean);
    }
  }
}

}  // namespace
}  // namespace pymtl
