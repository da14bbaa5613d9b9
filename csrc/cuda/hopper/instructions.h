// The hardware of the Hopper kernels (sm_90a) beyond device.h: mbarriers, TMA copies, wgmma,
// registers by role. tests/cuda_host implements the same functions on the host.
//
// Shared memory has two proxies: generic (ordinary loads and stores) and async (TMA, wgmma). A TMA
// write is visible once a thread has waited on the copy's mbarrier. An ordinary store is visible to
// TMA and wgmma after `publish_to_async()` in the storing thread and a barrier.
#pragma once

#include "core/device.h"
#include "hopper/layout.h"

#ifdef RAL_CUDA_ON_HOST

#include "host_hopper.h"  // tests/cuda_host

#else

#include <cuda.h>
#ifdef RAL_CUDA_CHECKS
#include <stdio.h>
#endif

#include "ral/attention.h"

namespace ral {
namespace cuda {

using TensorMap = CUtensorMap;  // 128 bytes, aligned to 64; a kernel takes it as a parameter

// ---- mbarriers ----------------------------------------------------------------------------------

using Barrier = uint64_t;

// A phase ends when `arrivals` threads have arrived and all expected bytes have been copied.
RAL_DEVICE void begin_barrier(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// The thread that began the mbarriers calls this before a sync_block. After it all threads and TMA
// see them.
RAL_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Releases this thread's earlier accesses.
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
// Waits until the phase of this parity has ended. Acquires what was released in it. With
// RAL_CUDA_CHECKS, a wait of 10^8 clocks says where it stands and ends the kernel, which would
// hang. The call of printf makes ptxas serialise wgmma: that build is for finding a hang, not for
// timing.
RAL_DEVICE void wait(Barrier* barrier, uint32_t parity, const char* file = __builtin_FILE(),
                     int line = __builtin_LINE()) {
  const uint32_t address = shared_address(barrier);
  uint32_t over;
#ifdef RAL_CUDA_CHECKS
  const long long begin = clock64();
#endif
  do {
    asm volatile(
        "{\n.reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(address), "r"(parity)
        : "memory");
#ifdef RAL_CUDA_CHECKS
    if (over == 0 && clock64() - begin > 100000000) {
      printf(
          "%s:%d: CTA %u, thread %u waits for ever for parity %u of the mbarrier at shared + %u\n",
          file, line, blockIdx.x, threadIdx.x, parity, address);
      __trap();
    }
#endif
  } while (over == 0);
}

// Synchronises the four warps of a warpgroup on named barrier `number`, 1 to 15.
RAL_DEVICE void sync_group(int number) {
  asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory");
}

// ---- TMA ----------------------------------------------------------------------------------------

// Starts a TMA copy of the map's box at (column, token, head, batch) to a panel. Coordinates
// outside the tensor give zeros, which count as copied bytes.
RAL_DEVICE void copy_panel(void* panel, const TensorMap& map, int32_t column, int32_t token,
                           int32_t head, int32_t batch, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(panel)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(token), "r"(head), "r"(batch),
      "r"(shared_address(barrier))
      : "memory");
}

// An ordinary store of 16 bytes of zeros. The async proxy sees it after publish_to_async() and a
// barrier.
RAL_DEVICE void clear_shared(void* address) {
  store_shared(static_cast<Vector16*>(address), Vector16{{0, 0, 0, 0}});
}
RAL_DEVICE void publish_to_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Registers by role, for each thread of the calling warpgroup --------------------------------

template <int kRegisters>
RAL_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
RAL_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma --------------------------------------------------------------------------------------
//
// A product has 64 rows, 16 per warp; accumulators lie as in core/tiles.h. It runs while its
// threads go on. Until wait_for_products they touch neither its accumulators nor its A operand.

// Keeps the compiler from moving accesses to x across this point.
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

// Call it before the first product, and again after accessing registers of products.
RAL_DEVICE void begin_products() {
  sync_warp();  // wgmma needs converged warps
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes a group of products.
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
#define RAL_REGISTERS_64_127                                                              \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, " \
  "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "    \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "  \
  "%126, %127"

// s [64, 64] = a bᵀ, or s += a bᵀ with `accumulate`, contracted over 16 columns of a and b.
template <typename T>
RAL_DEVICE void start_scores(float (&s)[8][4], uint64_t a, uint64_t b, bool accumulate);
// The same with a's [64, 16] in registers.
template <typename T>
RAL_DEVICE void start_scores(float (&s)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate);

// out [64, 8 kTiles] += a b, with a [64, 16] in registers, contracted over 16 rows of b.
template <typename T>
RAL_DEVICE void start_product(float (&out)[8][4], const uint32_t (&a)[4], uint64_t b);
template <typename T>
RAL_DEVICE void start_product(float (&out)[16][4], const uint32_t (&a)[4], uint64_t b);
template <typename T>
RAL_DEVICE void start_product(float (&out)[32][4], const uint32_t (&a)[4], uint64_t b);

// The last operands, in order: p (keep the accumulators), the signs of a and b. Then, for each
// operand in shared memory, whether it is MN-major.
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
  RAL_DEVICE void start_scores<T>(float (&s)[8][4], const uint32_t (&a)[4], uint64_t b,        \
                                  bool accumulate) {                                           \
    asm volatile(                                                                              \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                           \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" RAL_REGISTERS_0_31    \
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"                                         \
        : RAL_TILES_8(s, 0)                                                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));           \
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
  }                                                                                            \
  template <>                                                                                  \
  RAL_DEVICE void start_product<T>(float (&out)[32][4], const uint32_t (&a)[4], uint64_t b) {  \
    asm volatile(                                                                              \
        "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                             \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" RAL_REGISTERS_0_31   \
        ", " RAL_REGISTERS_32_63 ", " RAL_REGISTERS_64_127                                     \
        "}, {%128, %129, %130, %131}, %132, p, 1, 1, 1;\n}"                                    \
        : RAL_TILES_8(out, 0), RAL_TILES_8(out, 8), RAL_TILES_8(out, 16), RAL_TILES_8(out, 24) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                 \
  }

RAL_PRODUCTS(Bf16, "bf16")
RAL_PRODUCTS(Fp16, "f16")

#undef RAL_PRODUCTS
#undef RAL_REGISTERS_64_127
#undef RAL_REGISTERS_32_63
#undef RAL_REGISTERS_0_31
#undef RAL_TILES_8
#undef RAL_TILE

// ---- Launch -----------------------------------------------------------------------------------

// Whether the current device runs code for sm_90a.
inline bool is_hopper() {
  int device, major, minor;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

// Encodes a map whose boxes are panels. Returns null, or the reason why it cannot. The driver's
// function is looked up at run time, so the library does not link against the driver.
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
      cudaGetLastError();  // or the next launch would report this error
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
