#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace pymtl::ops {
namespace {

constexpr size_t kLargestKept = size_t{64} << 20;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Block {
  std::unique_ptr<void, Free> memory;
  size_t size = 0;
  bool in_use = false;
};

thread_local Block block;

void* allocate(size_t bytes) {
  void* const memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

Scratch::Scratch(size_t bytes) : kept_(bytes <= kLargestKept && !block.in_use) {
  if (!kept_) {
    memory_ = allocate(bytes);
    return;
  }
  if (block.size < bytes) {
    block.size = 0;
    block.memory.reset();
    block.memory.reset(allocate(bytes));
    block.size = bytes;
  }
  block.in_use = true;
  memory_ = block.memory.get();
}

Scratch::~Scratch() {
  if (kept_) {
    block.in_use = false;
  } else {
    std::free(memory_);
  }
}

}  // namespace pymtl::ops
