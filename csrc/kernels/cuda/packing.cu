#include "kernels/cuda/device.h"
#include "kernels/cuda/packing.h"

namespace pymtl::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int64_t kBlocks = 4096;  // at most: a warp does several rows if there are more

// A token's step and sequence; step T behind the last token.
struct TokenPlace {
  int64_t step;
  int64_t sequence;

  __device__ TokenPlace(int64_t token, int64_t steps, const int64_t* batch_sizes, const int64_t* ends) {
    int64_t low = 0;
    int64_t high = steps;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ends[middle] > token) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    step = low;
    sequence = low < steps ? token - (ends[low] - batch_sizes[low]) : 0;
  }
};

// A warp copies a row of words, or writes zeros.
template <typename Word>
__device__ void copy_row(const unsigned char* from, unsigned char* to, int64_t bytes) {
  auto* const target = reinterpret_cast<Word*>(to);
  for (int64_t i = thread_index() % kWarp; i < bytes / static_cast<int64_t>(sizeof(Word)); i += kWarp) {
    target[i] = from != nullptr ? reinterpret_cast<const Word*>(from)[i] : Word{};
  }
}

// The rows that this warp does: first, first + stride, ...
__device__ int64_t first_row() { return (block_index() * block_threads() + thread_index()) / kWarp; }
__device__ int64_t row_stride() { return block_count() * block_threads() / kWarp; }

struct Copy {
  Packing packing;
  const unsigned char* from;
  unsigned char* to;
};

template <typename Word>
__global__ void pack_rows(const __grid_constant__ Copy copy) {
  const Packing& p = copy.packing;
  for (int64_t row = first_row(); row < p.tokens; row += row_stride()) {
    const TokenPlace place(row, p.steps, p.batch_sizes, p.ends);
    const unsigned char* from = nullptr;
    if (place.step < p.steps) {
      const int64_t sequence = p.sorted_indices != nullptr ? p.sorted_indices[place.sequence] : place.sequence;
      const bool there = sequence >= 0 && sequence < p.batch;
      from = there ? copy.from + sequence * p.sequence_stride + place.step * p.step_stride : nullptr;
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
    const int64_t token = p.ends[step] - p.batch_sizes[step] + place;
    const bool there = place < p.batch_sizes[step] && token < p.tokens;
    unsigned char* const to = copy.to + sequence * p.sequence_stride + step * p.step_stride;
    copy_row<Word>(there ? copy.from + token * p.row_bytes : nullptr, to, p.row_bytes);
  }
}

struct Before {
  StatesBefore args;
  int64_t first;  // of the recurrences that `reverse` tells of
  int64_t count;
  uint32_t reverse;  // a bit for each
};

template <typename Word>
__global__ void states_before(const __grid_constant__ Before launch) {
  const StatesBefore& args = launch.args;
  const auto* const output = static_cast<const unsigned char*>(args.output);
  const auto* const h0 = static_cast<const unsigned char*>(args.h0);
  for (int64_t row = first_row(); row < args.tokens * launch.count; row += row_stride()) {
    const int64_t token = row / launch.count;
    const int64_t g = launch.first + row % launch.count;
    const bool reverse = (launch.reverse >> (row % launch.count) & 1U) != 0;
    int64_t before = -1;  // the token before, or none
    int64_t sequence = -1;
    if (args.batch_sizes == nullptr) {
      sequence = token % args.batch;
      before = reverse ? token + args.batch : token - args.batch;
      if (before >= args.tokens) before = -1;
    } else {
      const TokenPlace place(token, args.steps, args.batch_sizes, args.ends);
      if (place.step < args.steps) {
        sequence = place.sequence;
        if (reverse && place.step + 1 < args.steps && sequence < args.batch_sizes[place.step + 1]) {
          before = args.ends[place.step] + sequence;
        } else if (!reverse && place.step > 0) {
          before = args.ends[place.step - 1] - args.batch_sizes[place.step - 1] + sequence;
        }
      }
    }
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

Grid grid_of(int64_t rows) {
  const int64_t blocks = (rows * kWarp + kThreads - 1) / kThreads;
  return {blocks < kBlocks ? blocks : kBlocks, kThreads, 0, 0};
}

}  // namespace

void pack(const Packing& p, const void* padded, void* packed, void* stream) {
  const Copy copy{p, static_cast<const unsigned char*>(padded), static_cast<unsigned char*>(packed)};
  const auto run = [&]<typename Word>() {
    launch(pack_rows<Word>, grid_of(p.tokens), static_cast<Stream>(stream), copy);
  };
  with_word(run, p.row_bytes, p.sequence_stride, p.step_stride, address(padded), address(packed));
}

void unpack(const Packing& p, const void* packed, void* padded, void* stream) {
  const Copy copy{p, static_cast<const unsigned char*>(packed), static_cast<unsigned char*>(padded)};
  const auto run = [&]<typename Word>() {
    launch(unpack_rows<Word>, grid_of(p.steps * p.batch), static_cast<Stream>(stream), copy);
  };
  with_word(run, p.row_bytes, p.sequence_stride, p.step_stride, address(padded), address(packed));
}

void rnn_states_before(const StatesBefore& args, void* stream) {
  for (int64_t first = 0; first < args.recurrences; first += 32) {
    const int64_t left = args.recurrences - first;
    Before before{args, first, left < 32 ? left : 32, 0};
    for (int64_t i = 0; i < before.count; ++i) before.reverse |= (args.reverse[first + i] != 0 ? 1U : 0U) << i;
    const auto run = [&]<typename Word>() {
      launch(states_before<Word>, grid_of(args.tokens * before.count), static_cast<Stream>(stream), before);
    };
    with_word(run, args.row_bytes, address(args.output), address(args.h0), address(args.before));
  }
}

bool is_recorded(void* stream) { return stream_is_recorded(static_cast<Stream>(stream)); }

}  // namespace pymtl::cuda
