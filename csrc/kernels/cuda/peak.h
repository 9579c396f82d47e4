// Limits of the device, for benchmarks.
#pragma once

#include <cstdint>

namespace pymtl::cuda {

// A cluster of so many blocks of 256 threads exchanges and waits `rounds` times, and does nothing else: by messages, 4
// bytes from every thread to every block as the recurrence sends h, or else by the cluster's barrier.
void cluster_rounds(int blocks, int64_t rounds, bool messages, void* stream);

}  // namespace pymtl::cuda
