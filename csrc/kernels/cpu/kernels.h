// Between the code that splits work and allocates (compiled once, for any CPU) and the code that computes
// (compiled once per instruction set): plain structs and a table of function pointers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../attention.h"
#include "../char_cnn.h"
#include "../crf.h"
#include "../heads.h"
#include "../isa.h"
#include "../joint_loss.h"
#include "../pooling.h"
#include "../rnn.h"
#include "team.h"

namespace pymtl {

// What one worker's parts of rnn_forward and of rnn_backward have in common: one recurrence, the sequences
// [first_row, last_row) of the batch, and of the hidden units those in the place-th of `team->size` equal parts; all
// without a team.
template <typename T>
struct RnnLoop {
  Cell cell;
  const int64_t* starts;  // [steps + 1] the first token of each step
  int64_t steps;
  int64_t first_row;
  int64_t last_row;
  bool reverse;
  int64_t hidden_size;
  const T* panels;  // this recurrence's weights, from pack_rnn or pack_rnn_backward
  const T* h0;      // [B, H] or null
  const T* c0;
  int64_t output_stride;  // between the rows of output and of its gradient
  RnnMasks<T> masks;      // of this recurrence alone
  RnnNorm<T> norm;
  void* scratch;  // rnn_scratch or rnn_backward_scratch bytes
  Team* team;     // or null
  int64_t place;
};

template <typename T>
struct RnnTimeLoop : RnnLoop<T> {
  int64_t input_size;
  const T* input;  // [N, I] rows `input_stride` apart
  int64_t input_stride;
  const RnnWeights<T>* weights;  // to be packed by the time loop into `panels_here`; or null: they are packed
  T* panels_here;                // the memory that `panels` points to, if the time loop packs
  T* output;                     // [N, ...] or null
  T* h_n;                        // [B, H]
  T* c_n;                        // [B, H]
  T* gates;                      // [N, K*H] or null: K numbers of a unit are kept for the backward pass
  Accum<T>* cells;               // [N, H] or null
  const T* head_panels;          // from pack_heads, or null
  int64_t head_width;
  Accum<T>* partial;  // [N, head_width] this recurrence's part of the logits
  T* mean;            // [B, ...] rows `pooled_stride` apart, or null
  T* max;
  int64_t pooled_stride;
};

template <typename T>
struct RnnBackwardTimeLoop : RnnLoop<T> {
  const T* output;
  const T* gates;
  const Accum<T>* cells;
  const T* grad_output;
  const T* grad_h_n;
  const T* grad_c_n;
  T* grad_gates;
  T* grad_h0;
  T* grad_c0;
};

// One worker's part of the gradients of a recurrence's weights: of some of the gates' gradients.
template <typename T>
struct RnnWeightGradient {
  Cell cell;
  const int64_t* starts;
  int64_t steps;
  int64_t tokens;
  bool reverse;
  int64_t input_size;
  int64_t hidden_size;
  int64_t first_column;  // of grad_gates
  int64_t last_column;
  const T* grad_gates;  // [N, D*H]: D gradients of a unit's gates
  const T* input;       // [N, I] rows `input_stride` apart
  int64_t input_stride;
  const T* h0;       // [B, H] or null
  const T* dropout;  // [B, H] or null
  const T* output;   // [N, ...] rows `output_stride` apart
  int64_t output_stride;
  T* w_ih;  // [gates * H, I] or null
  T* w_hh;  // [gates * H, H] or null
  T* bias;  // [D*H] or null
  void* scratch;
};

// One worker's part of a recurrence's share in the gradient of the input: some sequences and steps.
template <typename T>
struct RnnInputGradient {
  Cell cell;
  const int64_t* starts;
  int64_t first_step;
  int64_t last_step;
  int64_t first_row;
  int64_t last_row;
  int64_t input_size;
  int64_t hidden_size;
  const T* grad_gates;  // [N, D*H]
  const T* panels;      // from pack_rnn_input_gradient; none of a normalised cell
  Accum<T>* part;       // [N, I] this recurrence's share, to be added to others'; or null:
  T* result;            // [N, I] rows `result_stride` apart, all of the gradient
  int64_t result_stride;
};

// One worker's part of a conditional random field's forward or backward pass: sequences [first_row, last_row).
template <typename T>
struct CrfTimeLoop {
  CrfChain<T> chain;
  const int64_t* starts;  // [steps + 1] the first token of each step
  int64_t first_row;
  int64_t last_row;
  const double* panels;     // exp(transitions - transition_shift), for the backward pass transposed
  double transition_shift;  // the largest transition
  const double* end;        // [C] exp(end - end_shift)
  double end_shift;
  double* alphas;         // [N, C]
  double* scales;         // [N]
  unsigned char* lossy;   // [B] whether a probability got or may get lost
  double* log_partition;  // [B] forward
  double* products;       // [B] forward: of scales whose logarithm is not in log_partition yet
  const T* grad_result;   // [B] backward
  double* marginals;      // [N, C] backward
  double* factors;        // [N, C] backward
  double* scratch;        // [(rows + 1) * C]
  const double** rows;    // [rows]
};

// The gradient of exp(transitions), to is the row: result [C, C] = sum_n factors_n^T previous_n.
struct CrfTransitions {
  int64_t tokens;
  int64_t classes;
  const double* factors;          // [N, C]
  const double* const* previous;  // [N] rows of C
  double* result;
};

// Forward time loops over panels of one scheme.
template <typename T>
struct RnnForwardFor {
  PanelScheme scheme;
  int64_t lanes;                                                               // numbers in a vector
  int64_t (*panels_size)(Cell cell, int64_t input_size, int64_t hidden_size);  // elements, one recurrence
  size_t (*scratch)(const RnnTimeLoop<T>& loop);
  void (*time_loop)(const RnnTimeLoop<T>& loop);
};

// Those over weights in fewer bits.
struct NarrowRnn {
  RnnForwardFor<float> forward;
  void (*pack)(Cell cell, const NarrowWeights& weights, int64_t input_size, int64_t hidden_size, float* panels);
};

// What is there for bfloat16 too.
template <typename T>
struct LayersFor {
  RnnForwardFor<T> rnn_forward;
  // The panels of one of `parts` equal parts of the hidden units.
  void (*pack_rnn)(Cell cell, const RnnWeights<T>& weights, int64_t input_size, int64_t hidden_size, int64_t part,
                   int64_t parts, T* panels);

  int64_t (*rnn_backward_panels_size)(Cell cell, int64_t hidden_size);
  void (*pack_rnn_backward)(Cell cell, const T* w_hh, int64_t hidden_size, int64_t part, int64_t parts, T* panels);
  size_t (*rnn_backward_scratch)(const RnnBackwardTimeLoop<T>& loop);
  void (*rnn_backward_time_loop)(const RnnBackwardTimeLoop<T>& loop);

  size_t (*rnn_weight_gradient_scratch)(const RnnWeightGradient<T>& args);
  void (*rnn_weight_gradient)(const RnnWeightGradient<T>& args);
  int64_t (*rnn_input_gradient_panels_size)(Cell cell, int64_t input_size, int64_t hidden_size);
  void (*pack_rnn_input_gradient)(Cell cell, const T* w_ih, int64_t input_size, int64_t hidden_size, int64_t part,
                                  int64_t parts, T* panels);
  void (*rnn_input_gradient)(const RnnInputGradient<T>& args);

  int64_t (*heads_panels_size)(int64_t depth, int64_t width);  // elements, one part
  void (*pack_heads)(const T* weight, int64_t stride, int64_t depth, int64_t width, T* panels);
  // stride: of the output's rows.
  void (*heads_rows)(const Heads<T>& args, const T* panels, int64_t first, int64_t last, int64_t stride);
  // Rows [first, last) of grad_input; panels: W from pack_heads_backward.
  void (*pack_heads_backward)(const T* weight, int64_t features, int64_t width, T* panels);
  void (*heads_input_gradient)(const HeadsBackward<T>& args, const T* panels, int64_t first, int64_t last);
  // Rows [first, last) of grad_weight and of grad_bias.
  size_t (*heads_weight_gradient_scratch)(const HeadsBackward<T>& args, int64_t first, int64_t last);
  void (*heads_weight_gradient)(const HeadsBackward<T>& args, int64_t first, int64_t last, void* scratch);
  // output = ((partial[0] + partial[1]) + ...) + bias over rows [first, last); partials `stride` apart, rows of output
  // `output_stride`
  void (*sum_parts)(const Accum<T>* partial, int64_t stride, int64_t parts, const T* bias, int64_t width, int64_t first,
                    int64_t last, T* output, int64_t output_stride);

  int64_t (*multiply_adds)(int64_t rounds, Accum<T>* sink);
};

template <typename T>
struct KernelsFor {
  void (*drop)(const T* input, const uint16_t* bits, int64_t count, int32_t drop, T scale, T* output);
  // Words [first, last).
  void (*char_cnn_words)(const CharCnn<T>& args, int64_t first, int64_t last);
  void (*pool_rows)(const Pool<T>& args, const int64_t* starts, int64_t first, int64_t last);
  void (*attention_pool_row)(const AttentionPool<T>& args, const int64_t* starts, int64_t row);
  void (*attention_pool_gradient)(const AttentionPoolBackward<T>& args, const int64_t* starts, int64_t row);
  // One query, and one sequence with the `count` queries that read it; `scores` [steps] is scratch, and `grad_score`
  // [D] this sequence's share, or null.
  void (*attention_query)(const AttentionForward<T>& args, const int64_t* starts, int64_t query);
  void (*attention_gradient)(const AttentionBackward<T>& args, const int64_t* starts, int64_t row,
                             const int64_t* queries, int64_t count, T* scores, T* grad_score);
  // Returns the loss summed over rows [first, last), before normalisation; writes their gradients times `scale`.
  double (*loss_rows)(const LossTask<T>& task, double scale, int64_t first, int64_t last);

  // factors = exp(scores - the largest), which is returned; sets *lossy where they are too far apart.
  double (*crf_factors)(const T* scores, int64_t count, double* factors, bool* lossy);
  void (*crf_forward_time_loop)(const CrfTimeLoop<T>& loop);
  void (*crf_backward_time_loop)(const CrfTimeLoop<T>& loop);
  void (*crf_transition_gradient)(const CrfTransitions& args, int64_t first, int64_t last, void* scratch);
  size_t (*crf_transition_gradient_scratch)(int64_t tokens, int64_t classes, int64_t columns);
  void (*crf_best_step)(const CrfChain<T>& chain, const T* before, const T* emissions, T* scores, int32_t* best);

  void (*read_all)(const T* from, int64_t count, T* sink);

  void (*exponential)(const T* x, T* y, int64_t count);
  void (*sigmoid)(const T* x, T* y, int64_t count);
  void (*hyperbolic_tangent)(const T* x, T* y, int64_t count);
};

struct Kernels {
  KernelsFor<float> f32;
  KernelsFor<double> f64;
  LayersFor<float> layers_f32;
  LayersFor<double> layers_f64;
  NarrowRnn bfloat16_weights;

  template <typename T>
  const KernelsFor<T>& of() const;
};

template <>
inline const KernelsFor<float>& Kernels::of<float>() const {
  return f32;
}
template <>
inline const KernelsFor<double>& Kernels::of<double>() const {
  return f64;
}

// Of the instruction set in use.
const Kernels& active_kernels();
template <typename T>
const LayersFor<T>& active_layers();
const NarrowRnn& active_narrow_rnn(WeightFormat format);

}  // namespace pymtl
