// The LSTM recurrence (Hochreiter & Schmidhuber 1997; Gers et al. 2000) with nn.LSTM's gates and order:
//
//   a   = W_ih x_t + b_ih + b_hh + W_hh h_{t-1}          [4H], rows in the order i, f, g, o
//   i   = sigmoid(a_i)   f = sigmoid(a_f)   g = tanh(a_g)   o = sigmoid(a_o)
//   c_t = f c_{t-1} + i g
//   h_t = o tanh(c_t)
//
// Dimensions: B batch, T steps, N tokens, I input size, H hidden size, G recurrences in one call, P inputs side by
// side: recurrences [p G/P, (p+1) G/P) read input p. P is 1 for one encoder, K for K encoders each with its own input.
// The layout is PackedSequence's: tokens are time-major, step t holds the first batch_sizes[t] sequences,
// longest sequence first. A dense batch is the case batch_sizes[t] = B for all t.
//
// A sequence's results are the same bits whatever else is in the batch and however the work is split:
// every sum over k runs in one order, bias first, then the input's k = 0..I-1, then the state's k = 0..H-1, in
// chains of at most 256 products.
//
// T is float, double or BFloat16. In bfloat16 sums, c and everything between two products are float (Real<T>); h is
// rounded at every step, since it is the next step's operand.
//
// Arrays are row-major and contiguous unless a stride is named; strides count elements. Nothing may alias.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bfloat16.h"
#include "executor.h"

namespace pymtl {

struct LstmShape {
  int64_t recurrences;         // G
  int64_t steps;               // T
  int64_t batch;               // B = batch_sizes[0]: every sequence has a token
  int64_t tokens;              // N, above 0
  int64_t input_size;          // I
  int64_t hidden_size;         // H
  const int64_t* batch_sizes;  // [T], B >= batch_sizes[0] >= batch_sizes[1] >= ... >= 0; null: all B
  int64_t inputs = 1;          // P, which divides G
};

template <typename T>
struct LstmWeights {
  const T* w_ih;  // [4H, I]
  const T* w_hh;  // [4H, H]
  const T* b_ih;  // [4H] or null: zeros
  const T* b_hh;  // [4H] or null: zeros
  bool reverse;   // walk each sequence from its last token to its first
};

// The projection of heads fused into the walk (see heads.h), and sentence features.
template <typename T>
struct LstmHeads {
  int64_t width;    // C: columns of all heads together; 0: none
  const T* weight;  // [C, G*H]
  const T* bias;    // [C] or null: zeros
  T* logits;        // [N, C]
  T* mean;          // [B, G*H] mean of h over each sequence's tokens, or null
  T* max;           // [B, G*H] maximum of h over each sequence's tokens, or null
};

template <typename T>
struct LstmForward {
  LstmShape shape;
  const LstmWeights<T>* weights;  // [G]
  const T* packed;                // from lstm_pack for these weights, under the same instruction set, or null
  const T* input;                 // [N, P*I]
  const T* h0;                    // [G, B, H] or null: zeros
  const T* c0;                    // [G, B, H] or null: zeros
  T* output;                      // [N, G*H] h of every token, or null: not wanted
  T* h_n;                         // [G, B, H] h after each sequence's last step
  T* c_n;                         // [G, B, H]
  T* gates;                       // [G, N, 4H] i, f, g, o after activation, for the backward pass; or null, with cells
  Real<T>* cells;                 // [G, N, H] c of every token, for the backward pass; or null, with gates
  LstmHeads<T> heads;
};

// Where the gradients of a recurrence's weights go; null: not wanted. Those of b_ih and b_hh are equal.
template <typename T>
struct LstmWeightGradients {
  T* w_ih;  // [4H, I]
  T* w_hh;  // [4H, H]
  T* bias;  // [4H]
};

template <typename T>
struct LstmBackward {
  LstmShape shape;
  const LstmWeights<T>* weights;  // [G]
  const T* input;                 // as in the forward pass
  const T* h0;
  const T* c0;
  const T* output;                             // [N, G*H] from the forward pass
  const T* gates;                              // [G, N, 4H] from the forward pass
  const Real<T>* cells;                        // [G, N, H] from the forward pass
  const T* grad_output;                        // [N, G*H] or null: zeros
  const T* grad_h_n;                           // [G, B, H] or null: zeros
  const T* grad_c_n;                           // [G, B, H] or null: zeros
  T* grad_gates;                               // [G, N, 4H] gradient of a, the gates before activation
  T* grad_input;                               // [N, P*I] or null: not wanted
  const LstmWeightGradients<T>* grad_weights;  // [G]
  T* grad_h0;                                  // [G, B, H] or null: not wanted
  T* grad_c0;                                  // [G, B, H] or null: not wanted
};

// Elements of T that lstm_pack writes under the instruction set in use.
template <typename T>
size_t lstm_packed_size(int64_t recurrences, int64_t input_size, int64_t hidden_size);

// What the layout of packed weights depends on: how many numbers a vector of the instruction set in use holds.
template <typename T>
int64_t lstm_packed_lanes();

// Packs weights [G] into panels, for LstmForward::packed. packed: 64-byte aligned.
template <typename T>
void lstm_pack(const LstmWeights<T>* weights, int64_t recurrences, int64_t input_size, int64_t hidden_size, T* packed,
               const Executor& executor);

// Bytes of 64-byte-aligned scratch memory that the call with these arguments needs.
template <typename T>
size_t lstm_forward_workspace(const LstmForward<T>& args, const Executor& executor);
template <typename T>
size_t lstm_backward_workspace(const LstmBackward<T>& args, const Executor& executor);

template <typename T>
void lstm_forward(const LstmForward<T>& args, void* workspace, const Executor& executor);
template <typename T>
void lstm_backward(const LstmBackward<T>& args, void* workspace, const Executor& executor);

}  // namespace pymtl
