// Scratch memory of a call. The system gives freed megabytes back to the kernel and faults them in again page by
// page at the next call, which can cost more than the call; so each thread keeps a block: up to 16 MiB, and beyond them
// what is left of 64 MiB that all threads share.
#pragma once

#include <cstddef>

namespace pymtl::ops {

class Scratch {
 public:
  // 64-byte-aligned memory for as long as this object lives. Throws std::bad_alloc.
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* memory() const { return memory_; }

 private:
  void* memory_;
  bool reserve_;  // it is the thread's own block, not this call's
};

}  // namespace pymtl::ops
