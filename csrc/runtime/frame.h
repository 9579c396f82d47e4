// What a run of a program works on: the rows of a batch, and memory for what the instructions compute.
//
// A program's buffers are matrices, a row for each element of their space. In the spaces of tokens and characters the
// rows are in the packed order (see kernels/rnn.h): of sequences, and of the batch's distinct words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#include "error.h"
#include "kernels/executor.h"

namespace pymtl::runtime {

enum class Space { characters, tokens, sequences };

// The packed rows of a space: a step holds the first batch_sizes[t] sequences.
struct PackedRows {
  int64_t count = 0;
  int64_t batch = 0;
  std::vector<int64_t> batch_sizes;
  std::vector<int64_t> starts;  // [steps] of tokens, the first row of each step

  int64_t steps() const { return static_cast<int64_t>(batch_sizes.size()); }
};

// Memory that grows, and stays for the next call.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(memory_); }

  void* get() const { return memory_; }

  // At least so many bytes on a cache line of their own; what was in them is lost.
  //
  // Throws Error (Fault::memory): they are more than the limit.
  void* of(size_t bytes) {
    if (bytes > size_) {
      check(bytes <= limit, Fault::memory, "expected a batch that fits into ", limit,
            " bytes, the limit of memory, got ", "one that takes ", bytes, ": split it");
      std::free(memory_);
      size_ = 0;
      memory_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_;
  }

  size_t limit = std::numeric_limits<size_t>::max();

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// The characters of a batch's tokens, as far as the program reads them.
struct Characters {
  int64_t length = 0;           // W, of the longest word
  std::vector<int64_t> ids;     // [N, W] of the packed tokens, 0 behind a word's end
  PackedRows words;             // the distinct words, each a sequence of its characters
  std::vector<int64_t> packed;  // [count] ids of their characters
  std::vector<int64_t> word;    // [N] the packed place of each token's word
};

// What the hypotheses of generated answers, which are a frame's tokens, attend to.
struct Attended {
  const PackedRows* rows = nullptr;    // of the sequences
  std::vector<const float*> memories;  // [N, F] each
  std::vector<int64_t> places;         // [M] of each hypothesis, the packed place of its sequence
  Memory weights;                      // [M, J, T] float: of each head how much each has read of each token
  int64_t heads = 0;                   // J; 0 if no instruction that was run attends
};

struct Frame {
  PackedRows tokens;
  Characters characters;
  std::vector<std::vector<int64_t>> ids;  // of each input of ids, [N] of the packed tokens
  std::vector<float*> places;             // of each piece of memory that buffers have in turn
  std::vector<float*> buffers;            // of each buffer
  std::vector<float> state;               // [B, S] of all recurrences, h and c, where they are kept between calls
  bool keeps_state = false;
  Attended attended;
  Executor executor{serially, 1};
  Memory memory;   // of the buffers
  Memory scratch;  // of one instruction

  int64_t rows(Space space) const {
    return space == Space::tokens ? tokens.count : space == Space::sequences ? tokens.batch : characters.words.count;
  }
  // The rows that a space's sequences consist of.
  const PackedRows& packed(Space space) const { return space == Space::characters ? characters.words : tokens; }
};

}  // namespace pymtl::runtime
