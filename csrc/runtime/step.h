// One step of a task whose answers are generated: what it reads of the program, and what comes of it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "routine.h"

namespace pymtl::runtime {

class Step {
 public:
  // Throws Error (Fault::file): the description does not fit the program.
  Step(const Json& json, Loader& program, size_t& left);

  // Buffers of the program that have to be there: those of states and memories.
  std::vector<int64_t> reads() const;

  // How the sequences' tokens are copied into answers.
  struct Copies {
    int64_t sources;  // an input of the program: what each token is among the ids, C or above if none of the step's
    int64_t gate;     // a buffer of the routine: the logit of writing an id of the step's own
    int64_t unknown;  // the id that is read in the place of one that is none of the step's
  };

  Routine routine;
  int64_t state;                  // a buffer of the program: of each sequence the recurrences' first states
  std::vector<int64_t> memories;  // the same, of tokens: what instructions attend to
  int64_t logits;                 // a buffer of the routine
  int64_t width;                  // C
  std::optional<Copies> copies;
  std::vector<bool> needs;  // which instructions
};

}  // namespace pymtl::runtime
