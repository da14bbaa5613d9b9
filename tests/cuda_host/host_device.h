// The names of csrc/cuda/core/device.h for the host compiler: see README.md. Included by device.h
// alone.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "core/types.h"
#include "harness.h"
#include "numbers.h"

#define RAL_DEVICE inline
#define RAL_UNROLL

namespace ral {
namespace cuda {

constexpr int kWarpSize = host::kLanes;

using host::Site;
using host::Stop;

inline int thread_index() {
  return host::current_thread;
}
inline int lane_index() {
  return host::current_thread % kWarpSize;
}
// A collective here as there: on the GPU it is a shuffle.
inline int warp_index(Site site = Site::here()) {
  return int(host::exchange(Stop::kWarpIndex, uint32_t(host::current_thread / kWarpSize), 0, site));
}
inline int64_t block_index() {
  return host::current_block;
}
inline int64_t num_blocks() {
  return host::current_num_blocks;
}

// ---- Order between threads --------------------------------------------------------------------

inline void sync_block(Site site = Site::here()) {
  host::sync(Stop::kSyncBlock, site);
}
inline void sync_warp(Site site = Site::here()) {
  host::sync(Stop::kSyncWarp, site);
}

// ---- Between the lanes of a warp --------------------------------------------------------------

namespace host {

// Lanes count modulo 32, as in the instruction.
template <typename V>
V shuffled(Stop kind, V value, int source, Site site) {
  static_assert(std::is_same<V, int32_t>::value || std::is_same<V, uint32_t>::value ||
                    std::is_same<V, float>::value,
                "shuffles are of int32_t, uint32_t or float");
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits = exchange(kind, bits, source & (kLanes - 1), site);
  memcpy(&value, &bits, sizeof bits);
  return value;
}

template <typename V>
constexpr bool is_access() {
  return std::is_trivially_copyable<V>::value && sizeof(V) <= 16 &&
         (sizeof(V) & (sizeof(V) - 1)) == 0;
}

}  // namespace host

template <typename V>
V shuffle(V value, int lane, Site site = Site::here()) {
  return host::shuffled(Stop::kShuffle, value, lane, site);
}
template <typename V>
V shuffle_xor(V value, int mask, Site site = Site::here()) {
  return host::shuffled(Stop::kShuffleXor, value, lane_index() ^ mask, site);
}
template <typename V>
V shuffle_up(V value, int delta, Site site = Site::here()) {
  const int below = lane_index() - (delta & (kWarpSize - 1));
  return host::shuffled(Stop::kShuffleUp, value, below < 0 ? lane_index() : below, site);
}
inline uint32_t ballot(bool predicate, Site site = Site::here()) {
  return host::vote(predicate, site);
}

// ---- Memory -----------------------------------------------------------------------------------

// Memory may hold another type than V, which is legal on the GPU: bytes are copied. What must not
// be read reads as NaN.
#define RAL_HOST_LOAD(name, may_read)                                    \
  template <typename V>                                                  \
  V name(const V* address, Site site = Site::here()) {                   \
    static_assert(host::is_access<V>(), "1, 2, 4, 8 or 16 plain bytes"); \
    V value;                                                             \
    if (host::may_read(address, int(sizeof(V)), site))                   \
      memcpy(static_cast<void*>(&value), address, sizeof(V));            \
    else                                                                 \
      memset(static_cast<void*>(&value), 0xff, sizeof(V));               \
    return value;                                                        \
  }
#define RAL_HOST_STORE(name, may_write)                                  \
  template <typename V>                                                  \
  void name(V* address, V value, Site site = Site::here()) {             \
    static_assert(host::is_access<V>(), "1, 2, 4, 8 or 16 plain bytes"); \
    if (host::may_write(address, int(sizeof(V)), site))                  \
      memcpy(static_cast<void*>(address), &value, sizeof(V));            \
  }
RAL_HOST_LOAD(load_global, may_read_global)
RAL_HOST_LOAD(load_shared, may_read_shared)
RAL_HOST_STORE(store_global, may_write_global)
RAL_HOST_STORE(store_shared, may_write_shared)
#undef RAL_HOST_LOAD
#undef RAL_HOST_STORE

inline uint32_t shared_address(const void* pointer, Site site = Site::here()) {
  return host::shared_offset(pointer, site);
}

inline void copy_async(void* shared, const void* global, bool valid, Site site = Site::here()) {
  host::copy_async(shared, global, valid, site);
}
inline void commit_copies() {
  host::commit_copies();
}
template <int kPending>
void wait_for_copies() {
  static_assert(kPending >= 0, "a number of groups");
  host::wait_for_copies(kPending);
}

// ---- Tensor cores -----------------------------------------------------------------------------

inline void load_matrices(uint32_t (&registers)[4], const void* row, Site site = Site::here()) {
  host::load_matrices(Stop::kLoadMatrices, registers, row, site);
}
inline void load_matrices_transposed(uint32_t (&registers)[4], const void* row,
                                     Site site = Site::here()) {
  host::load_matrices(Stop::kLoadMatricesTransposed, registers, row, site);
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Site site = Site::here());

template <>
inline void multiply_add<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                               Site site) {
  host::multiply_add(Stop::kMultiplyAddBf16, c, a, b0, b1, site);
}
template <>
inline void multiply_add<Fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                               Site site) {
  host::multiply_add(Stop::kMultiplyAddFp16, c, a, b0, b1, site);
}

// ---- Numbers ----------------------------------------------------------------------------------

template <typename T>
uint32_t pack(float low, float high);

template <>
inline uint32_t pack<Bf16>(float low, float high) {
  return host::bf16_of(low) | uint32_t(host::bf16_of(high)) << 16;
}
template <>
inline uint32_t pack<Fp16>(float low, float high) {
  return host::fp16_of(low) | uint32_t(host::fp16_of(high)) << 16;
}

template <typename T>
Float2 unpack(uint32_t packed);

template <>
inline Float2 unpack<Bf16>(uint32_t packed) {
  return {host::float_of_bf16(packed & 0xffffu), host::float_of_bf16(packed >> 16)};
}
template <>
inline Float2 unpack<Fp16>(uint32_t packed) {
  return {host::float_of_fp16(packed & 0xffffu), host::float_of_fp16(packed >> 16)};
}

namespace host {
constexpr float kSmallestNormal = 0x1p-126f;
}

inline float exp2(float x) {
  const float y = ::exp2f(x);
  return y < host::kSmallestNormal ? 0.f : y;
}
inline float reciprocal(float x) {
  return 1.0f / x;
}
inline float log2(float x) {
  return ::fabsf(x) < host::kSmallestNormal ? -INFINITY : ::log2f(x);
}
inline float minus_infinity() {
  return -INFINITY;
}
inline float maximum(float x, float y) {
  return ::fmaxf(x, y);
}
inline int lowest_bit(uint64_t bits) {
  return __builtin_ctzll(bits);
}
template <typename T>
T* opaque(T* x) {
  return x;
}
inline int32_t opaque(int32_t x) {
  return x;
}

// ---- Launch -----------------------------------------------------------------------------------

template <typename Kernel>
int launch(int64_t num_blocks, const typename Kernel::Params& params, void*) {
  using Params = typename Kernel::Params;
  static_assert(std::is_trivially_copyable<Params>::value, "a kernel gets a copy of the bits");
  static_assert(sizeof(Params) <= 4096, "sm_80 passes at most 4 KiB of parameters");
  static_assert(Kernel::kMinBlocks >= 1, "an SM holds a block");
  const host::LaunchInfo info = {
      Kernel::name(), int64_t(Kernel::kThreads), int64_t(Kernel::kSharedBytes),
      [](const void* p, char* shared) { Kernel::run(*static_cast<const Params*>(p), shared); }};
  return host::launch(info, num_blocks, &params);
}

}  // namespace cuda
}  // namespace ral
