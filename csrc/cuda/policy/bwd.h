// What dq and dk share: dS of an element, and how a tile of dS is rounded. Equations (5) to (7) of
// ral_kernels/ops/policy/divergence.md. These kernels have no soft cap, so dx = dS.
#pragma once

#include <string.h>

#include "policy/side.h"

namespace ral {
namespace cuda {

struct PolicyBwdParams {
  ral_policy_common common;
  ral_policy_side side;
  RowChunk chunk;
  int32_t num_blocks;         // of rows or of keys
  int32_t pieces;             // that a row's keys are cut into
  int32_t keys_per_piece;     // a multiple of kBlockK
  const float* l;             // [samples, rows, chunk.stride]
  const float* c;             // [samples, rows] (4)
  const float* factor;        // [samples, H, rows] dD / (Z H) times the row's w_h / sum, or 0
  const float* delta;         // [samples, H, rows] (6), with dD, times the row's w_h / sum
  ral_tensor dq, dk;          // of the side's type
  float* dq_parts;            // [pieces, samples, H, rows, D]; null = dq itself is written
  float* dk_so_far;           // [Hk, N, D] float32 sum over the chunks so far, or null
  int32_t is_first, is_last;  // whether the chunk is its sample's first, or last
};

// What a CTA has: rows of a head of a chunk, and a piece of the keys that they see.
struct RowsOfHead {
  Sample sample;
  int64_t b, h, kv_head, piece;
  int32_t first_row, num_rows;  // none: nothing to do
  int32_t begin, end;           // the piece's keys [begin, end), in blocks of kBlockK

  RAL_DEVICE RowsOfHead(const PolicyBwdParams& params, int32_t block_q) {
    const RowChunk& chunk = params.chunk;
    const int64_t num_heads = params.side.num_heads;
    // Late causal rows see the most keys, so they start first.
    const int64_t program = block_index();
    int32_t block = params.num_blocks - 1 - int32_t(program % params.num_blocks);
    h = program / params.num_blocks % num_heads;
    const int64_t rest = program / params.num_blocks / num_heads;
    b = chunk.first_sample + rest % chunk.num_samples;
    piece = rest / chunk.num_samples;
    kv_head = h / (num_heads / params.side.num_kv_heads);
    sample = sample_of_block(params.common, params.common.cu_seqlens_q, block_q, block, b,
                             chunk.first_row, chunk.stop());
    first_row = sample.first_row + block * block_q;
    num_rows = minimum(block_q, sample.stop - first_row);
    const KeysOfRows seen(visibility_of(sample, params.side), first_row, num_rows);
    const int32_t start = int32_t(piece) * params.keys_per_piece;
    begin = maximum(seen.low / kBlockK * kBlockK, start);
    end = minimum(seen.high + 1, start + params.keys_per_piece);
  }

  // Index of the CTA's first row in [pieces, samples, H, rows].
  RAL_DEVICE int64_t in_parts(const PolicyBwdParams& params) const {
    const RowChunk& chunk = params.chunk;
    const int64_t per_piece = chunk.num_samples * params.side.num_heads * chunk.num_rows;
    return piece * per_piece + chunk.at(int32_t(b), params.side.num_heads, h, first_row);
  }

  // Loads l of a warp's rows and keys [first, first + 64), in the layout of accumulators.
  RAL_DEVICE void load_l(const PolicyBwdParams& params, int warp_row, int32_t first,
                         float (&l)[1][kBlockK / 8][4]) const {
    const RowChunk& chunk = params.chunk;
    const float* const lines =
        params.l + chunk.at(int32_t(b), first_row) * chunk.stride + first + 2 * (lane_index() % 4);
    RAL_UNROLL for (int i = 0; i < 2; ++i) {
      const int row = warp_row + row_in_warp(i);
      const float* const line = lines + row * chunk.stride;
      RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) {
        Float2 pair{0.0f, 0.0f};
        if (row < num_rows) pair = load_global(reinterpret_cast<const Float2*>(line + 8 * c));
        l[0][c][2 * i] = pair.x;
        l[0][c][2 * i + 1] = pair.y;
      }
    }
  }
};

// (5) and (7) of one element. `weight` is relative to the row's stabiliser; `factor` and `delta`
// contain the row's w_h / sum. A weight of 0 has gradient 0, whatever l is.
RAL_DEVICE float gradient_of_policy_score(float weight, float l, float c, float factor,
                                          float delta) {
  return weight == 0.0f ? 0.0f : weight * ((l - c) * factor - delta);
}

// Prepares element e of column tile c for dS. A key that the row does not see gets weight 0. A key
// that does not count gets l = `mean`, so that its G is 0.
RAL_DEVICE void hide_element(const Mask& mask, int c, int e, float mean, float& score, float& l) {
  if (!mask.sees(c, e)) score = minus_infinity();
  if (!mask.counts(c, e)) l = mean;
}

// What rows of dS are multiplied by before they are rounded to T. bfloat16 has the range of float32
// and needs no factor.
template <typename T, int kRows>
struct Units {
  template <int kInnerTiles, int kSumTiles>
  RAL_DEVICE void apply(float (&)[1][kInnerTiles][4], float (&)[1][kSumTiles][4]) {}
  RAL_DEVICE float inverse(int) const { return 1.0f; }
};

// Near the reference dS is about 1e-6, where float16 has few digits left. So each row gets a power
// of two that brings its largest element so far near 2^13. When that factor shrinks, the sum so far
// shrinks with it.
template <int kRows>
struct Units<Fp16, kRows> {
  float unit[kRows];

  RAL_DEVICE Units() {
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      unit[i] = power_of_two(kLargest);
  }

  template <int kInnerTiles, int kSumTiles>
  RAL_DEVICE void apply(float (&ds)[1][kInnerTiles][4], float (&sum)[1][kSumTiles][4]) {
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      float highest = 0.0f;
      RAL_UNROLL for (int c = 0; c < kInnerTiles; ++c) RAL_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float x = ds[0][c][2 * i + e];
          highest = maximum(highest, maximum(x, -x));
        }
      const float wanted = power_of_two(minimum(13 - exponent(quad_maximum(highest)), kLargest));
      if (wanted < unit[i]) {
        const float alpha = wanted / unit[i];
        unit[i] = wanted;
        RAL_UNROLL for (int c = 0; c < kSumTiles; ++c) RAL_UNROLL
          for (int e = 0; e < 2; ++e) sum[0][c][2 * i + e] *= alpha;
      }
      RAL_UNROLL for (int c = 0; c < kInnerTiles; ++c) RAL_UNROLL
        for (int e = 0; e < 2; ++e) ds[0][c][2 * i + e] *= unit[i];
    }
  }
  RAL_DEVICE float inverse(int i) const { return 1.0f / unit[i]; }

 private:
  static constexpr int32_t kLargest = 100;  // its inverse is a normal number

  // Exponent of x >= 0: -127 for 0, 128 for inf and NaN.
  RAL_DEVICE static int32_t exponent(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return int32_t(bits >> 23 & 0xff) - 127;
  }
  // 2^n; the result must be normal.
  RAL_DEVICE static float power_of_two(int32_t n) {
    const uint32_t bits = uint32_t(n + 127) << 23;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
};

}  // namespace cuda
}  // namespace ral
