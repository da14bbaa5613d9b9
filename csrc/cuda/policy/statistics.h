// Statistics that turn scores into a policy: each row's normaliser, head by head, and Z. Equations
// (3), (5) and (6) of ral_kernels/ops/policy/README.md.
#pragma once

#include "attention/marginals.h"
#include "policy/side.h"
#include "ral/divergence_math.h"

namespace ral {
namespace cuda {

struct PolicyStatisticsParams {
  ral_policy_common common;
  ral_policy_side side;
  float* w;  // [B, H, T] share of the valid keys, head by head, times the head's weight
  int32_t num_blocks;
};

// What a CTA has: rows of a head.
struct RowsOfStatistics {
  Sample sample;
  int64_t b, h, kv_head;
  int32_t first_row, num_rows;  // none: nothing to do

  RAL_DEVICE RowsOfStatistics(const PolicyStatisticsParams& params, int32_t block_q) {
    const ral_policy_common& common = params.common;
    const ral_policy_side& side = params.side;
    // Late causal rows see the most keys, so they start first.
    const int64_t program = block_index();
    int32_t block = params.num_blocks - 1 - int32_t(program % params.num_blocks);
    h = program / params.num_blocks % side.num_heads;
    b = program / params.num_blocks / side.num_heads;
    kv_head = h / (side.num_heads / side.num_kv_heads);
    sample = sample_of_block(common, common.cu_seqlens_q, block_q, block, b, 0,
                             int32_t(common.num_rows));
    first_row = sample.first_row + block * block_q;
    num_rows = minimum(block_q, sample.stop - first_row);
  }
};

// A row's maximum score in base 2, and the lane's parts of the sums relative to it.
struct RowStatistics {
  float m = minus_infinity(), valid = 0.0f, others = 0.0f;

  // Adds 64 keys, whose scores are those of the lane's i-th row. kFull: all are seen and valid.
  template <bool kFull, int kRowTiles>
  RAL_DEVICE void add(const float (&s)[kRowTiles][kBlockK / 8][4], int i, float scale,
                      const Mask& mask) {
    float highest = minus_infinity();
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
      for (int e = 0; e < 2; ++e)
        if (kFull || mask.sees(c, e)) highest = maximum(highest, s[i / 2][c][i % 2 * 2 + e]);
    const float before = m;
    m = maximum(before, quad_maximum(highest) * scale);
    const float stable = stabiliser(m);
    const float alpha = exp2(before - stable);
    float more_valid = 0.0f, more_others = 0.0f;  // of these keys: short sums round less
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float weight = exp2(s[i / 2][c][i % 2 * 2 + e] * scale - stable);
        if (kFull || mask.counts(c, e))
          more_valid += weight;
        else if (mask.sees(c, e))
          more_others += weight;
      }
    valid = valid * alpha + more_valid;
    others = others * alpha + more_others;
  }
};

// Writes norm and w of a warp's rows, numbered from the CTA's first row on.
template <int kRows>
RAL_DEVICE void store_statistics(const PolicyStatisticsParams& params, const RowsOfStatistics& at,
                                 int warp_row, const RowStatistics (&rows)[kRows]) {
  const ral_policy_common& common = params.common;
  const int64_t line = (at.b * params.side.num_heads + at.h) * common.num_rows + at.first_row;
  const int64_t inverses = common.batch_size * params.side.num_heads * common.num_rows;
  const float weight = head_weight(params.side, at.sample, at.h);
  RAL_UNROLL for (int i = 0; i < kRows; ++i) {
    const float valid = quad_sum(rows[i].valid), others = quad_sum(rows[i].others);
    // A row that sees no key gives 0.
    const float sum = valid + others, inverse = sum > 0.0f ? weight / sum : 0.0f;
    const int row = warp_row + row_in_warp(i);
    if (lane_index() % 4 != 0 || row >= at.num_rows) continue;
    store_global(params.side.norm + line + row, stabiliser(rows[i].m));
    store_global(params.side.norm + inverses + line + row, inverse);
    store_global(params.w + line + row, valid * inverse);
  }
}

// One CTA has kBlockQ rows of a head and walks over all keys that they see. Sums over valid keys
// and over other keys give the normaliser and W in one walk. K passes through shared memory; its
// next block arrives while scores are formed.
template <typename T, int kHeadDim>
struct policy_statistics_kernel {
  using Params = PolicyStatisticsParams;
  static constexpr int kRowTiles = 2, kWarps = 4;
  static constexpr int kRows = 2 * kRowTiles;  // per lane
  static constexpr int kWarpQ = 16 * kRowTiles;
  static constexpr int kBlockQ = kWarpQ * kWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMinBlocks = 3;
  using TileT = Tile<T, kHeadDim>;
  static constexpr int kSharedBytes = TileT::bytes(kBlockQ) + 2 * TileT::bytes(kBlockK);
  using Scores = float[kRowTiles][kBlockK / 8][4];
  static const char* name() { return "policy_statistics_kernel"; }

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const ral_policy_common& common = params.common;
    const ral_policy_side& side = params.side;
    const RowsOfStatistics at(params, kBlockQ);
    if (at.num_rows <= 0) return;
    const Visibility visibility = visibility_of(at.sample, side);
    const HeadKeys<T> keys(side, at.sample, at.kv_head);

    const TileT q{reinterpret_cast<T*>(shared)};
    const TileT k{q.data + kBlockQ * kHeadDim};  // double buffer
    copy_rows<kBlockQ, kThreads>(q, rows_of<const T>(side.q, at.b, at.h, at.first_row),
                                 side.q.stride_t, [&](int row) { return row < at.num_rows; });
    const KeysOfRows seen(visibility, at.first_row, at.num_rows);
    const int32_t begin = seen.low / kBlockK * kBlockK;
    KeyBits next(common, at.sample, begin);
    if (begin <= seen.high) keys.template copy_block<kThreads>(k, begin, next);
    commit_copies();

    RowStatistics rows[kRows];
    const float scale = side.scale * kLog2e;
    const int warp_row = warp_index() * kWarpQ;
    int offset = 0;  // of the tile in use
    for (int32_t first = begin; first <= seen.high; first += kBlockK) {
      const KeyBits bits = next;
      next = KeyBits(common, at.sample, first + kBlockK);
      wait_for_copies<0>();
      sync_block();  // the tile has arrived; the previous one is no longer read
      const TileT now{k.data + offset};
      offset = kBlockK * kHeadDim - offset;
      if (first + kBlockK <= seen.high)
        keys.template copy_block<kThreads>(TileT{k.data + offset}, first + kBlockK, next);
      commit_copies();
      if (warp_row >= at.num_rows) continue;
      Scores s;
      multiply_transposed(s, q, warp_row, now);
      Mask masks[kRows];
      RAL_UNROLL for (int i = 0; i < kRows; ++i)
        masks[i] =
            Mask::of_row(common, visibility, bits, at.first_row + warp_row + row_in_warp(i), first);
      const bool full = all_full(masks);
      RAL_UNROLL for (int i = 0; i < kRows; ++i) {
        if (full)
          rows[i].template add<true>(s, i, scale, masks[i]);
        else
          rows[i].template add<false>(s, i, scale, masks[i]);
      }
    }
    wait_for_copies<0>();  // in flight still where rows see no key
    store_statistics(params, at, warp_row, rows);
  }
};

struct PolicyShareParams {
  ral_policy_common common;
  ral_policy_side side;
  const float* w;  // [B, H, T]
};

// Z, one thread per row. Heads are summed in order.
struct policy_share_kernel {
  using Params = PolicyShareParams;
  static constexpr int kThreads = 128, kMinBlocks = 8, kSharedBytes = 0;
  static const char* name() { return "policy_share_kernel"; }

  RAL_DEVICE static void run(const Params& params, char*) {
    const int64_t num_rows = params.common.num_rows, num_heads = params.side.num_heads;
    const int64_t index = block_index() * kThreads + thread_index();
    if (index >= params.common.batch_size * num_rows) return;
    const int64_t b = index / num_rows, t = index % num_rows;
    float sum = 0.0f;
    for (int64_t h = 0; h < num_heads && t < stop_of_rows(params.common); ++h)
      sum += load_global(params.w + (b * num_heads + h) * num_rows + t);
    store_global(params.side.z + index, sum < kSmallestWeight ? 0.0f : sum / float(num_heads));
  }
};

}  // namespace cuda
}  // namespace ral
