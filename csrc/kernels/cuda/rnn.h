// The LSTM recurrence on a GPU: W_hh stays in the registers and the shared memory of some blocks for the whole
// sequence, and each block owns some hidden units. With thread-block clusters (Hopper, sm_90) the blocks of a cluster
// send one another h (forward) or parts of the gradient of h (backward) at every step; one launch runs all recurrences
// and all slices of the batch, each by a cluster of its own. 16-bit weights that no cluster holds, or a device without
// clusters, take groups of blocks all over the device, which meet in its memory. What neither holds goes step by step
// (kernels/cuda/rnn_step.h). The formulas, the letters and the layout are those of kernels/rnn.h; the products with
// W_ih and the gradients of the weights are matrix products over all tokens, which the caller makes.
//
// None of it has run on a GPU yet: the tests run it on the host (tests/kernels/cuda), and how it shares out work rests
// on estimates of time, not on measurements.
//
// T is float, BFloat16 or Float16. Products of two 16-bit numbers are summed in float by tensor cores, those of float
// in float, where TF32 is allowed and faster by tensor cores too. c and everything between two products are float; h is
// rounded to T at every step.
//
// All pointers are to memory of the current device, 4-byte aligned, all work goes to `stream`, nothing waits for it.
// Results are the same bits in every run. Arrays are row-major and contiguous. Nothing may alias. Errors of CUDA's are
// std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/bfloat16.h"
#include "kernels/cuda/float16.h"

namespace pymtl::cuda {

// Recurrences in one launch; a call with more makes several.
inline constexpr int kRecurrences = 32;

struct RnnShape {
  int64_t recurrences;         // G
  int64_t steps;               // T
  int64_t batch;               // B
  int64_t tokens;              // N: rows of everything that is of tokens; more than there are is fine
  int64_t hidden_size;         // H
  const int64_t* batch_sizes;  // [T], B >= batch_sizes[0] >= batch_sizes[1] >= ... >= 0; null: all B
  bool tf32 = false;           // of float: products may round their operands to TF32
};

template <typename T>
struct RnnWeights {
  const T* w_hh;  // [4H, H]
  const T* b_ih;  // [4H] or null: zeros; only read forward
  const T* b_hh;  // [4H] or null: zeros; only read forward
  bool reverse;
};

template <typename T>
struct RnnForward {
  RnnShape shape;
  const RnnWeights<T>* weights;  // [G], on the host
  const float* projected;        // [N, G, 4H] W_ih x
  const T* h0;                   // [G, B, H] or null: zeros
  const T* c0;                   // [G, B, H] or null: zeros
  T* output;                     // [N, G*H]
  T* h_n;                        // [G, B, H]
  T* c_n;                        // [G, B, H]
  T* gates;                      // [G, N, 4H] activated, for the backward pass; or null, with cells
  float* cells;                  // [G, N, H]
};

template <typename T>
struct RnnBackward {
  RnnShape shape;
  const RnnWeights<T>* weights;  // [G], on the host
  const T* c0;                   // as in the forward pass
  const T* gates;                // from the forward pass
  const float* cells;            // from the forward pass
  const T* grad_output;          // [N, G*H] or null: zeros
  const T* grad_h_n;             // [G, B, H] or null: zeros
  const T* grad_c_n;             // [G, B, H] or null: zeros
  T* grad_gates;                 // [N, G, 4H] of the gates before activation
  T* grad_h0;                    // [G, B, H] or null: not wanted
  T* grad_c0;                    // [G, B, H] or null: not wanted
};

// The largest hidden size whose weights the current device holds; 0 if none.
template <typename T>
int64_t rnn_hidden_size_limit();

// A way to divide a call among blocks; a call uses the one whose `chosen` is true.
struct RnnChoice {
  std::string name;
  int64_t at_once;  // clusters or groups that the device runs at the same time
  int64_t waves;    // of these, that run one after the other
  double step;      // microseconds of a step of one wave, estimated
  bool chosen;
};

// The ways there are for a shape on the current device, for benchmarks.
template <typename T>
std::vector<RnnChoice> rnn_choices(const RnnShape& shape, bool backward);

// From now on calls of this process take the way of that name, or throw where there is none; "": the estimated best.
void rnn_force_choice(const std::string& name);

// Bytes of scratch memory, 16-byte aligned, that the call for this shape needs; weights and pointers are not read.
template <typename T>
size_t rnn_forward_workspace(const RnnShape& shape);
template <typename T>
size_t rnn_backward_workspace(const RnnShape& shape);

// cudaStream_t is not named here, so that callers need no header of CUDA's.
template <typename T>
void rnn_forward(const RnnForward<T>& args, void* workspace, void* stream);
template <typename T>
void rnn_backward(const RnnBackward<T>& args, void* workspace, void* stream);

}  // namespace pymtl::cuda
