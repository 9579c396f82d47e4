// What the CUDA kernels need of the device beyond C++, by names of their own, so that the tests can run the same
// kernels on a host (tests/kernels/cuda/on_host). PTX: the instructions' names stand in NVIDIA's "PTX ISA".
//
// A cluster is up to 16 blocks that run at the same time and read and write one another's shared memory (Hopper,
// sm_90). Files that use what stands under "Clusters" are compiled for such chips only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels/bfloat16.h"
#include "kernels/cuda/float16.h"

namespace pymtl::cuda {

inline constexpr int kWarp = 32;  // threads

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }
__device__ __forceinline__ int64_t block_row() { return static_cast<int64_t>(blockIdx.y); }
__device__ __forceinline__ int64_t block_count() { return static_cast<int64_t>(gridDim.x); }

// The block's dynamic shared memory, 128-byte aligned.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// The compiler moves no load across it.
__device__ __forceinline__ void order_loads() { asm volatile("" ::: "memory"); }

__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffU, value, mask);
}
__device__ __forceinline__ double shuffle_xor(double value, int mask) {
  return __shfl_xor_sync(0xffffffffU, value, mask);
}
__device__ __forceinline__ int shuffle_xor(int value, int mask) { return __shfl_xor_sync(0xffffffffU, value, mask); }
__device__ __forceinline__ int64_t shuffle_xor(int64_t value, int mask) {
  return __shfl_xor_sync(0xffffffffU, static_cast<long long>(value), mask);
}

// Numbers: two of a 16-bit type share a register, the first in its lower half.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// The same with what a T is computed in, which of double is double.
template <typename T>
__device__ __forceinline__ Accum<T> to_accum(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return to_float(x);
  }
}
template <typename T>
__device__ __forceinline__ T from_accum(Accum<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pair_of(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}
template <typename T>
__device__ __forceinline__ float first_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <typename T>
__device__ __forceinline__ float second_of(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// 2^x, and 0 instead of a denormal number, which saves what __expf does about those.
__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Absolute errors near 1e-7, which is what sums in float leave.
__device__ __forceinline__ float sigmoid(float x) {
  constexpr float kLog2E = 1.442695041F;
  return __fdividef(1.0F, 1.0F + power_of_two(-kLog2E * x));
}
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  constexpr float kTwoLog2E = 2.885390082F;
  return 1.0F - __fdividef(2.0F, 1.0F + power_of_two(kTwoLog2E * x));  // 1 where the power overflows
}

// As exact as the type gets.
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }
template <typename R>
__device__ __forceinline__ R exact_sigmoid(R x) {
  return R(1) / (R(1) + exponential(-x));
}
__device__ __forceinline__ float exact_hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double exact_hyperbolic_tangent(double x) { return tanh(x); }

// acc += a b, of a warp: a [16, 16], b [16, 8], acc [16, 8] (mma.m16n8k16).
// With lane = 4 r + j: acc[0..1] is row r, columns 2j and 2j + 1, acc[2..3] row r + 8; a[0] is row r, columns 2j and
// 2j + 1, a[1] row r + 8, a[2] and a[3] the same 8 columns on; b[0] is rows 2j and 2j + 1 of column r, b[1] 8 rows on.
template <typename T>
__device__ __forceinline__ void multiply_tile(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// A number of 10 bits behind the point, as the instruction below takes it.
__device__ __forceinline__ uint32_t rounded_to_tf32(float x) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}

// The same of numbers in TF32: a [16, 8], b [8, 8], acc [16, 8] (mma.m16n8k8). acc as above; a[0] is row r, column j,
// a[1] row r + 8, a[2] and a[3] the same 4 columns on; b0 is row j of column r, b1 4 rows on.
__device__ __forceinline__ void multiply_tile_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of 16-bit numbers that a warp holds: lane 4 r + j has row r, columns 2j and 2j + 1.
__device__ __forceinline__ uint32_t transpose_tile(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Shared memory within a cluster: addresses of 32 bits, which name a block and a place in its shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* memory) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// How long a block waits for another before it ends the launch with an error, which is better than a device that hangs.
#ifndef PYMTL_CUDA_PATIENCE_SECONDS
#define PYMTL_CUDA_PATIENCE_SECONDS 60
#endif

// Calls complete() until it is true.
template <typename Complete>
__device__ __forceinline__ void wait_until(const Complete& complete) {
  constexpr uint64_t kPatience = uint64_t{PYMTL_CUDA_PATIENCE_SECONDS} * 1'000'000'000;
#pragma unroll 1
  for (int i = 0; i < 64; ++i) {
    if (complete()) return;
  }
  const uint64_t start = nanoseconds();
  while (!complete()) {
    if (nanoseconds() - start > kPatience) __trap();
  }
}

// Between blocks that run at the same time: counts one more arrival, after what the block wrote before its last
// barrier; and waits for so many, to see what those wrote.
__device__ __forceinline__ void count_arrival(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void wait_for_arrivals(const uint32_t* counter, uint32_t count) {
  wait_until([&] {
    uint32_t arrived;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
    return static_cast<int32_t>(arrived - count) >= 0;
  });
}

// Memory that another block wrote during this launch: not from this multiprocessor's own cache.
__device__ __forceinline__ uint4 load_fresh(const uint4* at) { return __ldcg(at); }

// Clusters.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t address_in(uint32_t address, int rank) {
  uint32_t result;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

// All threads of all blocks of the cluster meet, and see what was written before.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A barrier that completes a phase when one thread has announced how many bytes are to come and they have come. Bytes
// may come before they are announced.
struct alignas(8) ArrivalBarrier {
  uint64_t state;
};

// Before other blocks learn of it: sync_cluster() has to follow.
__device__ __forceinline__ void start_barrier(ArrivalBarrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void announce_bytes(ArrivalBarrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// The scope of the acquire at the end of a wait. The bytes arrive in the block's own shared memory, which no cache
// holds, so cta is enough. With cluster, the default until a GPU has shown the difference, the compiler invalidates the
// multiprocessor's L1 cache after every wait.
#ifndef PYMTL_CUDA_WAIT_SCOPE
#define PYMTL_CUDA_WAIT_SCOPE cluster
#endif
#define PYMTL_QUOTED_AS_IT_IS(text) #text
#define PYMTL_QUOTED(text) PYMTL_QUOTED_AS_IT_IS(text)

// Waits for the phase with this parity; the first is 0.
__device__ __forceinline__ void wait_for_bytes(ArrivalBarrier* barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  wait_until([&] {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.acquire." PYMTL_QUOTED(PYMTL_CUDA_WAIT_SCOPE) ".shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
    return done != 0;
  });
}

// Stores into the shared memory of a block of the cluster and counts the bytes at a barrier of that block.
__device__ __forceinline__ void send(uint32_t address, uint32_t value, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
               "r"(value), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void send(uint32_t address, float value, uint32_t barrier) {
  send(address, __float_as_uint(value), barrier);
}

__device__ __forceinline__ void send(uint32_t address, float first, float second, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "r"(__float_as_uint(first)), "r"(__float_as_uint(second)), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void send(uint32_t address, const float (&values)[4], uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(__float_as_uint(values[0])), "r"(__float_as_uint(values[1])), "r"(__float_as_uint(values[2])),
      "r"(__float_as_uint(values[3])), "r"(barrier)
      : "memory");
}

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + call + ": " + cudaGetErrorString(error));
}

inline bool stream_is_recorded(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

struct Grid {
  int64_t blocks;
  int threads;
  int cluster;  // blocks of a cluster
  size_t shared_bytes;
  int64_t rows = 1;  // of blocks
};

// What a launch needs of the device. A kernel's attributes belong to the kernel, not to a launch, so every launch sets
// them to the same maximum of the device: another thread may launch the kernel at the same time.
template <typename Args>
struct Configuration {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  cudaError_t error = cudaSuccess;  // what the device has none of

  Configuration(void (*kernel)(Args), const Grid& grid, Stream stream) {
    int most = 0;
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device());
    if (error == cudaSuccess && grid.shared_bytes > static_cast<size_t>(most)) error = cudaErrorInvalidValue;
    if (error == cudaSuccess && grid.shared_bytes > kSharedByDefault) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (error == cudaSuccess && grid.cluster > kPortableCluster) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.rows));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = grid.cluster > 0 ? 1 : 0;
  }
  Configuration(const Configuration&) = delete;

 private:
  static constexpr size_t kSharedByDefault = 48 << 10;
  static constexpr int kPortableCluster = 8;  // blocks that every chip with clusters takes
};

// Launches a kernel. A cluster of 0 is none.
template <typename Args>
void launch(void (*kernel)(Args), const Grid& grid, Stream stream, const Args& args) {
  const Configuration<Args> configuration(kernel, grid, stream);
  check(configuration.error, "attributes of a kernel");
  check(cudaLaunchKernelEx(&configuration.config, kernel, args), "cudaLaunchKernelEx");
}

// Launches a kernel whose blocks wait for each other: all at the same time, or not at all.
template <typename Args>
void launch_together(void (*kernel)(Args), const Grid& grid, Stream stream, const Args& args) {
  Configuration<Args> configuration(kernel, grid, stream);
  check(configuration.error, "attributes of a kernel");
  configuration.attribute.id = cudaLaunchAttributeCooperative;
  configuration.attribute.val.cooperative = 1;
  configuration.config.numAttrs = 1;
  check(cudaLaunchKernelEx(&configuration.config, kernel, args), "cudaLaunchKernelEx");
}

// The count; or 0 where the device cannot do what was asked about, which is a valid answer and no error.
inline int count_or_none(cudaError_t error, int count) {
  if (error == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

// How many clusters of such a kernel the current device runs at the same time; 0 if it can run none.
template <typename Args>
int clusters_at_once(void (*kernel)(Args), const Grid& grid) {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current_device()), "cudaDeviceGetAttribute");
  if (major < 9) return 0;
  const Configuration<Args> configuration(kernel, grid, nullptr);
  if (configuration.error != cudaSuccess) return count_or_none(configuration.error, 0);
  int count = 0;
  return count_or_none(cudaOccupancyMaxActiveClusters(&count, kernel, &configuration.config), count);
}

// How many blocks of such a kernel the current device runs at the same time; 0 if it can run none.
template <typename Args>
int blocks_at_once(void (*kernel)(Args), const Grid& grid) {
  int multiprocessors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, current_device());
  check(error, "cudaDeviceGetAttribute");
  const Configuration<Args> configuration(kernel, grid, nullptr);
  if (configuration.error != cudaSuccess) return count_or_none(configuration.error, 0);
  int of_each = 0;
  const cudaError_t asked =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, grid.threads, grid.shared_bytes);
  return count_or_none(asked, of_each) * multiprocessors;
}

inline void clear(void* memory, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, 0, bytes, stream), "cudaMemsetAsync");
}

}  // namespace pymtl::cuda
