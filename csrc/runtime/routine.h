// A flat list of instructions over named buffers, and a place in memory for each buffer.
#pragma once

#include <cstdint>
#include <vector>

#include "file.h"
#include "instruction.h"

namespace pymtl::runtime {

class Routine {
 public:
  // left: bytes that the model may still take besides its file, of all its routines together.
  Routine(const File& file, size_t& left) : loader_(file, left) {}

  // Inputs, and the buffers so far.
  Loader& loader() { return loader_; }
  const Loader& loader() const { return loader_; }

  // Reads the instructions of a description. Throws Error (Fault::file): one does not fit.
  void read(const Json& json);

  // Ends the reading. `kept`: buffers that are read after a run.
  void finish(const std::vector<int64_t>& kept);

  // Packs weights for the machine.
  void prepare(const Executor& executor);

  // Which instructions are needed for some of the kept buffers: a flag for each.
  std::vector<bool> needs(const std::vector<int64_t>& buffers) const;
  size_t instruction_count() const { return instructions_.size(); }

  // Whether what a buffer holds of a token depends on no later token.
  bool in_one_pass(int64_t buffer) const { return in_one_pass_[buffer]; }

  // Gives the buffers their places in the frame's memory, for the rows that it has. Throws Error (Fault::memory): they
  // take more than `limit` bytes.
  void place_buffers(Frame& frame, size_t limit) const;

  // Runs the instructions that are needed.
  void run(Frame& frame, const std::vector<bool>& needed) const;

 private:
  // Memory that buffers of one space have one after the other.
  struct Slot {
    Space space;
    int64_t width;
  };

  void fuse(const std::vector<bool>& kept);
  void plan(const std::vector<int64_t>& kept);

  Loader loader_;
  std::vector<InstructionPtr> instructions_;
  std::vector<bool> in_one_pass_;  // of each buffer
  std::vector<Slot> slots_;
  std::vector<int64_t> slot_of_;  // of each buffer; -1 of one that is not written
};

}  // namespace pymtl::runtime
