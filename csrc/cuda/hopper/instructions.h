// What the kernels for Hopper (sm_90a) use beside device.h, each thing behind a name: barriers in
// shared memory, the copy engine (TMA), products of a warpgroup (wgmma), registers by role.
//
// Two proxies reach shared memory: ordinary instructions (generic), and copy engine and tensor
// cores (async). What one wrote, the other sees
//  - from the copy engine to anyone: behind a wait for the barrier that the copy completes on;
//  - from ordinary stores to the async proxy: behind publish_to_async() in the thread that stored,
//    and a barrier after it.
#pragma once

#include "core/device.h"
#include "hopper/layout.h"

#ifdef RAL_CUDA_ON_HOST

#include "host_hopper.h"  // tests/cuda_host

#else

#include <cuda.h>

#include "ral/attention.h"

namespace ral {
namespace cuda {

using TensorMap = CUtensorMap;  // 128 bytes at a multiple of 64, in a kernel's parameters

// ---- Barriers in shared memory: mbarrier
// ----------------------------------------------------------

using Barrier = uint64_t;

// A phase ends when `arrivals` threads have arrived and the bytes expected in it have been copied.
RAL_DEVICE void begin_barrier(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// By the thread that began barriers, before a sync_block: all, and the copy engine, see them.
RAL_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Releases what this thread did before.
RAL_DEVICE void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and adds `bytes` to what the phase expects.
RAL_DEVICE void arrive_expecting(Barrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Waits until the phase of that parity is over; acquires what was released in it.
RAL_DEVICE void wait(Barrier* barrier, uint32_t parity) {
  const uint32_t address = shared_address(barrier);
  uint32_t over;
  do {
    asm volatile(
        "{\n.reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(address), "r"(parity)
        : "memory");
  } while (over == 0);
}

// The four warps of a warpgroup, by a barrier of that number, of 1 to 15.
RAL_DEVICE void sync_group(int number) {
  asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory");
}

// ---- Copy engine ------------------------------------------------------------------------------

// Starts copying the map's box at (column, token, head, batch) into a panel; coordinates outside of
// the tensor give zeros, and count as copied.
RAL_DEVICE void copy_panel(void* panel, const TensorMap& map, int32_t column, int32_t token,
                           int32_t head, int32_t batch, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(panel)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(token), "r"(head), "r"(batch),
      "r"(shared_address(barrier))
      : "memory");
}

// Writes 16 bytes of zeros, which the async proxy reads behind publish_to_async and a barrier.
RAL_DEVICE void clear_shared(void* address) {
  store_shared(static_cast<Vector16*>(address), Vector16{{0, 0, 0, 0}});
}
RAL_DEVICE void publish_to_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Registers by role: of each thread of the calling warpgroup
// -----------------------------------

template <int kRegisters>
RAL_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
RAL_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Products of a warpgroup --------------------------------------------------------------------
//
// 64 rows, 16 a warp; accumulators as in tiles.h. A product runs on while its threads go on: until
// wait_for_products they touch neither its accumulators nor its left factor.

// Keeps the compiler from moving uses of registers across this place.
template <int kTiles>
RAL_DEVICE void pin(float (&x)[kTiles][4]) {
  RAL_UNROLL for (int c = 0; c < kTiles; ++c) RAL_UNROLL
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(x[c][e])::"memory");
}
template <int kTiles>
RAL_DEVICE void pin(uint32_t (&x)[kTiles][4]) {
  RAL_UNROLL for (int c = 0; c < kTiles; ++c) RAL_UNROLL
    for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(x[c][e])::"memory");
}

// Before the first product, and again after registers of products were read or written.
RAL_DEVICE void begin_products() {
  sync_warp();  // the instructions want whole warps
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Ends a group of products.
RAL_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until this warp's part of all but the newest `kPending` groups is done.
template <int kPending>
RAL_DEVICE void wait_for_products() {
  sync_warp();
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define RAL_TILE(x, c) "+f"(x[c][0]), "+f"(x[c][1]), "+f"(x[c][2]), "+f"(x[c][3])
#define RAL_TILES_8(x, c)                                                                         \
  RAL_TILE(x, c), RAL_TILE(x, c + 1), RAL_TILE(x, c + 2), RAL_TILE(x, c + 3), RAL_TILE(x, c + 4), \
      RAL_TILE(x, c + 5), RAL_TILE(x, c + 6), RAL_TILE(x, c + 7)
#define RAL_REGISTERS_0_31                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RAL_REGISTERS_32_63                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// s [64, 64] = a bᵀ, or with `accumulate` s += a bᵀ, over 16 columns of a and of b.
template <typename T>
RAL_DEVICE void start_scores(float (&s)[8][4], uint64_t a, uint64_t b, bool accumulate);

// out [64, 8 kTiles] += a b, a [64, 16] in registers, over 16 rows of b.
template <typename T>
RAL_DEVICE void start_product(float (&out)[8][4], const uint32_t (&a)[4], uint64_t b);
template <typename T>
RAL_DEVICE void start_product(float (&out)[16][4], const uint32_t (&a)[4], uint64_t b);

// In order: predicate (the accumulators count), factors of a and b, and which of the factors in
// shared memory is MN-major.
#define RAL_PRODUCTS(T, type)                                                                  \
  template <>                                                                                  \
  RAL_DEVICE void start_scores<T>(float (&s)[8][4], uint64_t a, uint64_t b, bool accumulate) { \
    asm volatile(                                                                              \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                           \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" RAL_REGISTERS_0_31    \
        "}, %32, %33, p, 1, 1, 0, 0;\n}"                                                       \
        : RAL_TILES_8(s, 0)                                                                    \
        : "l"(a), "l"(b), "r"(int(accumulate)));                                               \
  }                                                                                            \
  template <>                                                                                  \
  RAL_DEVICE void start_product<T>(float (&out)[8][4], const uint32_t (&a)[4], uint64_t b) {   \
    asm volatile(                                                                              \
        "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                             \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" RAL_REGISTERS_0_31    \
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"                                         \
        : RAL_TILES_8(out, 0)                                                                  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                 \
  }                                                                                            \
  template <>                                                                                  \
  RAL_DEVICE void start_product<T>(float (&out)[16][4], const uint32_t (&a)[4], uint64_t b) {  \
    asm volatile(                                                                              \
        "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                             \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" RAL_REGISTERS_0_31   \
        ", " RAL_REGISTERS_32_63 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"                \
        : RAL_TILES_8(out, 0), RAL_TILES_8(out, 8)                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                 \
  }

RAL_PRODUCTS(Bf16, "bf16")
RAL_PRODUCTS(Fp16, "f16")

#undef RAL_PRODUCTS
#undef RAL_REGISTERS_32_63
#undef RAL_REGISTERS_0_31
#undef RAL_TILES_8
#undef RAL_TILE

// ---- Launch -----------------------------------------------------------------------------------

// Whether the current device is one that code for sm_90a runs on.
inline bool is_hopper() {
  int device, major, minor;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

// Encodes a map whose boxes are panels; returns null, or why there is none. The driver's function
// is looked up at run time, so that nothing links against the driver.
inline const char* encode_map(TensorMap& map, int32_t dtype, const void* data,
                              const MapShape& shape) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) {
      cudaGetLastError();  // else the next launch would be blamed
      return Encode(nullptr);
    }
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found)
                                                 : Encode(nullptr);
  }();
  if (encode == nullptr) return "a driver without cuTensorMapEncodeTiled";
  const cuuint64_t sizes[4] = {shape.sizes[0], shape.sizes[1], shape.sizes[2], shape.sizes[3]};
  const cuuint64_t strides[3] = {shape.strides[0], shape.strides[1], shape.strides[2]};
  const cuuint32_t box[4] = {kPanelColumns, kPanelRows, 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result = encode(
      &map,
      dtype == RAL_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "a layout that cuTensorMapEncodeTiled refuses";
}

}  // namespace cuda
}  // namespace ral

#endif
