// Between a padded batch with lengths and the packed layout of PackedSequence (see rnn.h). Rows are
// moved as bytes, so any element type will do.
#pragma once

#include <cstdint>

#include "executor.h"

namespace pymtl {

struct Packing {
  int64_t steps;                  // T of the padded batch; batch_sizes may end in zeros
  int64_t batch;                  // B
  const int64_t* batch_sizes;     // [T]
  const int64_t* sorted_indices;  // [B] the padded row of each packed sequence, or null: in order
  int64_t row_bytes;              // one token's size
  int64_t step_stride;            // bytes from a padded token to the next of its sequence
  int64_t sequence_stride;        // bytes from a padded sequence to the next
};

// Sorts by length, longest first, equal ones in order. lengths: [B], each in [1, steps].
// Writes batch_sizes [steps], sorted_indices [B], unsorted_indices [B].
void packing_order(const int64_t* lengths, int64_t batch, int64_t steps, int64_t* batch_sizes, int64_t* sorted_indices,
                   int64_t* unsorted_indices);

// A padded batch whose sequences begin anew where resets say so: each segment is a sequence of its own in the packed
// layout.
struct Resets {
  int64_t steps;            // T
  int64_t batch;            // B
  const bool* resets;       // whether a segment begins at a step; the first step begins one in any case
  const int64_t* lengths;   // [B], each in [1, steps], or null: all sequences are T long
  int64_t step_stride;      // elements of resets from a step to the next of its sequence
  int64_t sequence_stride;  // elements of resets from a sequence to the next
};

// How many tokens the sequences have together, N, and how many segments, S.
struct SegmentCounts {
  int64_t tokens, segments;
};
SegmentCounts count_segments(const Resets& args);

// Sorts the segments by length, longest first, equal ones in order of sequence and time. Writes batch_sizes [T]; tokens
// [N], where in resets each packed token lies; first and last [B], the packed segment that each sequence begins and
// ends with; sequences [S], the sequence of each packed segment.
void segment_order(const Resets& args, int64_t* batch_sizes, int64_t* tokens, int64_t* first, int64_t* last,
                   int64_t* sequences);

// packed [N, row_bytes] <- padded. Padding is not read.
void pack(const Packing& args, const void* padded, void* packed, const Executor& executor);

// padded <- packed [N, row_bytes]; every padding token becomes zero bytes.
void unpack(const Packing& args, const void* packed, void* padded, const Executor& executor);

}  // namespace pymtl
