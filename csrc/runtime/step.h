// One step of a task whose answers are generated: what it reads of the program, and what comes of it.
#pragma once

#include <cstdint>
#include <vector>

#include "routine.h"

namespace pymtl::runtime {

class Step {
 public:
  // Throws Error (Fault::file): the description does not fit the program.
  Step(const Json& json, const Loader& program, size_t& left);

  // Buffers of the program that have to be there: those of states and memories.
  std::vector<int64_t> reads() const;

  Routine routine;
  int64_t state;                  // a buffer of the program: of each sequence the recurrences' first states
  std::vector<int64_t> memories;  // the same, of tokens: what instructions attend to
  int64_t logits;                 // a buffer of the routine
  int64_t width;                  // C
  std::vector<bool> needs;        // which instructions
};

}  // namespace pymtl::runtime
