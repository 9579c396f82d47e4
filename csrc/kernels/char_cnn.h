// Words as their characters under convolutions of several widths: the maximum of each filter over the word (Ma & Hovy
// 2016, "End-to-end Sequence Labeling via Bi-directional LSTM-CNNs-CRF", section 2.1; Collobert et al. 2011, "Natural
// Language Processing (Almost) from Scratch", section 3.2.2).
//
// A convolution is linear in the characters' embeddings, and a batch has few different characters. So the caller
// multiplies each character's embedding with all weights once, the table; a filter's value at a place of a word is the
// sum of its window's table entries.
//
// N words of up to W characters, C characters, F filters of each of D widths, S = F * (sum of the widths).
#pragma once

#include <cstddef>
#include <cstdint>

#include "executor.h"

namespace pymtl {

struct CharCnnShape {
  int64_t words;          // N
  int64_t length;         // W
  int64_t characters;     // C
  int64_t filters;        // F
  const int64_t* widths;  // [D] odd
  int64_t count;          // D
  int64_t features;       // D*F
  int64_t row;            // S
  const int64_t* ids;     // [N, W] below C; 0 is no character: a word has as many as are not 0, but at least one
};

template <typename T>
struct CharCnn {
  CharCnnShape shape;
  const T* table;   // [C, S]: for each width, for each place in its window, F numbers
  T* output;        // [N, D*F]
  int64_t* places;  // [N, D*F] the place in the word that the maximum is from, or null
};

template <typename T>
void char_cnn_forward(const CharCnn<T>& args, const Executor& executor);

template <typename T>
struct CharCnnBackward {
  CharCnnShape shape;
  const T* grad_output;   // [N, D*F]
  const int64_t* places;  // [N, D*F]
  T* grad_table;          // [C, S]
};

// Bytes of workspace, 64-byte aligned.
template <typename T>
size_t char_cnn_backward_workspace(const CharCnnBackward<T>& args);

template <typename T>
void char_cnn_backward(const CharCnnBackward<T>& args, void* workspace, const Executor& executor);

}  // namespace pymtl
