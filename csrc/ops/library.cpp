// The schemas of all ops. N tokens, T steps, B sequences, I input size, H hidden size, G recurrences.
//
// A recurrent layer's input is either [T, B, I] with no batch_sizes (a dense batch) or packed [N, I] with batch_sizes
// [T]; its output has the same rank. Its mode is torch.nn.RNNBase's: LSTM, GRU, RNN_TANH or RNN_RELU. A result nobody
// asked for, and c of what is no LSTM, is an empty tensor.
//
// dropout: recurrent dropout's factors [G, B, H]. zoneout_h, zoneout_c: zoneout's, of the output's size or [G*H].
// Without weight_ih the cells are layer-normalised, the input is [T, B, G*gates*H] (packed [N, ...]), projected and
// normalised already, and norm, else None, holds G tensors [gates*H], gains of the products with weight_hh; of an LSTM
// G more [H], gains of c, and G more or none [H], its biases.
//
// allow_tf32: of float32 on a GPU, whether products may round their operands to TF32.
//
// A list that may be missing is optional where a program compiled ahead of time calls the op: AOTInductor passes no
// empty lists.
#include "tensors.h"

#define RNN_ARGUMENTS                                                                                         \
  "Tensor input, Tensor? batch_sizes, Tensor[]? weight_ih, Tensor[] weight_hh, Tensor[]? bias_ih, "           \
  "Tensor[]? bias_hh, bool[] reverse, str mode, Tensor? h0, Tensor? c0, Tensor? dropout, Tensor? zoneout_h, " \
  "Tensor? zoneout_c, Tensor[]? norm, bool allow_tf32"

STABLE_TORCH_LIBRARY(pymtl, m) {
  m.def("rnn_inference(" RNN_ARGUMENTS ", Tensor? prepacked) -> (Tensor output, Tensor h_n, Tensor c_n)");
  m.def("rnn_training(" RNN_ARGUMENTS ") -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  // needs: gradients wanted of [input, weight_ih, weight_hh, biases, h0 and c0]. The gradients of b_ih and
  // b_hh are equal, grad_bias is either; but of a GRU it is [4H], of b_in, b_ir, b_iz and b_hn. Of normalised cells
  // there follow gates*H numbers to be ignored, the gradient of the gain, and of an LSTM those of c's gain and bias.
  m.def("rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, " RNN_ARGUMENTS
        ", Tensor output, Tensor gates, Tensor cells, bool[] needs) "
        "-> (Tensor grad_input, Tensor[] grad_weight_ih, Tensor[] grad_weight_hh, Tensor[] grad_bias, "
        "Tensor grad_h0, Tensor grad_c0)");
  m.def(
      "rnn_heads(Tensor input, Tensor? batch_sizes, Tensor[]? weight_ih, Tensor[] weight_hh, "
      "Tensor[]? bias_ih, Tensor[]? bias_hh, bool[] reverse, str mode, Tensor? h0, Tensor? c0, Tensor? prepacked, "
      "Tensor? head_weight, Tensor? head_bias, bool mean, bool max) "
      "-> (Tensor logits, Tensor mean, Tensor max, Tensor h_n, Tensor c_n)");
  // All layers at once, from their prepacked weights one behind the other: h0, c0, h_n and c_n are [layers * G, B, H].
  // layers: "LSTM 128 2 fr" of two layers with H = 128, of which each has a forward and a reverse recurrence. One
  // tensor and one string cost half of what lists would, and a short call notices.
  m.def(
      "rnn_frozen(Tensor input, Tensor? batch_sizes, Tensor prepacked, str layers, Tensor? h0, Tensor? c0) "
      "-> (Tensor output, Tensor h_n, Tensor c_n)");
  // The same from weights that were packed from `parameters`: refused where these do not have the versions and the
  // addresses in `origin`, int64. Implemented in Python, which alone knows versions.
  m.def(
      "rnn_frozen_of(Tensor input, Tensor? batch_sizes, Tensor prepacked, str layers, Tensor? h0, Tensor? c0, "
      "Tensor[] parameters, Tensor origin) -> (Tensor output, Tensor h_n, Tensor c_n)");
  m.def(
      "rnn_prepack(Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, Tensor[] bias_hh, bool[] reverse, "
      "str mode, Tensor[]? norm) -> Tensor");
  // Of weights in bfloat16, or in int8 with a scale for each row, for an input of float32. Without weight_ih the cells
  // are layer-normalised.
  m.def(
      "rnn_prepack_narrow(Tensor[]? weight_ih, Tensor[] weight_hh, Tensor[]? scale_ih, Tensor[]? scale_hh, "
      "Tensor[]? bias_ih, Tensor[]? bias_hh, str mode) -> Tensor");
  // Of a GPU: the largest H of which one kernel holds all weights, of the dtype and on the device of `like`.
  m.def("rnn_hidden_size_limit(Tensor like) -> int");
  // For benchmarks, on the device of `like`: the ways there are to share out an LSTM among blocks, a line each, the one
  // that calls take marked with *; and the one that calls have to take from now on, or any with "".
  m.def("rnn_choices(Tensor like, int recurrences, int batch, int hidden_size, bool allow_tf32, bool backward) -> str");
  m.def("rnn_force_choice(Tensor like, str name) -> ()");
  // For benchmarks: a cluster of thread blocks that only exchanges, on the device of `like`.
  m.def("cluster_rounds(Tensor like, int blocks, int rounds, bool messages) -> ()");

  m.def("heads(Tensor input, Tensor weight, Tensor? bias, int parts) -> Tensor");
  // needs: gradients wanted of [input, weight, bias].
  m.def(
      "heads_backward(Tensor grad_output, Tensor input, Tensor weight, bool[] needs) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  // Results: [B] log p(tags), or log Z without tags; what the backward pass needs, float64 [N, C] and [N].
  m.def(
      "crf(Tensor emissions, Tensor batch_sizes, Tensor? tags, Tensor start, Tensor end, Tensor transitions) "
      "-> (Tensor result, Tensor alphas, Tensor scales)");
  m.def(
      "crf_backward(Tensor grad, Tensor emissions, Tensor batch_sizes, Tensor? tags, Tensor start, Tensor end, "
      "Tensor transitions, Tensor alphas, Tensor scales) "
      "-> (Tensor grad_emissions, Tensor grad_start, Tensor grad_end, Tensor grad_transitions)");
  m.def(
      "crf_decode(Tensor emissions, Tensor batch_sizes, Tensor start, Tensor end, Tensor transitions) "
      "-> (Tensor tags, Tensor scores)");

  // bits: int64, 16 random bits for each element of the input.
  m.def("dropout(Tensor input, Tensor bits, float p) -> Tensor");

  // words: int64 [N, W], ids below the table's rows, 0 is no character. table [C, S]: for each width F numbers for each
  // place in its window. places: int64 [N, D*F] of the maxima, empty unless asked for.
  m.def("char_cnn(Tensor words, Tensor table, int[] widths, bool places) -> (Tensor output, Tensor places)");
  m.def(
      "char_cnn_backward(Tensor grad_output, Tensor words, Tensor places, int[] widths, SymInt characters) -> Tensor");

  m.def("pool(Tensor input, Tensor? batch_sizes, bool[] reverse, str kind) -> (Tensor output, Tensor argmax)");
  m.def("pool_backward(Tensor grad_output, Tensor? batch_sizes, Tensor argmax, SymInt[] size, str kind) -> Tensor");

  // scores [N, J]: of each head's slice of the features.
  m.def("attention_pool(Tensor input, Tensor scores, Tensor batch_sizes) -> Tensor");
  m.def(
      "attention_pool_backward(Tensor grad_output, Tensor input, Tensor scores, Tensor batch_sizes) "
      "-> (Tensor grad_input, Tensor grad_scores)");

  // sequences [M]: of each query, its place in the packed order. score [D] of additive scores; weights [M, heads,
  // steps].
  m.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor sequences, Tensor batch_sizes, int heads, Tensor? score) "
      "-> (Tensor context, Tensor weights)");
  m.def(
      "attend_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor key, Tensor value, "
      "Tensor sequences, Tensor batch_sizes, int heads, Tensor? score, Tensor weights) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_score)");

  // bad_rows [K]: each task's first row whose class is out of range, or -1; on the CPU that is an error instead.
  m.def(
      "joint_loss(Tensor[] logits, Tensor[] targets, str[] kinds, Tensor[] weights, int[] ignore_index, "
      "float[] label_smoothing, bool gradients) -> (Tensor losses, Tensor[] grad_logits, Tensor bad_rows)");

  m.def(
      "packing_order(Tensor lengths, SymInt steps) "
      "-> (Tensor batch_sizes, Tensor sorted_indices, Tensor unsorted_indices)");
  // resets: bool [B, T] or [T, B]; tokens [N]: places in it, flattened; S segments.
  m.def(
      "segment_order(Tensor resets, Tensor? lengths, bool batch_first) "
      "-> (Tensor batch_sizes, Tensor tokens, Tensor first, Tensor last, Tensor sequences)");
  m.def("pack(Tensor padded, Tensor batch_sizes, Tensor? sorted_indices, bool batch_first) -> Tensor");
  m.def("unpack(Tensor packed, Tensor batch_sizes, Tensor? sorted_indices, bool batch_first) -> Tensor");
}
