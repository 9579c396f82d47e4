// One caller's use of a program: its batches, and their answers until the next one.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "generation.h"
#include "program.h"

namespace pymtl::runtime {

// What a batch has of one input, of the tokens of all its sequences one after the other: strings, or ids, or numbers.
struct Field {
  size_t input;
  const char* const* strings = nullptr;  // [N] UTF-8, each with a zero behind it
  const int64_t* ids = nullptr;          // [N], or [N, width] of characters, 0 behind a word's end
  const float* numbers = nullptr;        // [N, width]
  int64_t width = 1;
};

// For a call on this very thread and, where there is use for them, on helpers of it.
Executor executor_of(int64_t threads);

class Session {
 public:
  // keeps_state: one sequence, whose tokens come in several calls.
  // Throws Error (Fault::argument): no task's answers follow from the tokens so far.
  Session(const Program& program, int64_t threads, size_t memory_limit, bool keeps_state);

  // Runs a batch. `lengths` [batch] are those of its sequences; `tasks` those wanted, or none for all. by_steps:
  // answers that are generated are left to steps.
  //
  // Throws Error: something does not fit. What was asked for before is lost all the same.
  void run(const int64_t* lengths, int64_t batch, const std::vector<Field>& fields, const std::vector<size_t>& tasks,
           bool with_probabilities, bool by_steps);

  // A step of hypotheses of a task's answers to the last batch: see Generation.
  //
  // Throws Error (Fault::argument): it was not asked for this task, or its answers are not generated.
  Generation& generation(size_t task);

  void forget_answers();

  bool keeps_state() const { return frame_.keeps_state; }

  // Forgets the sequence.
  void reset();
  std::vector<float>& state() { return frame_.state; }

  // Of the last batch; throw Error (Fault::argument) if it was not asked for this task, or has no answers of it.
  const Answer& answer(size_t task) const;
  const std::vector<float>& logits(size_t task) const;  // [N, C] or [B, C] in the caller's order

  const Program& program() const { return program_; }

 private:
  void arrange(const int64_t* lengths, int64_t batch);
  void read_fields(const std::vector<Field>& fields);
  bool is_needed(size_t input) const;
  void check_strings(const Field& field) const;
  void read_ids(const Field& field);
  void read_characters(const Field& field);
  void read_numbers(const Field& field);
  void find_words();
  void check_answered(size_t task) const;
  std::string place_of(int64_t token) const;
  void collect(size_t task, bool with_probabilities, bool by_steps);

  const Program& program_;
  int64_t threads_;
  size_t memory_limit_;
  Frame frame_;
  std::vector<float> kept_state_;         // before the call
  std::vector<std::vector<bool>> needs_;  // of each task, which instructions; empty if a stream has no answers of it
  std::vector<bool> needed_;
  std::vector<int64_t> starts_;         // [B + 1] the first token of each of the caller's sequences
  std::vector<int64_t> sequence_;       // [B] the caller's place of each packed sequence
  std::vector<int64_t> places_;         // [B] the packed place of each of the caller's
  std::vector<int64_t> token_;          // [N] the caller's place of each packed token
  std::vector<int64_t> order_;          // [N] the packed tokens in the order of their words
  std::vector<int64_t> first_;          // of each distinct word, its first packed token
  std::vector<int64_t> spelled_;        // [N, W] of the caller's tokens
  std::vector<const Field*> by_input_;  // of this batch
  std::vector<bool> wanted_;            // which tasks it was asked for
  std::vector<bool> has_answers_;       // which it has answered
  bool by_steps_ = false;               // but for those that are generated
  std::vector<Answer> answers_;
  std::vector<std::vector<float>> logits_;
  std::vector<std::unique_ptr<Generation>> generations_;  // of each task, null if its answers are not generated
};

}  // namespace pymtl::runtime
