// p of a policy; or, where it is compared with r, the terms of the divergence and their moments.
// Equations (5) and (7) of ral_kernels/ops/policy/README.md, (1) to (3) of
// ral_kernels/ops/policy/divergence.md.
#pragma once

#include "policy/divergence_terms.h"
#include "policy/target.h"

namespace ral {
namespace cuda {

struct PolicyTermsParams {
  ral_policy_common common;
  ral_policy_side side;
  RowChunk chunk;
  int32_t num_row_blocks, num_key_blocks;
  int64_t other_left, other_right;  // windows of the policy that this one is compared with
  float* p;                         // [samples, rows, chunk.stride]
  // [samples, rows, chunk.stride / kTermKeys] sums of (1) over a CTA's keys. Null where p itself is
  // wanted: there is nothing to compare it with.
  float* value_parts;
  // [samples, rows, H, chunk.stride / 64] sums of (3) over 64 keys; null = not wanted
  float* u_parts;
  int32_t kind;
  ral_policy_target target;  // without ids: r is formed from it, not read from memory; or nothing
  const float* target_z;     // [B, T]
};

// One CTA has kBlockQ rows and kTermKeys keys, and walks over all heads. K stays in shared memory
// for the query heads that read it. Queries pass by; the next head's arrive while weights are
// formed. The reference goes first and leaves r in memory; the policy's l takes its place. Both
// sides run the same instructions, so equal inputs give equal bits. For U the heads pass by a
// second time, with l in registers. Only the gradient reads l from memory.
template <typename T, int kHeadDim>
struct policy_terms_kernel {
  using Params = PolicyTermsParams;
  // Warps are two by two, with 32 rows and 64 keys each, so that what one loads serves four
  // products.
  static constexpr int kRowTiles = 2, kWarps = 4;
  static constexpr int kRows = 2 * kRowTiles;  // per lane
  static constexpr int kWarpQ = 16 * kRowTiles, kWarpKeys = 64;
  static constexpr int kBlockQ = 2 * kWarpQ;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMinBlocks = 2;
  using TileT = Tile<T, kHeadDim>;
  static constexpr int kStride = kTermKeys + 8;  // of staged rows; the 8 spread rows over banks
  static constexpr int kTileBytes = 2 * TileT::bytes(kBlockQ) + TileT::bytes(kTermKeys);
  static constexpr int kStageBytes = kBlockQ * kStride * int(sizeof(float));
  static constexpr int kSharedBytes = kTileBytes > kStageBytes ? kTileBytes : kStageBytes;
  using Scores = float[kRowTiles][kWarpKeys / 8][4];
  static const char* name() { return "policy_terms_kernel"; }

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const ral_policy_side& side = params.side;
    const int32_t first_key = int32_t(block_index()) % params.num_key_blocks * kTermKeys;
    int32_t first_row;
    const Sample sample = locate(params, first_row);
    const int32_t num_rows = minimum(kBlockQ, sample.stop - first_row);
    if (num_rows <= 0) return;
    const Visibility visibility = visibility_of(sample, side);
    const bool sees = KeysOfRows(visibility, first_row, num_rows).meet(first_key, kTermKeys);
    const bool other_sees = KeysOfRows(Visibility(visibility.offset, params.other_left,
                                                  params.other_right, visibility.length_k),
                                       first_row, num_rows)
                                .meet(first_key, kTermKeys);
    if (!sees && !other_sees) return;  // no kernel reads p, l or partial sums here
    const int32_t b = int32_t(sample.b);
    Scores sum;
    clear(sum);
    if (sees) add_heads(params, shared, b, first_row, num_rows, first_key, sum);
    // Sums pass through shared memory: a warp then has whole lines, and few elements at a time.
    float* const stage = reinterpret_cast<float*>(shared);
    sync_block();  // queries and keys are no longer read
    stage_policy(params, num_rows, first_key, sum, stage);
    sync_block();
    finish_lines(params, b, first_row, num_rows, first_key, stage);
    if (sees && params.u_parts != nullptr) {
      sync_block();  // l is on the stage
      add_moments(params, shared, b, first_row, num_rows, first_key, stage);
    }
  }

 private:
  // The sample of the CTA's rows, and the first of them. It is asked for again rather than kept in
  // registers while heads pass by, because these are full.
  RAL_DEVICE static Sample locate(const Params& params, int32_t& first_row) {
    const RowChunk& chunk = params.chunk;
    // A grid has fewer than 2^31 CTAs.
    const int32_t rest = int32_t(block_index()) / params.num_key_blocks;
    int32_t block = params.num_row_blocks - 1 - rest % params.num_row_blocks;
    const Sample sample = sample_of_block(params.common, params.common.cu_seqlens_q, kBlockQ, block,
                                          chunk.first_sample + rest / params.num_row_blocks,
                                          chunk.first_row, chunk.stop());
    first_row = sample.first_row + block * kBlockQ;
    return sample;
  }

  RAL_DEVICE static uint64_t real_keys(const Params& params, int32_t first_key) {
    int32_t first_row;
    return KeyBits(params.common, locate(params, first_row), first_key).real;
  }

  // Normalisers of the lane's rows, of one head.
  struct Norm {
    float m[kRows], inverse[kRows];
  };

  // Calls visit(h, scores, norm) head by head. The scores are q kᵀ of the warp's rows and keys.
  // Warps without rows only take part in copies and barriers.
  template <typename Visit>
  RAL_DEVICE static void for_heads(const Params& params, char* shared, int32_t b, int32_t first_row,
                                   int32_t num_rows, int32_t first_key, Visit visit) {
    const ral_policy_common& common = params.common;
    const ral_policy_side& side = params.side;
    const TileT q{reinterpret_cast<T*>(shared)};  // double buffer
    const TileT k{q.data + 2 * kBlockQ * kHeadDim};
    const int warp_row = warp_index() / 2 * kWarpQ, warp_key = warp_index() % 2 * kWarpKeys;
    const auto copy_queries = [&](TileT tile, int64_t h) {
      copy_rows<kBlockQ, kThreads>(tile, rows_of<const T>(side.q, b, h, first_row), side.q.stride_t,
                                   [&](int row) { return row < num_rows; });
    };
    const int64_t inverses = common.batch_size * side.num_heads * common.num_rows;
    const int32_t num_heads = int32_t(side.num_heads);
    const int32_t group = num_heads / int32_t(side.num_kv_heads);
    const uint64_t low = real_keys(params, first_key);
    const uint64_t high = real_keys(params, first_key + kWarpKeys);
    const auto copy_keys = [&](int64_t kv_head) {
      int32_t first_token = 0;
      if (common.cu_seqlens_q != nullptr) first_token = locate(params, first_token).first_key;
      HeadKeys<T>(side, b, first_token, kv_head)
          .template copy<kTermKeys, kThreads>(k, first_key, [&](int row) {
            return ((row < kWarpKeys ? low >> row : high >> (row - kWarpKeys)) & 1) != 0;
          });
    };
    copy_keys(0);
    copy_queries(q, 0);
    commit_copies();
    int offset = 0;        // of the queries in use
    int32_t in_group = 0;  // index of the head in its group
    int64_t kv_head = 0;
    for (int32_t h = 0; h < num_heads; ++h) {
      const float* const at =
          side.norm + (int64_t(b) * num_heads + h) * common.num_rows + first_row;
      Norm norm;
      RAL_UNROLL for (int i = 0; i < kRows; ++i) {
        const int row = warp_row + row_in_warp(i);
        norm.m[i] = row < num_rows ? load_global(at + row) : 0.0f;
        norm.inverse[i] = row < num_rows ? load_global(at + inverses + row) : 0.0f;
      }
      wait_for_copies<0>();
      sync_block();  // queries and keys have arrived; the previous queries are no longer read
      const TileT now{q.data + offset};
      offset = kBlockQ * kHeadDim - offset;
      if (h + 1 < num_heads) copy_queries(TileT{q.data + offset}, h + 1);
      Scores s;
      if (warp_row < num_rows)
        multiply_transposed(s, now, warp_row, TileT{k.data + warp_key * kHeadDim});
      if (++in_group == group && h + 1 < num_heads) {
        in_group = 0;
        ++kv_head;
        sync_block();  // the keys are no longer read
        copy_keys(kv_head);
      }
      commit_copies();
      if (warp_row < num_rows) visit(h, s, norm);
    }
    wait_for_copies<0>();
  }

  // Adds the heads' weights on keys that a row sees. Elsewhere the sum may be anything.
  RAL_DEVICE static void add_heads(const Params& params, char* shared, int32_t b, int32_t first_row,
                                   int32_t num_rows, int32_t first_key, Scores& sum) {
    const float scale = params.side.scale * kLog2e;
    for_heads(params, shared, b, first_row, num_rows, first_key,
              [&](int32_t, const Scores& s, const Norm& norm) {
                RAL_UNROLL for (int i = 0; i < kRows; ++i) RAL_UNROLL
                  for (int c = 0; c < kWarpKeys / 8; ++c) RAL_UNROLL
                    for (int e = 0; e < 2; ++e) {
                      const int at = i % 2 * 2 + e;
                      const float weight = exp2(s[i / 2][c][at] * scale - norm.m[i]);
                      sum[i / 2][c][at] += weight * norm.inverse[i];
                    }
              });
  }

  // Partial sums of U (3), from l on the stage.
  RAL_DEVICE static void add_moments(const Params& params, char* shared, int32_t b,
                                     int32_t first_row, int32_t num_rows, int32_t first_key,
                                     const float* stage) {
    const ral_policy_side& side = params.side;
    const int warp_row = warp_index() / 2 * kWarpQ, warp_key = warp_index() % 2 * kWarpKeys;
    Scores l;
    RAL_UNROLL for (int i = 0; i < kRows; ++i) RAL_UNROLL
      for (int c = 0; c < kWarpKeys / 8; ++c) {
        const int row = warp_row + row_in_warp(i);
        Float2 pair{0.0f, 0.0f};
        if (row < num_rows)
          pair = load_shared(reinterpret_cast<const Float2*>(stage + row * kStride + warp_key +
                                                             8 * c + 2 * (lane_index() % 4)));
        l[i / 2][c][i % 2 * 2] = pair.x;
        l[i / 2][c][i % 2 * 2 + 1] = pair.y;
      }
    sync_block();  // the stage is no longer read
    const int64_t num_parts = params.chunk.stride / kWarpKeys;
    const int64_t part = (first_key + warp_key) / kWarpKeys;
    const float scale = side.scale * kLog2e;
    for_heads(params, shared, b, first_row, num_rows, first_key,
              [&](int32_t h, const Scores& s, const Norm& norm) {
                RAL_UNROLL for (int i = 0; i < kRows; ++i) {
                  float u = 0.0f;
                  RAL_UNROLL for (int c = 0; c < kWarpKeys / 8; ++c) RAL_UNROLL
                    for (int e = 0; e < 2; ++e) {
                      // l is 0 on keys that do not count, whose weight may be anything.
                      const int at = i % 2 * 2 + e;
                      const float gradient = l[i / 2][c][at];
                      const float weight = exp2(s[i / 2][c][at] * scale - norm.m[i]);
                      if (gradient != 0.0f) u += weight * gradient;
                    }
                  u = quad_sum(u) * norm.inverse[i];
                  const int row = warp_row + row_in_warp(i);
                  const int64_t line = params.chunk.at(b, first_row + row) * side.num_heads + h;
                  if (lane_index() % 4 == 0 && row < num_rows)
                    store_global(params.u_parts + line * num_parts + part, u);
                }
              });
  }

  // Stages the warp's part of the policy's rows (7), 0 on keys that do not count.
  RAL_DEVICE static void stage_policy(const Params& params, int32_t num_rows, int32_t first_key,
                                      const Scores& sum, float* stage) {
    int32_t first_row;
    const Sample sample = locate(params, first_row);
    const ral_policy_common& common = params.common;
    const Visibility visibility = visibility_of(sample, params.side);
    const int warp_row = warp_index() / 2 * kWarpQ, warp_key = warp_index() % 2 * kWarpKeys;
    const KeyBits bits(common, sample, first_key + warp_key);
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const int row = warp_row + row_in_warp(i);
      const Mask mask =
          Mask::of_row(common, visibility, bits, first_row + row, first_key + warp_key);
      const float* const z_rows = params.side.z + sample.b * common.num_rows + first_row;
      const float z = row < num_rows ? load_global(z_rows + row) : 0.0f;
      const float share = z > 0.0f ? 1.0f / (z * float(params.side.num_heads)) : 0.0f;
      float* const at = stage + row * kStride + warp_key + 2 * (lane_index() % 4);
      RAL_UNROLL for (int c = 0; c < kWarpKeys / 8; ++c) {
        const float low = sum[i / 2][c][i % 2 * 2], high = sum[i / 2][c][i % 2 * 2 + 1];
        store_shared(reinterpret_cast<Float2*>(at + 8 * c),
                     Float2{mask.counts(c, 0) ? low * share : 0.0f,
                            mask.counts(c, 1) ? high * share : 0.0f});
      }
    }
  }

  // Writes p. In a comparison it reads r where p would go, or forms it from a target, and writes l
  // there and to the stage.
  RAL_DEVICE static void finish_lines(const Params& params, int32_t b, int32_t first_row,
                                      int32_t num_rows, int32_t first_key, float* stage) {
    const RowChunk& chunk = params.chunk;
    const int lane = lane_index();
    const Sample sample = locate(params, first_row);
    const Visibility visibility = visibility_of(sample, params.side);
    TargetTile target(params.common, params.target, params.target_z, sample, visibility, first_key);
    for (int row = warp_index(); row < num_rows; row += kWarps) {
      const int64_t line = chunk.at(b, first_row + row);
      Float4* const staged = reinterpret_cast<Float4*>(stage + row * kStride) + lane;
      Float4* const at =
          reinterpret_cast<Float4*>(params.p + line * chunk.stride + first_key) + lane;
      const Float4 p = load_shared(staged);
      if (params.value_parts == nullptr) {
        store_global(at, p);
        continue;
      }
      const Float4 r =
          params.target.values == nullptr ? load_global(at) : target.of_row(first_row + row);
      Float4 l;
      float value = 0.0f;
      RAL_UNROLL for (int e = 0; e < 4; ++e) {
        const DivergenceTerm term = divergence_term(params.kind, p.x[e], r.x[e]);
        value += term.value;     // (1)
        l.x[e] = term.gradient;  // (2)
      }
      store_global(at, l);
      store_shared(staged, l);
      value = warp_sum(value);
      if (lane == 0)
        store_global(params.value_parts + (line * chunk.stride + first_key) / kTermKeys, value);
    }
  }
};

}  // namespace cuda
}  // namespace ral
