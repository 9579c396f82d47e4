#include "kernels/cuda/packing.h"
#include "kernels/cuda/tokens.h"

namespace pymtl::cuda {
namespace {

// A warp copies a row of words, or writes zeros.
template <typename Word>
__device__ void copy_row(const unsigned char* from, unsigned char* to, int64_t bytes) {
  auto* const target = reinterpret_cast<Word*>(to);
  for (int64_t i = lane_index(); i < bytes / static_cast<int64_t>(sizeof(Word)); i += kWarp) {
    target[i] = from != nullptr ? reinterpret_cast<const Word*>(from)[i] : Word{};
  }
}

Tokens tokens_of(const Packing& p) { return {p.steps, p.batch, p.tokens, p.batch_sizes, p.ends}; }

struct Copy {
  Packing packing;
  Tokens tokens;
  const unsigned char* from;
  unsigned char* to;
};

template <typename Word>
__global__ void pack_rows(const __grid_constant__ Copy copy) {
  const Packing& p = copy.packing;
  for (int64_t row = first_row(); row < p.tokens; row += row_stride()) {
    const int64_t step = copy.tokens.step_of(row);
    const unsigned char* from = nullptr;
    if (step < p.steps) {
      const int64_t place = row - copy.tokens.start(step);
      const int64_t sequence = p.sorted_indices != nullptr ? p.sorted_indices[place] : place;
      const bool there = sequence >= 0 && sequence < p.batch;
      from = there ? copy.from + sequence * p.sequence_stride + step * p.step_stride : nullptr;
    }
    copy_row<Word>(from, copy.to + row * p.row_bytes, p.row_bytes);
  }
}

template <typename Word>
__global__ void unpack_rows(const __grid_constant__ Copy copy) {
  const Packing& p = copy.packing;
  for (int64_t row = first_row(); row < p.steps * p.batch; row += row_stride()) {
    const int64_t step = row / p.batch;
    const int64_t place = row % p.batch;
    const int64_t sequence = p.sorted_indices != nullptr ? p.sorted_indices[place] : place;
    if (sequence < 0 || sequence >= p.batch) continue;
    const int64_t token = copy.tokens.start(step) + place;
    const bool there = place < copy.tokens.size(step) && token < p.tokens;
    unsigned char* const to = copy.to + sequence * p.sequence_stride + step * p.step_stride;
    copy_row<Word>(there ? copy.from + token * p.row_bytes : nullptr, to, p.row_bytes);
  }
}

struct Before {
  StatesBefore args;
  Tokens tokens;
  int64_t first;  // of the recurrences that `reverse` tells of
  int64_t count;
  uint32_t reverse;  // a bit for each
};

template <typename Word>
__global__ void states_before(const __grid_constant__ Before launch) {
  const StatesBefore& args = launch.args;
  const Tokens& tokens = launch.tokens;
  const auto* const output = static_cast<const unsigned char*>(args.output);
  const auto* const h0 = static_cast<const unsigned char*>(args.h0);
  for (int64_t row = first_row(); row < args.tokens * launch.count; row += row_stride()) {
    const int64_t token = row / launch.count;
    const int64_t g = launch.first + row % launch.count;
    const bool reverse = (launch.reverse >> (row % launch.count) & 1U) != 0;
    const int64_t step = tokens.step_of(token);
    const int64_t sequence = step < tokens.steps ? token - tokens.start(step) : -1;
    const int64_t earlier = reverse ? step + 1 : step - 1;  // in the order of the recurrence
    const bool has_earlier = step < tokens.steps && earlier >= 0 && earlier < tokens.steps;
    const int64_t before = has_earlier && sequence < tokens.size(earlier) ? tokens.start(earlier) + sequence : -1;
    const unsigned char* from = nullptr;
    if (before >= 0) {
      from = output + (before * args.recurrences + g) * args.row_bytes;
    } else if (sequence >= 0 && h0 != nullptr) {
      from = h0 + (g * args.batch + sequence) * args.row_bytes;
    }
    unsigned char* const to =
        static_cast<unsigned char*>(args.before) + (token * args.recurrences + g) * args.row_bytes;
    copy_row<Word>(from, to, args.row_bytes);
  }
}

// Whether all of these are multiples of a word's size.
template <typename... Numbers>
bool all_of(size_t word, Numbers... numbers) {
  return ((static_cast<uint64_t>(numbers) % word == 0) && ...);
}

uint64_t address(const void* memory) { return reinterpret_cast<uintptr_t>(memory); }

// Calls run.operator()<Word>() with the widest word that divides all of these.
template <typename Run, typename... Numbers>
void with_word(const Run& run, Numbers... numbers) {
  if (all_of(sizeof(uint4), numbers...)) return run.template operator()<uint4>();
  if (all_of(sizeof(uint32_t), numbers...)) return run.template operator()<uint32_t>();
  if (all_of(sizeof(uint16_t), numbers...)) return run.template operator()<uint16_t>();
  run.template operator()<uint8_t>();
}

}  // namespace

void pack(const Packing& p, const void* padded, void* packed, void* stream) {
  const Copy copy{p, tokens_of(p), static_cast<const unsigned char*>(padded), static_cast<unsigned char*>(packed)};
  const auto run = [&]<typename Word>() {
    launch(pack_rows<Word>, grid_of_rows(p.tokens), static_cast<Stream>(stream), copy);
  };
  with_word(run, p.row_bytes, p.sequence_stride, p.step_stride, address(padded), address(packed));
}

void unpack(const Packing& p, const void* packed, void* padded, void* stream) {
  const Copy copy{p, tokens_of(p), static_cast<const unsigned char*>(packed), static_cast<unsigned char*>(padded)};
  const auto run = [&]<typename Word>() {
    launch(unpack_rows<Word>, grid_of_rows(p.steps * p.batch), static_cast<Stream>(stream), copy);
  };
  with_word(run, p.row_bytes, p.sequence_stride, p.step_stride, address(padded), address(packed));
}

void rnn_states_before(const StatesBefore& args, void* stream) {
  for (int64_t first = 0; first < args.recurrences; first += 32) {
    const int64_t left = args.recurrences - first;
    const Tokens tokens{args.steps, args.batch, args.tokens, args.batch_sizes, args.ends};
    Before before{args, tokens, first, left < 32 ? left : 32, 0};
    for (int64_t i = 0; i < before.count; ++i) before.reverse |= (args.reverse[first + i] != 0 ? 1U : 0U) << i;
    const auto run = [&]<typename Word>() {
      launch(states_before<Word>, grid_of_rows(args.tokens * before.count), static_cast<Stream>(stream), before);
    };
    with_word(run, args.row_bytes, address(args.output), address(args.h0), address(args.before));
  }
}

bool is_recorded(void* stream) { return stream_is_recorded(static_cast<Stream>(stream)); }

}  // namespace pymtl::cuda
