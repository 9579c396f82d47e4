// Copies of whole rows between layouts, on a GPU: padded batches and packed tokens (see kernels/packing.h), and h
// before each token. Pointers are to memory of the current device, all work goes to `stream`, nothing waits for it.
// Lengths are read on the device, so the rows of `packed` may be more than there are tokens.
#pragma once

#include <cstdint>

namespace pymtl::cuda {

struct Packing {
  int64_t steps;                  // T
  int64_t batch;                  // B
  int64_t tokens;                 // N: rows of `packed`
  const int64_t* batch_sizes;     // [T], B >= batch_sizes[0] >= batch_sizes[1] >= ... >= 0
  const int64_t* ends;            // [T] sums of batch_sizes up to and with each step
  const int64_t* sorted_indices;  // [B] the padded row of each packed sequence, or null: its own number
  int64_t row_bytes;
  int64_t sequence_stride;  // bytes from a padded sequence to the next
  int64_t step_stride;      // bytes from a padded token to the next of its sequence
};

// packed [N, row]; rows behind the last token become zeros.
void pack(const Packing& packing, const void* padded, void* packed, void* stream);
// padded, with zeros where no sequence has a token.
void unpack(const Packing& packing, const void* packed, void* padded, void* stream);

// h before each token of G recurrences.
struct StatesBefore {
  int64_t recurrences;         // G
  int64_t steps;               // T
  int64_t batch;               // B
  int64_t tokens;              // N
  int64_t row_bytes;           // of H numbers
  const int64_t* batch_sizes;  // [T] or null: all B
  const int64_t* ends;         // [T] or null with batch_sizes
  const char* reverse;         // [G], on the host: whether a recurrence runs from the last token to the first
  const void* output;          // [N, G, row] h of every token
  const void* h0;              // [G, B, row] or null: zeros
  void* before;                // [N, G, row]; rows behind the last token become zeros
};
void rnn_states_before(const StatesBefore& args, void* stream);

// Whether what goes to the stream is recorded into a CUDA graph.
bool is_recorded(void* stream);

}  // namespace pymtl::cuda
