// A model's program, ready to run: read from its file and packed for this machine.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "decoding.h"
#include "file.h"
#include "routine.h"
#include "step.h"
#include "vocabulary.h"

namespace pymtl::runtime {

struct Task {
  std::string name;
  std::vector<int64_t> reads;  // buffers: its logits; of generated answers, what a step reads
  Space space;                 // of its logits
  int64_t width;               // C
  Decoder decoder;
  std::vector<std::string> labels;  // names of the ids; empty if they have none
  std::unique_ptr<Step> step;       // of generated answers, else null
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

  const Routine& routine() const { return routine_; }
  const std::vector<Input>& inputs() const { return routine_.loader().inputs; }
  const Names& names(size_t input) const { return names_[input]; }
  const std::vector<Task>& tasks() const { return tasks_; }
  bool reads_characters() const { return routine_.loader().has_characters; }  // as sequences
  bool reads_spelling() const { return routine_.loader().has_spelling; }
  int64_t state_size() const { return routine_.loader().state_size; }
  const std::string& description() const { return description_; }  // JSON

 private:
  void read(const Json& json);
  void read_inputs(const Json& json);
  void read_tasks(const Json& json);
  Task read_task(const Json& json);

  File file_;
  size_t left_;  // bytes that the model may take besides the file
  Routine routine_;
  std::vector<Names> names_;
  std::vector<Task> tasks_;
  std::string description_;
};

}  // namespace pymtl::runtime
