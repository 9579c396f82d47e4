// Runs the threads of CUDA blocks as coroutines of one host thread: one cluster after the other, its threads in an
// order that `seed` draws anew in every round. Messages between blocks arrive late, in any order. Shared memory starts
// as NaN. A kernel that waits for what never comes ends the program with a message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace pymtl::cuda::emulator {

inline constexpr size_t kSharedBytes = 232448;  // of a block, on Hopper
inline constexpr int kWarp = 32;

extern uint64_t seed;
extern int64_t block_row_of_grid;
extern int clusters_at_once;  // what kernels are told; a test may make them small
extern int blocks_at_once;
extern int refused_cluster;  // a size of clusters that there are none of; 0: none is refused

// Runs a kernel's body for every thread of every block. A cluster of 0 is none; blocks that wait for each other without
// being a cluster run like one.
void run(int64_t blocks, int threads, int cluster, size_t shared_bytes, const std::function<void()>& body);

// What a thread asks.
int thread_index();
int block_threads();
int64_t block_index();
int64_t block_count();
int cluster_rank();
unsigned char* shared_memory();

void sync_threads();
void sync_cluster();

// Gives a warp's threads each other's words, when all have come.
struct Words {
  uint32_t word[6];
};
using Reader = std::function<void(const Words* lanes, int lane)>;
void collect(const uint32_t* words, int count, const Reader& read);
uint64_t exchange(uint64_t value, int lane_mask);

struct alignas(8) ArrivalBarrier {
  int32_t bytes;     // announced and not here yet
  uint16_t pending;  // arrivals missing: 1 or 0
  uint16_t phase;    // complete ones
};
void start_barrier(ArrivalBarrier* barrier);
void announce_bytes(ArrivalBarrier* barrier, uint32_t bytes);
void wait_for_bytes(ArrivalBarrier* barrier, uint32_t parity);

void wait_for_arrivals(const uint32_t* counter, uint32_t count);

uint32_t address_of(const void* memory);
uint32_t address_in(uint32_t address, int rank);
void send(uint32_t address, const void* value, int bytes, uint32_t barrier);

}  // namespace pymtl::cuda::emulator
