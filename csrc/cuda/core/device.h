// The hardware that the CUDA kernels use, each feature as a function.
//
// nvcc turns the functions into instructions. tests/cuda_host implements them on the host, where
// the threads of a CTA run one after the other. That harness checks every access to memory. So
// kernels reach shared and global memory through these functions alone.
//
// A kernel is a struct with
//   kThreads, kMinBlocks (CTAs an SM should hold), kSharedBytes, Params, name(),
//   static void run(const Params&, char* shared)   for each thread of each CTA;
// `shared` is aligned to 128 bytes and holds kSharedBytes of undefined content.
#pragma once

#include "core/types.h"
#include "ral/attention_math.h"

#ifdef RAL_CUDA_ON_HOST

#include "host_device.h"  // tests/cuda_host

#else

#include <cuda_runtime.h>

#define RAL_DEVICE __device__ __forceinline__
#define RAL_UNROLL _Pragma("unroll")

namespace ral {
namespace cuda {

constexpr int kWarpSize = 32;

RAL_DEVICE int thread_index() {
  return int(threadIdx.x);
}
RAL_DEVICE int lane_index() {
  return int(threadIdx.x) % kWarpSize;
}
// A collective of the warp. The shuffle tells the compiler that all lanes have the same index, so
// values that depend on it stay out of per-lane registers.
RAL_DEVICE int warp_index() {
  return __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpSize, 0);
}
RAL_DEVICE int64_t block_index() {
  return int64_t(blockIdx.x);
}
RAL_DEVICE int64_t num_blocks() {
  return int64_t(gridDim.x);
}

// ---- Order between threads --------------------------------------------------------------------

// All threads of the CTA call it. Each then sees what any of them wrote before.
RAL_DEVICE void sync_block() {
  __syncthreads();
}
// The same for the lanes of a warp.
RAL_DEVICE void sync_warp() {
  __syncwarp();
}

// ---- Warp collectives: all lanes take part; lane numbers count modulo 32 ------------------------

template <typename V>  // int32_t, uint32_t or float
RAL_DEVICE V shuffle(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <typename V>
RAL_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// The value of lane - delta. A lane without such a neighbour gets its own.
template <typename V>
RAL_DEVICE V shuffle_up(V value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, delta);
}
RAL_DEVICE uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}

// ---- Memory: V has 1, 2, 4, 8 or 16 bytes; its address is a multiple of its size ----------------

template <typename V>
RAL_DEVICE V load_global(const V* address) {
  return *address;
}
template <typename V>
RAL_DEVICE void store_global(V* address, V value) {
  *address = value;
}
template <typename V>
RAL_DEVICE V load_shared(const V* address) {
  return *address;
}
template <typename V>
RAL_DEVICE void store_shared(V* address, V value) {
  *address = value;
}

RAL_DEVICE uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes. With `valid` false it writes zeros and reads nothing. This thread sees
// the bytes after `wait_for_copies`; others see them after a sync_block that follows it.
RAL_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}
// Closes a group of this thread's copies.
RAL_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until all but the newest `kPending` groups of this thread have arrived.
template <int kPending>
RAL_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Tensor cores, sm_80 ----------------------------------------------------------------------

// Loads four 8 x 8 matrices of 16-bit numbers. Lanes 8i to 8i + 7 give the addresses of the rows of
// matrix i, 16 bytes each. Lane l gets row l / 4, columns 2 (l % 4) and + 1 in registers[i]. A lane
// reads rows that others point to. So even its own stores need a sync_warp before this.
RAL_DEVICE void load_matrices(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same for the transposed matrices: lane l gets rows 2 (l % 4) and + 1 of column l / 4.
RAL_DEVICE void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], accumulated in float32. Let g = lane / 4 and j = 2 (lane % 4):
//   a[0]: row g, columns j and j + 1; a[1]: row g + 8; a[2]: row g, columns j + 8 and j + 9;
//   a[3]: row g + 8 of these columns. b0: rows j and j + 1 of column g; b1: rows j + 8 and j + 9.
//   c[0], c[1]: row g, columns j and j + 1; c[2], c[3]: row g + 8.
template <typename T>
RAL_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
RAL_DEVICE void multiply_add<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
RAL_DEVICE void multiply_add<Fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Numbers ----------------------------------------------------------------------------------

// Rounds two numbers to nearest even and packs them, the first in the lower half.
template <typename T>
RAL_DEVICE uint32_t pack(float low, float high);

template <>
RAL_DEVICE uint32_t pack<Bf16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
RAL_DEVICE uint32_t pack<Fp16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <typename T>
RAL_DEVICE Float2 unpack(uint32_t packed);

template <>
RAL_DEVICE Float2 unpack<Bf16>(uint32_t packed) {
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}

template <>
RAL_DEVICE Float2 unpack<Fp16>(uint32_t packed) {
  Float2 numbers;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(numbers.x), "=f"(numbers.y)
      : "r"(packed));
  return numbers;
}

// 2^x to 2 ulp, with 2^-inf = 0; log2 x, with log2 0 = -inf. Both take subnormal numbers for 0.
RAL_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
RAL_DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x to 1 ulp.
RAL_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
RAL_DEVICE float minus_infinity() {
  return __uint_as_float(0xff800000u);
}
RAL_DEVICE float maximum(float x, float y) {
  return fmaxf(x, y);
}
// Index of the lowest bit that is set; `bits` is not 0.
RAL_DEVICE int lowest_bit(uint64_t bits) {
  return __ffsll(static_cast<long long>(bits)) - 1;
}
// x, of which the compiler knows nothing. What is computed from it holds no registers from one turn
// of a loop to the next.
template <typename T>
RAL_DEVICE T* opaque(T* x) {
  asm volatile("" : "+l"(x));
  return x;
}
RAL_DEVICE int32_t opaque(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- Launch -----------------------------------------------------------------------------------

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    entry(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(128) char shared[];
  Kernel::run(params, shared);
}

// Launches `num_blocks` CTAs on the current device. Returns a cudaError_t, 0 for success.
template <typename Kernel>
int launch(int64_t num_blocks, const typename Kernel::Params& params, void* stream) {
  if (num_blocks == 0) return 0;
  if (num_blocks > 0x7fffffff) return int(cudaErrorInvalidConfiguration);
  if (Kernel::kSharedBytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(Kernel::kSharedBytes));
    if (error != cudaSuccess) return int(error);
  }
  void* arguments[] = {const_cast<typename Kernel::Params*>(&params)};
  return int(cudaLaunchKernel(reinterpret_cast<const void*>(&entry<Kernel>),
                              dim3(unsigned(num_blocks)), dim3(Kernel::kThreads), arguments,
                              size_t(Kernel::kSharedBytes), static_cast<cudaStream_t>(stream)));
}

}  // namespace cuda
}  // namespace ral

#endif
