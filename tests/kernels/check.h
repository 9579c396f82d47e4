// What the kernels' tests share: checks that count and print, repeatable random numbers, memory of exactly
// the size a kernel is told, and executors.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <sstream>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/bfloat16.h"
#include "kernels/executor.h"
#include "kernels/isa.h"
#include "kernels/pool.h"

#if defined(__SANITIZE_ADDRESS__)
#define PYMTL_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PYMTL_SANITIZED 1
#endif
#endif
#ifndef PYMTL_SANITIZED
#define PYMTL_SANITIZED 0
#endif

namespace pymtl::test {

// Counts a check; where it fails, prints it, the values that follow it, and what was being tested.
#define CHECK(condition, ...)                                                                                          \
  do {                                                                                                                 \
    ++::pymtl::test::check_count;                                                                                      \
    if (!(condition)) ::pymtl::test::fail(__FILE__, __LINE__, #condition, "" #__VA_ARGS__ __VA_OPT__(, ) __VA_ARGS__); \
  } while (false)

inline int64_t check_count = 0;
inline int64_t failure_count = 0;
inline std::vector<std::string> contexts;

// Names what is being tested, for the failures while it lives.
class Context {
 public:
  template <typename... Part>
  explicit Context(const Part&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    contexts.push_back(text.str());
  }
  Context(const Context&) = delete;
  ~Context() { contexts.pop_back(); }
};

template <typename... Value>
void fail(const char* file, int line, const char* condition, const char* names, const Value&... values) {
  constexpr int64_t kPrinted = 20;
  ++failure_count;
  if (failure_count > kPrinted) {
    if (failure_count == kPrinted + 1) std::printf("further failures are counted, not printed\n");
    return;
  }
  std::ostringstream text;
  text.precision(std::numeric_limits<double>::max_digits10);
  text << file << ":" << line << ": failed: " << condition << "\n";
  if constexpr (sizeof...(values) > 0) {
    text << "    " << names << " =";
    ((text << " " << values), ...);
    text << "\n";
  }
  for (const std::string& context : contexts) text << "    in " << context << "\n";
  std::fputs(text.str().c_str(), stdout);
  std::fflush(stdout);
}

struct Test {
  const char* name;
  void (*body)();
};

// Every instruction set that there is a name for.
inline constexpr Isa kIsas[] = {Isa::baseline,    Isa::avx2, Isa::avx2_vnni, Isa::avx512,      Isa::avx512_vnni,
                                Isa::avx512_bf16, Isa::amx,  Isa::neon,      Isa::neon_dotprod};

// Runs the tests under the instruction set that PYMTL_ISA names; the program's exit status.
inline int run_tests(std::initializer_list<Test> tests) {
  const char* const wanted = std::getenv("PYMTL_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    const auto named = [wanted](Isa isa) { return std::strcmp(isa_name(isa), wanted) == 0; };
    const std::vector<Isa> available = available_isas();
    if (std::none_of(available.begin(), available.end(), named)) {
      const bool unknown = std::none_of(std::begin(kIsas), std::end(kIsas), named);
      std::printf(unknown ? "failed: there is no instruction set %s\n"
                          : "skipped: this CPU or this build lacks the instruction set %s\n",
                  wanted);
      return unknown || failure_count > 0 ? 1 : 77;
    }
  }
  const std::string isa = isa_name(active_isa());
  for (const Test& test : tests) {
    const int64_t checks_before = check_count;
    const int64_t failures_before = failure_count;
    const auto start = std::chrono::steady_clock::now();
    {
      const Context context(test.name, " under ", isa);
      test.body();
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    std::printf("%-8s %-36s %9lld checks %6.2f s  %s\n", isa.c_str(), test.name,
                static_cast<long long>(check_count - checks_before), took.count(),
                failure_count == failures_before ? "ok" : "FAILED");
    std::fflush(stdout);
  }
  if (failure_count > 0) std::printf("%lld checks failed\n", static_cast<long long>(failure_count));
  return failure_count == 0 ? 0 : 1;
}

// The same numbers on every machine, unlike the standard library's distributions. (SplitMix64, Steele et al. 2014)
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform(double low, double high) { return low + (high - low) * (static_cast<double>(bits() >> 11) * 0x1p-53); }
  int64_t below(int64_t count) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(count)); }
  bool flip() { return (bits() & 1) != 0; }

 private:
  uint64_t state_;
};

// An array that a kernel reads or writes, or null. Under the address sanitizer it is an allocation of its
// exact size. Otherwise bytes on both sides are watched, and it is aligned to its elements and to no more.
//
// New memory holds NaN (as int64: a huge negative number) of another kind for every array: what a kernel
// does not write is neither right nor equal to what another call did not write.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count, size_t alignment = alignof(T))
      : size_(count), front_(PYMTL_SANITIZED ? 0 : kGuard + (alignment < kGuard ? alignof(T) : 0)) {
    memory_ = static_cast<unsigned char*>(::operator new(bytes(), std::align_val_t{kGuard}));
    std::memset(memory_, kWatched, bytes());
    static uint32_t kind = 0;
    const uint32_t word = 0xffffff00u | (++kind % 251);
    unsigned char* const first = memory_ + front_;
    for (size_t i = 0; i < static_cast<size_t>(count) * sizeof(T); ++i) {
      first[i] = reinterpret_cast<const unsigned char*>(&word)[i % sizeof word];
    }
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (memory_ == nullptr) return;
    const size_t end = front_ + static_cast<size_t>(size_) * sizeof(T);
    int64_t touched = 0;
    for (size_t i = 0; i < front_; ++i) touched += memory_[i] != kWatched;
    for (size_t i = end; i < bytes(); ++i) touched += memory_[i] != kWatched;
    CHECK(touched == 0, touched, size_);
    ::operator delete(memory_, std::align_val_t{kGuard});
  }

  T* data() { return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + front_); }
  const T* data() const { return memory_ == nullptr ? nullptr : reinterpret_cast<const T*>(memory_ + front_); }
  int64_t size() const { return size_; }
  T* begin() { return data(); }
  T* end() { return data() + size_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  explicit operator bool() const { return memory_ != nullptr; }

 private:
  static constexpr size_t kGuard = 64;  // also a cache line, the alignment that scratch memory asks for
  static constexpr unsigned char kWatched = 0xc5;

  size_t bytes() const { return front_ + static_cast<size_t>(size_) * sizeof(T) + (PYMTL_SANITIZED ? 0 : kGuard); }
  void swap(Buffer& other) {
    std::swap(memory_, other.memory_);
    std::swap(size_, other.size_);
    std::swap(front_, other.front_);
  }

  unsigned char* memory_ = nullptr;
  int64_t size_ = 0;
  size_t front_ = 0;
};

using Workspace = Buffer<unsigned char>;

inline Workspace workspace_of(size_t bytes) { return Workspace(static_cast<int64_t>(bytes), 64); }

// A number as a T; a bfloat16 by cutting off what it has no bits for.
template <typename T>
T number(double value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const float wide = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &wide, sizeof bits);
    return {static_cast<uint16_t>(bits >> 16)};
  } else {
    return static_cast<T>(value);
  }
}

template <typename T>
Buffer<T> uniform(int64_t count, Random& random, double low = -1, double high = 1) {
  Buffer<T> buffer(count);
  for (T& value : buffer) value = number<T>(random.uniform(low, high));
  return buffer;
}

template <typename T>
Buffer<T> copy_of(const std::vector<T>& values) {
  Buffer<T> buffer(static_cast<int64_t>(values.size()));
  std::copy(values.begin(), values.end(), buffer.begin());
  return buffer;
}

template <typename T>
bool same_bits(const T* a, const T* b, int64_t count) {
  return count == 0 || std::memcmp(a, b, static_cast<size_t>(count) * sizeof(T)) == 0;
}

// All tasks on the calling thread, in order.
inline Executor serial() { return {serially, 1}; }

// All tasks on the calling thread, the last one first, though it looks like four threads.
inline Executor backwards() {
  return {[](int64_t count, Executor::Task task, void* state) {
            for (int64_t i = count; i-- > 0;) task(state, i);
          },
          4};
}

// On threads of their own.
template <int kThreads>
Executor threads() {
  return {[](int64_t count, Executor::Task task, void* state) {
            std::atomic<int64_t> next{0};
            const auto work = [&] {
              for (int64_t i = next++; i < count; i = next++) task(state, i);
            };
            std::vector<std::thread> workers;
            for (int64_t i = 0; i < std::min<int64_t>(count, kThreads); ++i) workers.emplace_back(work);
            for (std::thread& worker : workers) worker.join();
          },
          kThreads};
}

struct NamedExecutor {
  const char* name;
  Executor executor;
};

inline std::vector<NamedExecutor> executors() {
  return {{"one thread", threads<1>()},
          {"two threads", threads<2>()},
          {"three threads", threads<3>()},
          {"five threads", threads<5>()},
          {"the pool's, three threads", pool_executor(3, serially)},
          {"last task first", backwards()}};
}

// For many cases, where all executors for each would mostly test the making of threads.
inline NamedExecutor any_executor(Random& random) {
  const std::vector<NamedExecutor> all = executors();
  return all[static_cast<size_t>(random.below(static_cast<int64_t>(all.size())))];
}

template <typename T>
constexpr const char* kTypeName = sizeof(T) == sizeof(float) ? "float" : "double";

}  // namespace pymtl::test
