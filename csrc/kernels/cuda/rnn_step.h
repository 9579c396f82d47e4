// One step of recurrences on a GPU, between two products with W_hh that the caller makes: for the cells, options, sizes
// and devices that no kernel of kernels/cuda/rnn.h holds the weights for. The formulas, the letters and the layout are
// those of kernels/rnn.h.
//
// Forward, for every s from 0 to T - 1:       sums = operand W_hh^T, then rnn_step_forward
// Backward, for every s from T - 1 to 0:      rnn_step_backward, then product = operand W_hh; and at the end
//                                             rnn_step_initial_gradient
//
// In step s a recurrence is at its token s, counted from where it starts; sequences without a token there stay as they
// are. Nothing is read on the host, so a graph may record all of it.
//
// T is float, double, BFloat16 or Float16. All pointers are to memory of the current device, all work goes to `stream`,
// nothing waits for it. Results are the same bits in every run. Arrays are row-major and contiguous. Nothing may alias
// but where it says so. Errors of CUDA's are std::runtime_error.
#pragma once

#include <cstdint>

#include "kernels/cuda/float16.h"
#include "kernels/cuda/rnn.h"
#include "kernels/rnn.h"

namespace pymtl::cuda {

// Of some recurrences of a call, at most kRecurrences.
struct RnnSteps {
  Cell cell;
  int64_t recurrences;         // G, of the whole call
  int64_t first;               // the first of these
  int64_t count;               // how many these are
  uint32_t reverse;            // bit k: whether recurrence first + k runs from the last token to the first
  int64_t steps;               // T
  int64_t batch;               // B
  int64_t tokens;              // N: rows of everything that is of tokens; more than there are is fine
  int64_t hidden_size;         // H
  const int64_t* batch_sizes;  // [T] or null: all B
  const int64_t* ends;         // [T] sums of batch_sizes up to and with each step, or null with batch_sizes
};

template <typename T>
struct RnnStepForward {
  RnnSteps at;
  const Accum<T>* projected;  // [N, G, gates * H] W_ih x, or what stands for it in a normalised cell
  const T* b_ih;              // [G, gates * H] or null: zeros
  const T* b_hh;              // [G, gates * H] or null: zeros
  RnnNorm<T> norm;            // of a normalised cell: of all recurrences, [G, ...] each
  RnnMasks<T> masks;
  Accum<T>* sums;   // [count, B, gates * H]; overwritten
  T* h;             // [G, B, H] before the step, and after it
  T* operand;       // [G, B, H] D h of recurrent dropout, to be multiplied next; null without
  Accum<T>* c;      // [G, B, H] as h; of an LSTM
  T* output;        // [N, G*H]
  T* gates;         // [G, N, reserve * H] for the backward pass; or null, with cells
  Accum<T>* cells;  // [G, N, H] of an LSTM
};

template <typename T>
struct RnnStepBackward {
  RnnSteps at;
  RnnNorm<T> norm;  // as in the forward pass
  RnnMasks<T> masks;
  const T* h0;      // [G, B, H] or null: zeros
  const T* c0;      // [G, B, H] or null: zeros
  const T* output;  // from the forward pass
  const T* gates;
  const Accum<T>* cells;
  const T* grad_output;     // [N, G*H] or null: zeros
  const Accum<T>* product;  // [count, B, H] operand W_hh of the step before; at first zeros
  Accum<T>* grad_h;         // [G, B, H] of h after the step but for the product; then of h before it. At first of h_n
  Accum<T>* grad_c;         // [G, B, H] of c, likewise; of an LSTM
  T* operand;               // [count, B, gates * H] of W_hh h_{t-1}, to be multiplied next; at first zeros
  T* grad_gates;            // [N, G, gradients * H]
  T* before;                // [N, G*H] what W_hh was multiplied by, or null: not wanted
};

template <typename T>
void rnn_step_forward(const RnnStepForward<T>& args, int64_t step, void* stream);
template <typename T>
void rnn_step_backward(const RnnStepBackward<T>& args, int64_t step, void* stream);

// grad_h0 [G, B, H]: what is left in grad_h, and of these recurrences the last product.
template <typename T>
void rnn_step_initial_gradient(const RnnStepBackward<T>& args, T* grad_h0, void* stream);

}  // namespace pymtl::cuda
