// From a task's logits to its answer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "file.h"
#include "frame.h"
#include "json.h"

namespace pymtl::runtime {

// What a task says of each sequence.
struct Answer {
  std::vector<int64_t> ids;          // of all sequences, one after the other
  std::vector<int64_t> starts;       // [B + 1] where each sequence's begin
  std::vector<double> numbers;       // [B, C] of a task of numbers
  std::vector<double> probability;   // [B] of the whole answer; NaN if that was not asked or is not known
  std::vector<float> probabilities;  // of each id of a token or a generated answer, where that was asked
};

// The largest number's place, and its part of the softmax of all.
struct Likeliest {
  int64_t id;
  double probability;
};

Likeliest likeliest(const float* z, int64_t count);

// Logits in the packed order, and what they are of.
struct Decoded {
  const float* logits;
  const PackedRows& rows;
  const int64_t* sequence;  // [B] the place among the caller's sequences of each packed one
  const int64_t* place;     // [B] the packed place of each of the caller's
  const int64_t* start;     // [B + 1] the first token of each of the caller's sequences
  bool with_probabilities;
};

class Decoder {
 public:
  enum class Kind {
    none,       // logits alone
    classes,    // the likeliest, of each row
    crf,        // the likeliest path of tags, of a sequence
    ctc,        // the likeliest path without repeats and blanks, class 0
    ordinal,    // how many thresholds are passed
    labels,     // all that are likelier than not
    numbers,    // of a mean and a standard deviation each
    generation  // ids one after the other, each from those before it; 0 is the end
  };

  Decoder() = default;

  // Throws Error (Fault::file): there is none that this version knows.
  static Kind kind_of(const Json& json);

  // Of logits of that space and width. Throws Error (Fault::file): it does not fit.
  Decoder(const Json& json, const File& file, Space space, int64_t width);

  Kind kind() const { return kind_; }
  int64_t ids() const;  // how many there are: of classes, tags or labels

  // Of generated answers.
  int64_t max_length() const { return max_length_; }  // ids without the end
  bool may_come(int64_t id) const { return id >= width_ || !never_[id]; }

  // The answers that follow from logits: not generated ones.
  void decode(const Decoded& given, Frame& frame, Answer& answer) const;

 private:
  void decode_classes(const Decoded& given, Answer& answer) const;
  void decode_crf(const Decoded& given, Frame& frame, Answer& answer) const;
  void decode_ctc(const Decoded& given, Frame& frame, Answer& answer) const;
  void decode_sequences(const Decoded& given, Answer& answer) const;

  Kind kind_ = Kind::none;
  Space space_ = Space::sequences;
  int64_t width_ = 0;                                                       // C
  const float *start_ = nullptr, *end_ = nullptr, *transitions_ = nullptr;  // of a CRF
  std::vector<double> mean_, std_;
  bool log_ = false;
  int64_t max_length_ = 0;
  std::vector<bool> never_;  // [C]
};

}  // namespace pymtl::runtime
