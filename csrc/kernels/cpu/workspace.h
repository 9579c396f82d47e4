// Hands out pieces of one block of scratch memory, each on a cache line of its own. Made twice from the
// same code: without memory to learn the size, and with it to learn the addresses.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pymtl {

class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* const here = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return here;
  }

  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

}  // namespace pymtl
