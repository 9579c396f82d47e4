// The projection of all heads at once: y = x W^T + b, W the heads' weights stacked row after row.
//
// The depth is summed in `parts` equal parts, one for each recurrence that wrote a part of x: each part
// from zero in order of k, then the parts in order, then the bias. This is the order of the projection
// fused into the LSTM's time loop, so both give the same bits; and a row's result depends on that row alone. T is
// float, double or BFloat16, whose sums are float.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bfloat16.h"
#include "executor.h"

namespace pymtl {

template <typename T>
struct Heads {
  int64_t rows;                  // N
  int64_t parts;                 // G
  int64_t depth;                 // K of one part
  int64_t width;                 // C
  const T* input;                // [N, G*K]
  const T* weight;               // [C, G*K]
  const T* bias;                 // [C] or null: zeros
  T* output;                     // [N, C]
  const T* prepacked = nullptr;  // from heads_prepack for this weight, under the same instruction set, or null
};

// Elements of T that heads_prepack writes under the instruction set in use. Of args both read the sizes and the weight.
template <typename T>
size_t heads_prepacked_size(const Heads<T>& args);

// Packs the weight into panels, for Heads::prepacked and RnnHeads::prepacked. prepacked: 64-byte aligned.
template <typename T>
void heads_prepack(const Heads<T>& args, T* prepacked);

// Bytes of scratch memory, on a multiple of 64, for `heads_forward` with the same executor.
template <typename T>
size_t heads_workspace(const Heads<T>& args, const Executor& executor);

template <typename T>
void heads_forward(const Heads<T>& args, void* workspace, const Executor& executor);

// grad x = dy W, grad W = dy^T x, grad b = sum of dy. No result depends on the number of threads.
template <typename T>
struct HeadsBackward {
  int64_t rows;          // N
  int64_t features;      // F = G*K
  int64_t width;         // C
  const T* grad_output;  // [N, C]
  const T* input;        // [N, F]
  const T* weight;       // [C, F]
  T* grad_input;         // [N, F] or null: not wanted
  T* grad_weight;        // [C, F] or null: not wanted
  T* grad_bias;          // [C] or null: not wanted
};

template <typename T>
size_t heads_backward_workspace(const HeadsBackward<T>& args, const Executor& executor);

template <typename T>
void heads_backward(const HeadsBackward<T>& args, void* workspace, const Executor& executor);

}  // namespace pymtl
