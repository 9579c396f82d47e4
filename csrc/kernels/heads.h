// The projection of all heads at once: y = x W^T + b, W the heads' weights stacked row after row.
//
// The depth is summed in `parts` equal parts, one for each recurrence that wrote a part of x: each part
// from zero in order of k, then the parts in order, then the bias. This is the order of the projection
// fused into the LSTM's walk, so both give the same bits; and a row's result depends on that row alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "executor.h"

namespace pymtl {

template <typename T>
struct Heads {
  int64_t rows;     // N
  int64_t parts;    // G
  int64_t depth;    // K of one part
  int64_t width;    // C
  const T* input;   // [N, G*K]
  const T* weight;  // [C, G*K]
  const T* bias;    // [C] or null: zeros
  T* output;        // [N, C]
};

template <typename T>
size_t heads_workspace(const Heads<T>& args);

template <typename T>
void heads_forward(const Heads<T>& args, void* workspace, const Executor& executor);

}  // namespace pymtl
