#include "kernels/cuda/peak.h"
#include "kernels/cuda/rnn/cluster.h"

namespace pymtl::cuda {
namespace {

constexpr int kThreads = 256;

struct Rounds {
  int blocks;
  int rounds;
  bool messages;
};

__global__ void exchange(const __grid_constant__ Rounds args) {
  auto* const received = reinterpret_cast<uint32_t*>(shared_memory());
  const int words = args.blocks * kThreads;
  auto* const barriers = reinterpret_cast<ArrivalBarrier*>(received + 2 * words);
  const auto bytes = static_cast<uint32_t>(words * 4);
  if (thread_index() == 0 && args.messages) Arrivals::start(barriers, args.rounds, bytes);
  sync_cluster();
  const int rank = cluster_rank();
  uint32_t value = 0;
  for (int round = 0; round < args.rounds; ++round) {
    if (!args.messages) {
      sync_cluster();
      continue;
    }
    uint32_t* const own = received + round % 2 * words + rank * kThreads + thread_index();
    for (int to = 0; to < args.blocks; ++to) {
      send(address_in(shared_address(own), to), value, address_in(shared_address(&barriers[round % 2]), to));
    }
    Arrivals::wait(barriers, round, args.rounds, bytes);
    value = *own + 1;  // so that a round depends on the one before
  }
  sync_cluster();
}

}  // namespace

void cluster_rounds(int blocks, int64_t rounds, bool messages, void* stream) {
  const size_t bytes = 2 * static_cast<size_t>(blocks) * kThreads * 4 + 2 * sizeof(ArrivalBarrier);
  launch(exchange, {blocks, kThreads, blocks, bytes}, static_cast<Stream>(stream),
         Rounds{blocks, static_cast<int>(rounds), messages});
}

}  // namespace pymtl::cuda
