// Arithmetic of the Hopper kernels: tiles in shared memory, wgmma descriptors, shapes of tensor
// maps, stages of a ring. It compiles with nvcc and any C++ compiler.
// tests/native/test_hopper_layout.py checks it against the layouts of the PTX ISA.
#pragma once

#include <stdint.h>

#include "ral/attention.h"

#ifdef __CUDACC__
#define RAL_ARITHMETIC __host__ __device__ constexpr
#else
#define RAL_ARITHMETIC constexpr
#endif

namespace ral {
namespace cuda {

// ---- Tiles --------------------------------------------------------------------------------------
//
// A panel is 64 rows of 64 16-bit numbers, 128 bytes per row: one box of a tensor map. A tile of
// 128 columns is two panels, one after the other. TMA swizzles the 16-byte chunks of a row
// (CU_TENSOR_MAP_SWIZZLE_128B): chunk c of row r lies where chunk c ^ (r % 8) would. If panels
// begin at multiples of 1024 bytes, this XORs bits 4 to 6 of an address with its bits 7 to 9. wgmma
// undoes it when the descriptor names the same swizzle.

constexpr int kPanelRows = 64, kPanelColumns = 64;
constexpr int kPanelRowBytes = 2 * kPanelColumns;
constexpr int kPanelBytes = kPanelRows * kPanelRowBytes;
constexpr int kSwizzledRows = 8, kSwizzledBytes = kSwizzledRows * kPanelRowBytes;

// ---- Descriptors of wgmma operands in shared memory ---------------------------------------------
//
// PTX ISA, "Asynchronous warpgroup level matrix: matrix descriptor". Addresses and offsets count 16
// bytes:
//   bits 0-13   address (its low 18 bits)
//   bits 16-29  leading-dimension byte offset
//   bits 32-45  stride-dimension byte offset
//   bits 49-51  base offset: 0, since the 1024-byte pattern begins at multiples of 1024
//   bits 62-63  swizzle: 0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes
//
// K-major, 128-byte swizzle: rows of 128 bytes come in groups of 8. The stride offset leads from
// one group to the next; the leading offset is unused. 16 elements of the contracted dimension are
// 32 bytes of a row. The next 16 begin 32 bytes further, because the hardware swizzles the final
// address.
//
// MN-major: the contracted dimension runs over rows. The stride offset leads from 8 rows to the
// next 8. The leading offset leads from 64 columns to the next 64, so from panel to panel.

constexpr uint64_t kSwizzle128 = 1;

// `bytes` past a tile: a constant, so a tile is encoded once and each of its descriptors costs one
// 32-bit addition. It carries into no other field, because shared memory ends below 2^18 bytes.
RAL_ARITHMETIC uint64_t descriptor(uint32_t tile, int bytes, uint32_t leading_bytes,
                                   uint32_t stride_bytes) {
  const uint32_t low = ((tile & 0x3ffff) >> 4 | leading_bytes >> 4 << 16) + uint32_t(bytes >> 4);
  return uint64_t(low) | uint64_t(stride_bytes >> 4) << 32 | kSwizzle128 << 62;
}

// Columns [16 step, 16 step + 16) of a tile, contracted over. A row of the tile is a row of the
// operand.
RAL_ARITHMETIC uint64_t columns_descriptor(uint32_t tile, int step) {
  return descriptor(tile, step / 4 * kPanelBytes + step % 4 * 32, 16, kSwizzledBytes);
}

// Rows [16 step, 16 step + 16) of a tile, contracted over. A column of the tile is a row of the
// operand.
RAL_ARITHMETIC uint64_t rows_descriptor(uint32_t tile, int step) {
  return descriptor(tile, step * 2 * kSwizzledBytes, kPanelBytes, kSwizzledBytes);
}

// ---- Tensor maps --------------------------------------------------------------------------------

// [head_dim, tokens, heads, batch], with the strides in bytes of all but the first.
struct MapShape {
  uint64_t sizes[4];
  uint64_t strides[3];
};

// Fills `shape`. Returns null, or the reason why no tensor map can describe the tensor.
inline const char* map_shape(const ral_tensor& x, int64_t head_dim, int64_t num_tokens,
                             int64_t num_heads, int64_t batch_size, MapShape& shape) {
  constexpr int64_t kElementBytes = 2, kStrideLimit = int64_t(1) << 40;
  const int64_t sizes[4] = {head_dim, num_tokens, num_heads, batch_size};
  const int64_t strides[3] = {x.stride_t, x.stride_h, x.stride_b};
  if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0) return "an address off 16 bytes";
  int64_t dense = head_dim * kElementBytes;
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] <= 0) return "a tensor without elements";
    if (sizes[i] > INT32_MAX) return "a dimension beyond 32 bits";
    shape.sizes[i] = uint64_t(sizes[i]);
  }
  for (int i = 0; i < 3; ++i) {
    // Nothing steps along a dimension of size 1, so its stride may be anything. The map gets one
    // that it can hold.
    int64_t bytes = strides[i] * kElementBytes;
    if (sizes[i + 1] == 1)
      bytes = dense;
    else if (strides[i] <= 0 || strides[i] >= kStrideLimit)
      return strides[i] == 0 ? "a stride of 0" : "a stride beyond 40 bits";
    else if (i == 0 && bytes < head_dim * kElementBytes)
      return "rows that overlap";
    if (bytes % 16 != 0) return "a stride off 16 bytes";
    if (bytes >= kStrideLimit) return "a stride beyond 40 bits";
    shape.strides[i] = uint64_t(bytes);
    dense = bytes > dense ? bytes : dense;
  }
  return nullptr;
}

// ---- Ring ---------------------------------------------------------------------------------------

// Stage and parity of one user of a ring of kStages buffers. An mbarrier counts phases. A wait for
// `parity` returns once the phase of that parity has ended.
//
// Use n of the ring takes buffer n % kStages. Its fill ends phase n / kStages of the mbarrier
// `full`; its release ends the same phase of `empty`. A consumer waits for full[stage] with
// parity(). The producer waits for empty[stage] with the other parity. On the first turn that is
// the parity of the phase before the first, which counts as ended.
template <int kStages>
struct Ring {
  int32_t stage = 0;
  uint32_t turn = 0;  // turns of the ring, modulo 2

  RAL_ARITHMETIC uint32_t parity() const { return turn; }
  RAL_ARITHMETIC uint32_t parity_before() const { return turn ^ 1; }
  RAL_ARITHMETIC void advance() {
    if (++stage == kStages) {
      stage = 0;
      turn ^= 1;
    }
  }
};

// The places of one user in two rings that advance together.
template <int kFirst, int kSecond>
struct TwoRings {
  Ring<kFirst> first;
  Ring<kSecond> second;  // of rings of one size the first serves both

  RAL_ARITHMETIC int32_t stage(int which) const {
    return uses_first(which) ? first.stage : second.stage;
  }
  RAL_ARITHMETIC uint32_t parity(int which) const {
    return uses_first(which) ? first.parity() : second.parity();
  }
  RAL_ARITHMETIC uint32_t parity_before(int which) const { return parity(which) ^ 1; }
  RAL_ARITHMETIC void advance() {
    first.advance();
    if (kFirst != kSecond) second.advance();
  }

 private:
  RAL_ARITHMETIC static bool uses_first(int which) { return which == 0 || kFirst == kSecond; }
};

}  // namespace cuda
}  // namespace ral
