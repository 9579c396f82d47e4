// What the kernels of the recurrence share: how work is shared out, and the time loop along a slice's steps.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/rnn.h"

namespace pymtl::cuda {

// How a cluster shares a recurrence: each warp owns units_of_warp hidden units, each block warps * units_of_warp, and
// H is rounded up to what `blocks` of them own.
struct Plan {
  int blocks;  // of a cluster
  int warps;   // of a block
  int units_of_warp;
  int rows;  // of the batch that a cluster works on
  bool tf32 = false;

  __host__ __device__ int units_of_block() const { return warps * units_of_warp; }
  __host__ __device__ int units() const { return blocks * units_of_block(); }
  __host__ __device__ int threads() const { return warps * kWarp; }
};

// What stands in a kernel's parameters: the arguments of a launch without pointers to the host.
template <typename Args, typename T>
struct Launch {
  Args args;
  RnnWeights<T> weights[kRecurrences];  // of recurrences first, first + 1, ...
  int64_t first;
  int64_t count;
  Plan plan;
};

// The place of a cluster: slices with the longest sequences start first.
template <typename Args, typename T>
struct Place {
  int64_t g;
  const RnnWeights<T>* weights;
  int first_row;

  __device__ explicit Place(const Launch<Args, T>& launch) {
    const int64_t cluster = block_index() / launch.plan.blocks;
    g = launch.first + cluster % launch.count;
    weights = &launch.weights[cluster % launch.count];
    first_row = static_cast<int>(cluster / launch.count) * launch.plan.rows;
  }
};

// The steps at which a slice of the batch has tokens, one after the other, in either direction.
class TimeLoop {
 public:
  // Every thread of a warp calls this. first_row: the slice's longest sequence.
  __device__ TimeLoop(const RnnShape& shape, int64_t first_row, bool from_the_end)
      : batch_sizes_(shape.batch_sizes), batch_(static_cast<int>(shape.batch)), from_the_end_(from_the_end) {
    steps_ = static_cast<int>(shape.steps);
    int64_t tokens = shape.steps * shape.batch;
    if (batch_sizes_ != nullptr) {
      steps_ = 0;
      tokens = 0;
      for (int t = thread_index() % kWarp; t < shape.steps && batch_sizes_[t] > first_row; t += kWarp) {
        ++steps_;
        tokens += batch_sizes_[t];
      }
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        steps_ += shuffle_xor(steps_, mask);
        tokens += shuffle_xor(tokens, mask);
      }
    }
    step_ = from_the_end ? steps_ - 1 : 0;
    sequences_ = steps_ > 0 ? sequences_at(step_) : 0;
    token_ = from_the_end ? tokens - sequences_ : 0;
  }

  __device__ int steps() const { return steps_; }
  // Of the step it stands at: how many sequences have a token there, and the first one's token.
  __device__ int sequences() const { return sequences_; }
  __device__ int64_t token() const { return token_; }

  __device__ void advance() {
    if (from_the_end_) {
      sequences_ = sequences_at(--step_);
      token_ -= sequences_;
    } else {
      token_ += sequences_;
      sequences_ = sequences_at(++step_);
    }
  }

 private:
  __device__ int sequences_at(int t) const {
    return batch_sizes_ == nullptr ? batch_ : static_cast<int>(batch_sizes_[t]);
  }

  const int64_t* batch_sizes_;
  int batch_;
  bool from_the_end_;
  int steps_;
  int step_;
  int sequences_;
  int64_t token_;
};

// Two barriers in turn: step s + 1 waits for what is sent during step s. Two buffers need no further synchronisation: a
// block that has received everything of step s + 1 knows that all others have read what was sent during step s.
class Arrivals {
 public:
  // One thread of a block calls this, before sync_cluster(). steps: at how many steps something is sent.
  __device__ static void start(ArrivalBarrier* barriers, int steps, uint32_t bytes) {
    for (int i = 0; i < 2; ++i) {
      start_barrier(&barriers[i]);
      if (i < steps) announce_bytes(&barriers[i], bytes);
    }
  }

  // Waits for what was sent during step s, and lets one thread announce what will be two steps on.
  __device__ static void wait(ArrivalBarrier* barriers, int s, int steps, uint32_t bytes) {
    wait_for_bytes(&barriers[s % 2], static_cast<uint32_t>(s / 2 % 2));
    if (thread_index() == 0 && s + 2 < steps) announce_bytes(&barriers[s % 2], bytes);
  }
};

// Two neighbours of a row, of which the first `valid` are there.
template <typename T>
__device__ __forceinline__ uint32_t load_pair(const T* at, int valid, bool aligned) {
  if (valid >= 2 && aligned) return *reinterpret_cast<const uint32_t*>(at);
  const uint32_t first = valid >= 1 ? at[0].bits : 0;
  const uint32_t second = valid >= 2 ? at[1].bits : 0;
  return first | second << 16;
}

template <typename T>
__device__ __forceinline__ void store_pair(T* at, uint32_t pair, int valid, bool aligned) {
  if (valid >= 2 && aligned) {
    *reinterpret_cast<uint32_t*>(at) = pair;
    return;
  }
  if (valid >= 1) at[0] = {static_cast<uint16_t>(pair)};
  if (valid >= 2) at[1] = {static_cast<uint16_t>(pair >> 16)};
}

}  // namespace pymtl::cuda
