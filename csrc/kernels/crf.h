// The linear-chain conditional random field (Lafferty, McCallum & Pereira 2001) over packed sequences.
//
//   score(y) = start[y_1] + sum_t e_t[y_t] + sum_t transitions[y_{t-1}, y_t] + end[y_T]
//   log p(y) = score(y) - log Z,  Z the sum of exp(score) over all paths
//
// The forward algorithm runs on scaled probabilities in float64 (Rabiner 1989, section V): a step is a product
// with the matrix exp(transitions) and C exponentials, where log space takes C^2 of them. A sequence for which
// a probability could get lost below the smallest number is computed in log space instead, so no result depends
// on the scores' range. Transitions of -infinity forbid a step.
//
// Dimensions: B batch, T steps, N tokens, C classes; tokens as in rnn.h. A sequence's results are the same bits
// whatever else is in the batch and however the work is split.
#pragma once

#include <cstddef>
#include <cstdint>

#include "executor.h"

namespace pymtl {

template <typename T>
struct CrfChain {
  int64_t steps;
  int64_t batch;               // batch_sizes[0]: every sequence has a token (but see cuda/crf.h)
  int64_t tokens;              // above 0
  int64_t classes;             // above 0
  const int64_t* batch_sizes;  // [T]
  const T* emissions;          // [N, C]
  const T* start;              // [C]
  const T* end;                // [C]
  const T* transitions;        // [C, C] from, to
};

template <typename T>
struct CrfForward {
  CrfChain<T> chain;
  const int64_t* tags;  // [N] in [0, C), or null
  T* result;            // [B] log p(tags), or log Z if there are no tags
  double* alphas;       // [N, C] for the backward pass: the forward probabilities, or their logarithms
  double* scales;       // [N] for the backward pass: what they were divided by; below zero for logarithms
};

template <typename T>
size_t crf_forward_workspace(const CrfForward<T>& args, const Executor& executor);
template <typename T>
void crf_forward(const CrfForward<T>& args, void* workspace, const Executor& executor);

template <typename T>
struct CrfBackward {
  CrfChain<T> chain;
  const int64_t* tags;   // as in the forward pass
  const double* alphas;  // from the forward pass
  const double* scales;  // from the forward pass
  const T* grad_result;  // [B]
  T* grad_emissions;     // [N, C]
  T* grad_start;         // [C]
  T* grad_end;           // [C]
  T* grad_transitions;   // [C, C]
};

template <typename T>
size_t crf_backward_workspace(const CrfBackward<T>& args, const Executor& executor);
template <typename T>
void crf_backward(const CrfBackward<T>& args, void* workspace, const Executor& executor);

// The best path of each sequence (Viterbi 1967), the lowest classes among equals.
template <typename T>
struct CrfDecode {
  CrfChain<T> chain;
  int64_t* tags;  // [N]
  T* scores;      // [B] the score of the path
};

template <typename T>
size_t crf_decode_workspace(const CrfDecode<T>& args, const Executor& executor);
template <typename T>
void crf_decode(const CrfDecode<T>& args, void* workspace, const Executor& executor);

}  // namespace pymtl
