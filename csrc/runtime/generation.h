// Generated answers to a batch: a step of some hypotheses at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "decoding.h"
#include "frame.h"
#include "step.h"

namespace pymtl::runtime {

class Generation {
 public:
  Generation(const Step& step, size_t memory_limit);

  // A batch that the program has run, whose frame stays until the next one. places: [B] the packed place of each of the
  // caller's sequences.
  void begin(const Frame& batch, const int64_t* places);

  // Hypotheses read an id each. They go on from hypotheses of the step before, `parents` [count], or where that is null
  // begin with the sequences of the batch, `sequences` [count].
  //
  // Throws Error: a number is none of these (Fault::argument), or it takes too much memory (Fault::memory). The step
  // before stays the last one then.
  void step(int64_t count, const int64_t* ids, const int64_t* parents, const int64_t* sequences);

  // Of the last step; throw Error (Fault::argument) if there is none.
  const float* logits() const;     // [count, columns]
  const float* attention() const;  // [count, T] averaged over the heads, or null if nothing is attended to

  int64_t steps() const { return frame_.attended.rows->steps(); }  // T, of the longest sequence
  int64_t columns() const { return columns_; }  // C, or more where the batch has further tokens to copy

  // Every sequence's answer, by the likeliest id at each step.
  void find_likeliest(const Decoder& decoder, bool with_probabilities, Answer& answer);

 private:
  int64_t batch() const { return frame_.attended.rows->batch; }
  const float* first_state(int64_t sequence) const { return first_states_ + places_[sequence] * state_size_; }
  void mix_copies();

  const Step& step_;
  size_t memory_limit_;
  int64_t state_size_;
  Frame frame_;  // whose tokens are the hypotheses
  const float* first_states_ = nullptr;
  const int64_t* places_ = nullptr;
  const int64_t* sources_ = nullptr;  // [N] of the packed tokens, where they are copied
  int64_t columns_ = 0;
  std::vector<int64_t> own_columns_;  // [B] of each packed sequence: those behind are of other sequences' tokens
  int64_t count_ = 0;                 // hypotheses of the last step, 0 before the first
  std::vector<int64_t> sequences_, next_sequences_;
  std::vector<float> states_;  // after the last step
  std::vector<float> attention_;
  std::vector<float> mixed_;  // [count, columns] where tokens are copied

  // Of find_likeliest.
  struct Found {
    std::vector<int64_t> ids;
    std::vector<float> probabilities;
    double probability;
  };
  std::vector<Found> found_;  // of each sequence
  std::vector<int64_t> live_, ids_, parents_;
};

}  // namespace pymtl::runtime
