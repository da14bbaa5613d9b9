// The sums over a row's valid keys that its gradient needs, U and W of "Backward" in
// ral_kernels/ops/policy/README.md. `policy_divergence` has U from policy_terms_kernel instead.
#pragma once

#include "policy/bwd.h"

namespace ral {
namespace cuda {

struct PolicyMomentsParams {
  PolicyBwdParams bwd;       // of it norm, l and pieces of the keys
  float *u_parts, *w_parts;  // [pieces, samples, H, rows]
  float *u, *w;              // [B, H, T], of all pieces
};

// One CTA has kBlockQ rows of a head and a piece of the keys, as in policy_bwd_dq_kernel.
template <typename T, int kHeadDim>
struct policy_moments_kernel {
  using Params = PolicyMomentsParams;
  static constexpr int kWarps = 4, kRows = 2;
  static constexpr int kBlockQ = 16 * kWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMinBlocks = kHeadDim == 64 ? 4 : 3;
  using TileT = Tile<T, kHeadDim>;
  static constexpr int kSharedBytes = TileT::bytes(kBlockQ) + 2 * TileT::bytes(kBlockK);
  using Elements = float[1][kBlockK / 8][4];
  static const char* name() { return "policy_moments_kernel"; }

  // The lane's parts of a row's sums, relative to 2^m.
  struct Row {
    float m, u, w;
  };

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const RowsOfHead at(params.bwd, kBlockQ);
    if (at.num_rows <= 0) return;
    const TileT q{reinterpret_cast<T*>(shared)};
    const TileT k{q.data + kBlockQ * kHeadDim};  // double buffer
    const ral_policy_common& common = params.bwd.common;
    const ral_policy_side& side = params.bwd.side;
    const Visibility visibility = visibility_of(at.sample, side);
    const HeadKeys<T> keys(side, at.sample, at.kv_head);
    copy_rows<kBlockQ, kThreads>(q, rows_of<const T>(side.q, at.b, at.h, at.first_row),
                                 side.q.stride_t, [&](int row) { return row < at.num_rows; });
    KeyBits next(common, at.sample, at.begin);
    if (at.begin < at.end) keys.template copy_block<kThreads>(k, at.begin, next);
    commit_copies();

    const int warp_row = warp_index() * 16;
    const float scale = side.scale * kLog2e;
    const float* const norm =
        side.norm + (at.b * side.num_heads + at.h) * common.num_rows + at.first_row;
    Row rows[kRows];
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const int row = warp_row + row_in_warp(i);
      rows[i] = Row{row < at.num_rows ? load_global(norm + row) : 0.0f, 0.0f, 0.0f};
    }
    int offset = 0;  // of the tile in use
    for (int32_t first = at.begin; first < at.end; first += kBlockK) {
      const KeyBits bits = next;
      next = KeyBits(common, at.sample, first + kBlockK);
      wait_for_copies<0>();
      sync_block();  // the tile has arrived; the previous one is no longer read
      const TileT now{k.data + offset};
      offset = kBlockK * kHeadDim - offset;
      if (first + kBlockK < at.end)
        keys.template copy_block<kThreads>(TileT{k.data + offset}, first + kBlockK, next);
      commit_copies();
      if (warp_row >= at.num_rows) continue;
      Elements l, s;
      at.load_l(params.bwd, warp_row, first, l);
      multiply_transposed(s, q, warp_row, now);
      Mask masks[kRows];
      RAL_UNROLL for (int i = 0; i < kRows; ++i)
        masks[i] =
            Mask::of_row(common, visibility, bits, at.first_row + warp_row + row_in_warp(i), first);
      const bool full = all_full(masks);
      RAL_UNROLL for (int i = 0; i < kRows; ++i) {
        if (full)
          add<true>(rows[i], s, l, i, scale, masks[i]);
        else
          add<false>(rows[i], s, l, i, scale, masks[i]);
      }
    }
    wait_for_copies<0>();  // in flight still where the piece has no key of the rows

    const int64_t inverses = common.batch_size * side.num_heads * common.num_rows;
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const float u = quad_sum(rows[i].u), w = quad_sum(rows[i].w);
      const int row = warp_row + row_in_warp(i);
      if (lane_index() % 4 != 0 || row >= at.num_rows) continue;
      const float inverse = load_global(norm + inverses + row);
      const int64_t part = at.in_parts(params.bwd) + row;
      store_global(params.u_parts + part, u * inverse);
      store_global(params.w_parts + part, w * inverse);
    }
  }

 private:
  // Adds a block of keys to the lane's i-th row. kFull: all keys are valid.
  template <bool kFull>
  RAL_DEVICE static void add(Row& row, const Elements& s, const Elements& l, int i, float scale,
                             const Mask& mask) {
    float u = 0.0f, w = 0.0f;  // of this block: short sums round less
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (!kFull && !mask.counts(c, e)) continue;
        const float weight = exp2(s[0][c][2 * i + e] * scale - row.m);
        u += weight * l[0][c][2 * i + e];
        w += weight;
      }
    row.u += u;
    row.w += w;
  }
};

// Adds the pieces of U and W in order, one thread per row of a head.
struct policy_join_moments_kernel {
  using Params = PolicyMomentsParams;
  static constexpr int kThreads = 128, kMinBlocks = 8, kSharedBytes = 0;
  static const char* name() { return "policy_join_moments_kernel"; }

  RAL_DEVICE static void run(const Params& params, char*) {
    const RowChunk& chunk = params.bwd.chunk;
    const int64_t num_heads = params.bwd.side.num_heads;
    const int64_t per_piece = chunk.num_samples * num_heads * chunk.num_rows;
    const int64_t index = block_index() * kThreads + thread_index();
    if (index >= per_piece) return;
    const int64_t t = chunk.first_row + index % chunk.num_rows;
    if (t >= stop_of_rows(params.bwd.common)) return;
    float u = 0.0f, w = 0.0f;
    for (int32_t i = 0; i < params.bwd.pieces; ++i) {
      u += load_global(params.u_parts + i * per_piece + index);
      w += load_global(params.w_parts + i * per_piece + index);
    }
    const int64_t head = chunk.first_sample * num_heads + index / chunk.num_rows;
    store_global(params.u + head * params.bwd.common.num_rows + t, u);
    store_global(params.w + head * params.bwd.common.num_rows + t, w);
  }
};

}  // namespace cuda
}  // namespace ral
