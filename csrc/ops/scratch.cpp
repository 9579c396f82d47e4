#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace pymtl::ops {
namespace {

constexpr size_t kReserveByEach = size_t{16} << 20;
constexpr size_t kReserveBesides = size_t{64} << 20;  // by all threads together

std::atomic<size_t> reserve_besides{0};

// Null if there is no memory.
void* allocate(size_t bytes) { return std::aligned_alloc(64, (bytes + 63) / 64 * 64); }

// A thread's own block.
struct Block {
  void* memory = nullptr;
  size_t size = 0;
  bool in_use = false;

  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { release(); }

  // Makes the block hold `bytes`; returns whether it does. It fails if the other threads' blocks leave too little of
  // kReserveBesides, or if there is no memory.
  bool grow(size_t bytes) {
    if (size >= bytes) return true;
    release();
    const size_t besides = beyond(bytes);
    if (reserve_besides.fetch_add(besides) + besides > kReserveBesides) {
      reserve_besides.fetch_sub(besides);
      return false;
    }
    size = bytes;
    memory = allocate(bytes);
    if (memory == nullptr) release();
    return memory != nullptr;
  }

  void release() {
    std::free(memory);
    reserve_besides.fetch_sub(beyond(size));
    memory = nullptr;
    size = 0;
  }

  static size_t beyond(size_t bytes) { return bytes > kReserveByEach ? bytes - kReserveByEach : 0; }
};

thread_local Block block;

}  // namespace

Scratch::Scratch(size_t bytes) : reserve_(!block.in_use && block.grow(bytes)) {
  memory_ = reserve_ ? block.memory : allocate(bytes);
  if (memory_ == nullptr) throw std::bad_alloc();
  if (reserve_) block.in_use = true;
}

Scratch::~Scratch() {
  if (reserve_) {
    block.in_use = false;
  } else {
    std::free(memory_);
  }
}

}  // namespace pymtl::ops
