// Sentence features on a GPU: see kernels/pooling.h, whose order of sums and whose choice among equal maxima these
// have. T is float, BFloat16 or Float16; sums are float. Pointers are to memory of the current device, all work goes to
// `stream`, nothing waits for it.
#pragma once

#include <cstdint>

#include "kernels/bfloat16.h"
#include "kernels/cuda/float16.h"
#include "kernels/pooling.h"

namespace pymtl::cuda {

// Recurrences of a call at most.
inline constexpr int64_t kPooledRecurrences = 64;

template <typename T>
struct Pool {
  int64_t steps, batch, tokens;
  const int64_t* batch_sizes;  // [T] or null: all B
  const int64_t* ends;         // [T] sums of batch_sizes up to and with each step; null with batch_sizes
  int64_t recurrences;         // G
  int64_t features;            // F, a multiple of G
  uint64_t reverse;            // a bit for each recurrence
  Pooling kind;
  const T* input;   // [N, F]
  T* output;        // [B, F]
  int64_t* argmax;  // [B, F] the token each maximum came from; for Pooling::max, else null
};

template <typename T>
void pool_forward(const Pool<T>& args, void* stream);

template <typename T>
struct PoolBackward {
  int64_t steps, batch, tokens;
  const int64_t* batch_sizes;
  const int64_t* ends;
  int64_t features;
  Pooling kind;
  const T* grad_output;   // [B, F]
  const int64_t* argmax;  // [B, F] for Pooling::max, else null
  T* grad_input;          // [N, F]
};

template <typename T>
void pool_backward(const PoolBackward<T>& args, void* stream);

}  // namespace pymtl::cuda
