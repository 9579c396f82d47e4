// Recurrent layers with nn.LSTM's, nn.GRU's and nn.RNN's gates, order and weights [gates * H, ...].
//
// Long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000), 4 gates:
//
//   a   = W_ih x_t + b_ih + b_hh + W_hh h_{t-1}          [4H], rows in the order i, f, g, o
//   i   = sigmoid(a_i)   f = sigmoid(a_f)   g = tanh(a_g)   o = sigmoid(a_o)
//   c_t = f c_{t-1} + i g
//   h_t = o tanh(c_t)
//
// Gated recurrent unit (Cho et al. 2014, the reset gate behind the product as in nn.GRU), 3 gates:
//
//   a   = W_ih x_t + b_ih          q = W_hh h_{t-1} + b_hh          [3H], rows in the order r, z, n
//   r   = sigmoid(a_r + q_r)       z = sigmoid(a_z + q_z)           n = tanh(a_n + r q_n)
//   h_t = (1 - z) n + z h_{t-1}
//
// Plain recurrent layer (Elman 1990), 1 gate:
//
//   h_t = tanh or relu(W_ih x_t + b_ih + b_hh + W_hh h_{t-1})
//
// What may be added to a cell:
//
// Recurrent dropout (Gal & Ghahramani 2016): the products with W_hh read D h_{t-1} instead of h_{t-1}, with the same D
// at all steps of a sequence.
//
// Zoneout (Krueger et al. 2017): of what the cell computes, h~ and c~, a part is given up for what was there before:
//
//   c_t = d_c c_{t-1} + (1 - d_c) c~          h_t = d_h h_{t-1} + (1 - d_h) h~
//
// Layer normalisation (Ba et al. 2016), in a normalised cell: LN(v; g) = g (v - mean v) / sqrt(variance of v + 1e-5),
// over all gates of a token together. Its input comes projected and normalised already: what stands for W_ih x_t is
// LN(W_ih x_t; g_ih), for W_hh h_{t-1} it is LN(W_hh h_{t-1}; g_hh), and an LSTM has h~ = o tanh(LN(c~; g_c) + b_c).
//
// Dimensions: B batch, T steps, N tokens, I input size, H hidden size, G recurrences in one call, P inputs side by
// side: recurrences [p G/P, (p+1) G/P) read input p. P is 1 for one encoder, K for K encoders each with its own input.
// The layout is PackedSequence's: tokens are time-major, step t holds the first batch_sizes[t] sequences,
// longest sequence first. A dense batch is the case batch_sizes[t] = B for all t.
//
// A sequence's results are the same bits whatever else is in the batch and however the work is split:
// every sum over k runs in one order, bias first, then the input's k = 0..I-1, then the state's k = 0..H-1, in
// chains of at most 64 products.
//
// T is float, double or BFloat16. In bfloat16 sums, c and everything between two products are float (Accum<T>); h is
// rounded at every step, since it is the next step's operand.
//
// Weights may be kept in fewer bits, for inference in float (NarrowWeights): as bfloat16 numbers w, which are widened
// and computed with as if they were the weights; or as 8-bit integers q with a scale for each row, w = s q. A row v of
// x or h then is made integers too, with a scale t of its own and a z that stands for 0:
//
//   t = (max(v, 0) - min(v, 0)) / 255        z = round(-min(v, 0) / t)        p = round(v / t) + z, from 0 to 255
//   W v = s t (q (p - z)), the products' sum an exact integer
//
// Ties are rounded to even. W v is 0 where the largest and the smallest number are less than 2e-30 apart, and not a
// number where one is not finite.
//
// Arrays are row-major and contiguous unless a stride is named; strides count elements. Nothing may alias.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bfloat16.h"
#include "cells.h"
#include "executor.h"
#include "prepacked.h"

namespace pymtl {

struct RnnShape {
  int64_t recurrences;         // G
  int64_t steps;               // T
  int64_t batch;               // B = batch_sizes[0]: every sequence has a token
  int64_t tokens;              // N, above 0
  int64_t input_size;          // I; of a normalised cell gates * H
  int64_t hidden_size;         // H
  const int64_t* batch_sizes;  // [T], B >= batch_sizes[0] >= batch_sizes[1] >= ... >= 0; null: all B
  int64_t inputs = 1;          // P, which divides G
  Cell cell = Cell::lstm;
};

// The gains and biases within a normalised cell.
template <typename T>
struct RnnNorm {
  const T* g_hh;  // [gates * H]
  const T* g_c;   // [H] of an LSTM
  const T* b_c;   // [H] of an LSTM, or null: zeros
};

template <typename T>
struct RnnWeights {
  const T* w_ih;  // [gates * H, I]; of a normalised cell null
  const T* w_hh;  // [gates * H, H]
  const T* b_ih;  // [gates * H] or null: zeros
  const T* b_hh;  // [gates * H] or null: zeros
  bool reverse;   // run over each sequence from its last token to its first
  RnnNorm<T> norm = {};
};

// Weights in fewer bits than what is computed with, float.
struct NarrowWeights {
  const void* w_ih;       // [gates * H, I] BFloat16 or int8_t in [-127, 127]; of a normalised cell null
  const void* w_hh;       // [gates * H, H] the same
  const float* scale_ih;  // [gates * H] of int8_t, otherwise null
  const float* scale_hh;  // [gates * H] the same
  const float* b_ih;      // [gates * H] or null: zeros
  const float* b_hh;      // [gates * H] or null: zeros
};

// The longest rows whose products with 8-bit weights are sure to fit 32 bits.
inline constexpr int64_t kMostInt8Depth = int64_t{1} << 16;

// Recurrent dropout and zoneout. Zoneout has a factor for each token and unit, or (stride 0) one for each unit, which
// all tokens share.
template <typename T>
struct RnnMasks {
  const T* dropout = nullptr;    // [G, B, H] D, or null: ones
  const T* zoneout_h = nullptr;  // [N, G*H] or [G*H] d_h, or null: zeros
  const T* zoneout_c = nullptr;  // the same of d_c
  int64_t zoneout_h_stride = 0;  // G*H or 0
  int64_t zoneout_c_stride = 0;
};

// The projection of heads fused into the time loop (see heads.h), and sentence features.
template <typename T>
struct RnnHeads {
  int64_t width;                 // C: columns of all heads together; 0: none
  const T* weight;               // [C, G*H]
  const T* bias;                 // [C] or null: zeros
  T* logits;                     // [N, C]
  T* mean;                       // [B, G*H] mean of h over each sequence's tokens, or null
  T* max;                        // [B, G*H] maximum of h over each sequence's tokens, or null
  const T* prepacked = nullptr;  // from heads_prepack for this weight in G parts, or null
};

template <typename T>
struct RnnForward {
  RnnShape shape;
  const RnnWeights<T>* weights;  // [G]
  const T* prepacked;            // from rnn_prepack for these weights, under the same instruction set, or null
  WeightFormat format;           // of prepacked
  const T* input;                // [N, P*I]
  const T* h0;                   // [G, B, H] or null: zeros
  const T* c0;                   // [G, B, H] or null: zeros; of an LSTM, as all that is called c
  T* output;                     // [N, G*H] h of every token, or null: not wanted
  T* h_n;                        // [G, B, H] h after each sequence's last step
  T* c_n;                        // [G, B, H]
  T* gates;                      // [G, N, reserve * H] for the backward pass; or null, with cells
  Accum<T>* cells;               // [G, N, H] c of every token, for the backward pass; or null, with gates
  RnnHeads<T> heads;
  RnnMasks<T> masks;
};

// Where the gradients of a recurrence's weights go; null: not wanted. Those of b_ih and b_hh are equal but for a GRU's
// b_in and b_hn.
template <typename T>
struct RnnWeightGradients {
  T* w_ih;  // [gates * H, I]
  T* w_hh;  // [gates * H, H]
  T* bias;  // [gradients * H]
};

template <typename T>
struct RnnBackward {
  RnnShape shape;
  const RnnWeights<T>* weights;  // [G]
  const T* input;                // as in the forward pass
  const T* h0;
  const T* c0;
  const T* output;                            // [N, G*H] from the forward pass
  const T* gates;                             // [G, N, reserve * H] from the forward pass
  const Accum<T>* cells;                      // [G, N, H] from the forward pass
  const T* grad_output;                       // [N, G*H] or null: zeros
  const T* grad_h_n;                          // [G, B, H] or null: zeros
  const T* grad_c_n;                          // [G, B, H] or null: zeros
  T* grad_gates;                              // [G, N, gradients * H] of the gates before activation
  T* grad_input;                              // [N, P*I] or null: not wanted
  const RnnWeightGradients<T>* grad_weights;  // [G]
  T* grad_h0;                                 // [G, B, H] or null: not wanted
  T* grad_c0;                                 // [G, B, H] or null: not wanted
  RnnMasks<T> masks;                          // as in the forward pass
};

// Elements of T that rnn_prepack writes under the instruction set in use. Only for float is there another format than
// `own`.
template <typename T>
size_t rnn_prepacked_size(Cell cell, int64_t recurrences, int64_t input_size, int64_t hidden_size,
                          WeightFormat format = WeightFormat::own);

// What weights prepacked now, under the instruction set in use, have to say of themselves.
template <typename T>
PrepackedHeader rnn_prepacked_header(Cell cell, int64_t recurrences, int64_t hidden_size,
                                     WeightFormat format = WeightFormat::own);

// Packs weights [G] into panels, for RnnForward::prepacked. prepacked: 64-byte aligned.
template <typename T>
void rnn_prepack(Cell cell, const RnnWeights<T>* weights, int64_t recurrences, int64_t input_size, int64_t hidden_size,
                 T* prepacked, const Executor& executor);
void rnn_prepack(Cell cell, WeightFormat format, const NarrowWeights* weights, int64_t recurrences, int64_t input_size,
                 int64_t hidden_size, float* prepacked, const Executor& executor);

// Bytes of 64-byte-aligned scratch memory that the call with these arguments needs.
template <typename T>
size_t rnn_forward_workspace(const RnnForward<T>& args, const Executor& executor);
template <typename T>
size_t rnn_backward_workspace(const RnnBackward<T>& args, const Executor& executor);

template <typename T>
void rnn_forward(const RnnForward<T>& args, void* workspace, const Executor& executor);
template <typename T>
void rnn_backward(const RnnBackward<T>& args, void* workspace, const Executor& executor);

}  // namespace pymtl
