// A model's program, ready to run: read from its file and packed for this machine.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "decoding.h"
#include "file.h"
#include "instruction.h"
#include "vocabulary.h"

namespace pymtl::runtime {

struct Task {
  std::string name;
  int64_t buffer;  // of its logits
  Space space;
  int64_t width;  // C
  Decoder decoder;
  std::vector<std::string> labels;  // names of the ids; empty if they have none
  std::vector<bool> needs;          // which instructions
  bool in_one_pass;                 // whether a token's logits depend on no later token
};

// What a field's strings stand for.
struct Names {
  Vocabulary vocabulary;   // of ids: whole strings; of characters: each code point
  int64_t max_length = 0;  // of characters: how many of a string are read
  int64_t of = -1;         // of characters: the input whose strings they are
};

class Program {
 public:
  static constexpr int64_t kVersion = 1;  // of the file; a reader refuses newer ones

  // Throws Error: the file is missing, damaged, or of a newer version (Fault::file), or the model takes more memory
  // than the limit (Fault::memory).
  Program(const std::string& path, const Executor& executor, size_t memory_limit);

  const std::vector<Input>& inputs() const { return loader_.inputs; }
  const Names& names(size_t input) const { return names_[input]; }
  const std::vector<Task>& tasks() const { return tasks_; }
  bool reads_characters() const { return loader_.has_characters; }  // as sequences
  bool reads_spelling() const { return loader_.has_spelling; }
  int64_t state_size() const { return loader_.state_size; }
  const std::string& description() const { return description_; }  // JSON

  // Gives the buffers their places in the frame's memory, for the rows that it has. Throws Error (Fault::memory): they
  // take more than `limit` bytes.
  void place_buffers(Frame& frame, size_t limit) const;

  // Runs the instructions that are needed: one flag for each.
  void run(Frame& frame, const std::vector<bool>& needed) const;

  size_t instruction_count() const { return instructions_.size(); }

 private:
  // Memory that buffers of one space have one after the other.
  struct Slot {
    Space space;
    int64_t width;
  };

  void read(const Json& json);
  void read_inputs(const Json& json);
  void read_tasks(const Json& json);
  void fuse();
  void find_needs();
  void plan();

  File file_;
  Loader loader_;
  std::vector<InstructionPtr> instructions_;
  std::vector<Names> names_;
  std::vector<Task> tasks_;
  std::vector<Slot> slots_;
  std::vector<int64_t> slot_of_;  // of each buffer; -1 of one that is not written
  std::string description_;
};

}  // namespace pymtl::runtime
