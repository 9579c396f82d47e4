// From the rows of a space to one for each of its sequences: of tokens to sequences, of characters to their words.
#pragma once

#include "instruction.h"

namespace pymtl::runtime {

// "last": each part's own final state; "mean" and "max" over the sequence's rows.
class Pool final : public Instruction {
 public:
  enum class Kind { last, mean, max };

  Pool(const Json& json, Loader& loader);

  void run(Frame& frame) const override;

  Kind kind;
  Space space;  // of the input
  int64_t width;
  std::vector<bool> reverse;  // of equal parts of the columns: whether each reads from the last row to the first
};

// The rows of a frame's distinct words [D, F], to those of its tokens [N, F]. out is no part of words.
void spread_words(const Frame& frame, const float* words, int64_t width, float* out);

}  // namespace pymtl::runtime
