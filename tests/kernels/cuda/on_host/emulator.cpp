#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace pymtl::cuda::emulator {

uint64_t seed = 1;
int64_t block_row_of_grid = 0;
int clusters_at_once = 16;
int blocks_at_once = 132;
int refused_cluster = 0;

namespace {

constexpr size_t kStack = 96 << 10;
constexpr uint32_t kWindow = 1 << 18;  // bytes of an address that name a place within a block

struct Fiber {
  ucontext_t context;  // to start with; from then on by jumps, which spare a system call each
  jmp_buf place;
  bool started;
  std::unique_ptr<unsigned char[]> stack;
  int thread;
  int rank;
  bool done;
  std::function<bool()> ready;  // what it waits for
};

// Where the threads of a warp, a block or a cluster meet.
struct Meeting {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Meeting meeting;
  Words gathering[kWarp];
  Words complete[kWarp];
};

struct Block {
  std::vector<unsigned char> memory;
  unsigned char* shared;
  int64_t index;
  Meeting meeting;
  std::vector<Warp> warps;
};

struct Message {
  uint32_t address;
  unsigned char bytes[16];
  int count;
  uint32_t barrier;
};

jmp_buf scheduler;
std::vector<std::unique_ptr<Fiber>> fibers;  // kept for the next launch
int threads_of_cluster;
std::vector<Block> cluster;
std::vector<Message> messages;
Meeting whole_cluster;
Fiber* current;
const std::function<void()>* body;
int threads_of_block;
int64_t blocks_of_grid;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (seed %llu)\n", what, static_cast<unsigned long long>(seed));
  std::abort();
}

Block& block() { return cluster[static_cast<size_t>(current->rank)]; }
Warp& warp() { return block().warps[static_cast<size_t>(current->thread / kWarp)]; }
int lane() { return current->thread % kWarp; }

void resume(Fiber* fiber) {
  current = fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->place, 1);
  fiber->started = true;
  setcontext(&fiber->context);
}

void leave() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

template <typename Condition>
void wait_until(const Condition& condition) {
  if (condition()) return;
  current->ready = condition;
  leave();
}

void meet(Meeting& meeting, int count) {
  const uint64_t generation = meeting.generation;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  wait_until([&meeting, generation] { return meeting.generation != generation; });
}

void complete_if_due(ArrivalBarrier* barrier) {
  if (barrier->pending != 0 || barrier->bytes != 0) return;
  ++barrier->phase;
  barrier->pending = 1;
}

unsigned char* memory_at(uint32_t address, size_t bytes) {
  const size_t rank = address / kWindow;
  const size_t place = address % kWindow;
  if (rank >= cluster.size() || place + bytes > cluster[rank].memory.size() || place % bytes != 0) {
    fail("an address outside the cluster's shared memory, or not aligned");
  }
  return cluster[rank].shared + place;
}

void deliver(const Message& message) {
  std::memcpy(memory_at(message.address, static_cast<size_t>(message.count)), message.bytes,
              static_cast<size_t>(message.count));
  if (message.address / kWindow != message.barrier / kWindow) fail("a message counted at another block's barrier");
  auto* const barrier = reinterpret_cast<ArrivalBarrier*>(memory_at(message.barrier, sizeof(ArrivalBarrier)));
  barrier->bytes -= message.count;
  complete_if_due(barrier);
}

void enter() {
  (*body)();
  current->done = true;
  leave();
}

// SplitMix64 (Steele et al. 2014). The scheduler draws a number for every thread in every round.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t below(uint64_t count) {
    state_ += 0x9e3779b97f4a7c15U;
    uint64_t z = (state_ ^ state_ >> 30) * 0xbf58476d1ce4e5b9U;
    z = (z ^ z >> 27) * 0x94d049bb133111ebU;
    return (z >> 32) * count >> 32;
  }
  bool once_in(uint64_t count) { return below(count) == 0; }

  template <typename T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }

 private:
  uint64_t state_;
};

void run_cluster(Random& random) {
  std::vector<Fiber*> alive;
  for (int i = 0; i < threads_of_cluster; ++i) {
    Fiber* const fiber = fibers[static_cast<size_t>(i)].get();
    fiber->rank = i / threads_of_block;
    fiber->thread = i % threads_of_block;
    fiber->done = false;
    fiber->started = false;
    fiber->ready = nullptr;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, enter, 0);
    alive.push_back(fiber);
  }
  const auto warps = static_cast<size_t>(threads_of_cluster / kWarp);
  std::vector<bool> late(warps);
  int idle = 0;  // rounds in which nothing moved
  while (!alive.empty()) {
    bool moved = !messages.empty();
    random.shuffle(messages);
    const size_t delivered = messages.empty() ? 0 : 1 + random.below(messages.size());
    std::for_each(messages.begin(), messages.begin() + static_cast<std::ptrdiff_t>(delivered), deliver);
    messages.erase(messages.begin(), messages.begin() + static_cast<std::ptrdiff_t>(delivered));
    random.shuffle(alive);
    // Whole warps fall behind often, single threads, for which their warp has to wait at its next meeting, now and
    // then.
    for (size_t i = 0; i < warps; ++i) late[i] = random.once_in(4);
    for (Fiber* const fiber : alive) {
      const auto warp = static_cast<size_t>((fiber->rank * threads_of_block + fiber->thread) / kWarp);
      if (late[warp] || random.once_in(64) || (fiber->ready && !fiber->ready())) continue;
      fiber->ready = nullptr;
      resume(fiber);
      moved = true;
    }
    std::erase_if(alive, [](const Fiber* fiber) { return fiber->done; });
    idle = moved ? 0 : idle + 1;
    if (idle == 100) fail("every thread waits for something that never comes");
  }
  if (!messages.empty()) fail("messages to blocks that have ended");
}

}  // namespace

void run(int64_t blocks, int threads, int cluster_size, size_t shared_bytes, const std::function<void()>& function) {
  if (shared_bytes > kSharedBytes) fail("more shared memory than a block can have");
  if (threads % kWarp != 0 || threads > 1024) fail("a number of threads that is no number of warps");
  const int size = std::max(cluster_size, 1);
  if (blocks % size != 0) fail("blocks that make no whole clusters");
  Random random(seed);
  body = &function;
  threads_of_block = threads;
  blocks_of_grid = blocks;
  threads_of_cluster = size * threads;
  while (fibers.size() < static_cast<size_t>(threads_of_cluster)) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack = std::make_unique_for_overwrite<unsigned char[]>(kStack);
  }
  for (int64_t first = 0; first < blocks; first += size) {
    cluster.clear();
    cluster.resize(static_cast<size_t>(size));
    whole_cluster = {};
    for (int rank = 0; rank < size; ++rank) {
      Block& one = cluster[static_cast<size_t>(rank)];
      one.memory.assign(shared_bytes, 0xff);
      one.shared = one.memory.data();
      one.index = first + rank;
      one.warps.resize(static_cast<size_t>(threads / kWarp));
    }
    run_cluster(random);
  }
  cluster.clear();
}

int thread_index() { return current->thread; }
int block_threads() { return threads_of_block; }
int64_t block_index() { return block().index; }
int64_t block_count() { return blocks_of_grid; }
int cluster_rank() { return current->rank; }
unsigned char* shared_memory() { return block().shared; }

void sync_threads() { meet(block().meeting, threads_of_block); }
void sync_cluster() { meet(whole_cluster, threads_of_cluster); }

void collect(const uint32_t* words, int count, const Reader& read) {
  Warp& own = warp();
  std::copy_n(words, count, own.gathering[lane()].word);
  if (own.meeting.arrived == kWarp - 1) std::copy_n(own.gathering, kWarp, own.complete);
  meet(own.meeting, kWarp);
  read(own.complete, lane());
}

uint64_t exchange(uint64_t value, int lane_mask) {
  const uint32_t words[2] = {static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32)};
  uint64_t result = 0;
  collect(words, 2, [&](const Words* lanes, int self) {
    const Words& other = lanes[self ^ lane_mask];
    result = other.word[0] | static_cast<uint64_t>(other.word[1]) << 32;
  });
  return result;
}

void start_barrier(ArrivalBarrier* barrier) { *barrier = {0, 1, 0}; }

void announce_bytes(ArrivalBarrier* barrier, uint32_t bytes) {
  if (barrier->pending == 0) fail("bytes announced twice in one phase of a barrier");
  barrier->pending = 0;
  barrier->bytes += static_cast<int32_t>(bytes);
  complete_if_due(barrier);
}

void wait_for_bytes(ArrivalBarrier* barrier, uint32_t parity) {
  wait_until([barrier, parity] { return (barrier->phase & 1U) != parity; });
}

void wait_for_arrivals(const uint32_t* counter, uint32_t count) {
  wait_until([counter, count] { return *counter >= count; });
}

uint32_t address_of(const void* memory) {
  const auto place = static_cast<const unsigned char*>(memory) - block().shared;
  if (place < 0 || place >= static_cast<std::ptrdiff_t>(block().memory.size())) fail("an address of other memory");
  return static_cast<uint32_t>(current->rank) * kWindow + static_cast<uint32_t>(place);
}

uint32_t address_in(uint32_t address, int rank) {
  if (rank < 0 || static_cast<size_t>(rank) >= cluster.size()) fail("a rank outside the cluster");
  return address % kWindow + static_cast<uint32_t>(rank) * kWindow;
}

void send(uint32_t address, const void* value, int bytes, uint32_t barrier) {
  Message message{address, {}, bytes, barrier};
  std::memcpy(message.bytes, value, static_cast<size_t>(bytes));
  messages.push_back(message);
}

}  // namespace pymtl::cuda::emulator
