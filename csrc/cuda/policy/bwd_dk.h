// dk of `policy_divergence`: equations (7) and (10) of ral_kernels/ops/policy/divergence.md.
#pragma once

#include "policy/bwd.h"

namespace ral {
namespace cuda {

// One CTA has kBlockK keys of a kv head. It walks over the chunk's rows that see them, and for
// these rows over the heads of the group. So l is read once for all heads, and the sum over a group
// has one fixed order. Where a sample's rows come in several chunks, each continues the previous
// chunk's sum.
template <typename T, int kHeadDim>
struct policy_bwd_dk_kernel {
  using Params = PolicyBwdParams;
  static constexpr int kBlockQ = 64;
  static constexpr int kWarps = kBlockK / 16, kRows = 2;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMinBlocks = kHeadDim == 64 ? 3 : 2;
  using TileT = Tile<T, kHeadDim>;
  static constexpr int kStatistics = 4;  // per row: m, c, factor, delta
  static constexpr int kStatisticsBytes = kStatistics * kBlockQ * int(sizeof(float));
  static constexpr int kSharedBytes =
      TileT::bytes(kBlockK) + 2 * (TileT::bytes(kBlockQ) + kStatisticsBytes);
  static const char* name() { return "policy_bwd_dk_kernel"; }

  // Rows of one head: a step of the CTA's walk.
  struct Step {
    int32_t h, first_row;
  };

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const ral_policy_common& common = params.common;
    const ral_policy_side& side = params.side;
    const RowChunk& chunk = params.chunk;
    // Most rows see early causal keys, so they start first.
    const int64_t program = block_index();
    int32_t block = int32_t(program % params.num_blocks);
    const int64_t kv_head = program / params.num_blocks % side.num_kv_heads;
    const int32_t b = chunk.first_sample + int32_t(program / params.num_blocks / side.num_kv_heads);
    const Sample sample = sample_of_block(common, common.cu_seqlens_k, kBlockK, block, b,
                                          chunk.first_row, chunk.stop());
    const int32_t first_key = block * kBlockK;
    const int32_t num_keys = minimum(kBlockK, sample.num_keys - first_key);
    if (num_keys <= 0) return;
    const Visibility visibility = visibility_of(sample, side);
    const int32_t group = int32_t(side.num_heads / side.num_kv_heads);
    const int32_t first_head = int32_t(kv_head) * group;

    // Rows [begin, high] of the sample see some of the keys. `begin` is whole blocks of kBlockQ
    // after its first row.
    const int32_t low = maximum(visibility.first_query(first_key) - sample.first_row, 0);
    const int32_t begin = sample.first_row + low / kBlockQ * kBlockQ;
    const int32_t high = minimum(visibility.last_query(first_key + num_keys - 1), sample.stop - 1);

    const TileT k{reinterpret_cast<T*>(shared)};
    const TileT q{k.data + kBlockK * kHeadDim};  // double buffer
    // likewise
    float* const statistics = reinterpret_cast<float*>(q.data + 2 * kBlockQ * kHeadDim);
    const KeyBits bits(common, sample, first_key);
    const int warp_key = warp_index() * 16;
    float dk[1][kHeadDim / 8][4];
    clear(dk);
    Units<T, kRows> units;
    // For the rows of a step, the same for all heads. Transposed: keys down, rows across.
    float l[1][kBlockQ / 8][4];
    Mask masks[kRows];
    Step step{first_head, begin};
    if (begin <= high) {
      HeadKeys<T>(side, sample, kv_head).template copy_block<kThreads>(k, first_key, bits);
      load_queries(params, sample, step, q, statistics);
    }
    commit_copies();
    int buffer = 0;
    while (step.first_row <= high) {
      Step next{step.h + 1, step.first_row};
      if (next.h == first_head + group) next = Step{first_head, step.first_row + kBlockQ};
      wait_for_copies<0>();
      sync_block();  // the rows have arrived; the previous ones are no longer read
      const TileT now{q.data + buffer * kBlockQ * kHeadDim};
      const float* const of_rows = statistics + buffer * kStatistics * kBlockQ;
      buffer = 1 - buffer;
      if (next.first_row <= high)
        load_queries(params, sample, next, TileT{q.data + buffer * kBlockQ * kHeadDim},
                     statistics + buffer * kStatistics * kBlockQ);
      commit_copies();
      if (warp_key >= num_keys) {
        step = next;
        continue;
      }
      if (step.h == first_head) {
        load_l_transposed(params, sample, step.first_row, first_key + warp_key, l);
        RAL_UNROLL for (int i = 0; i < kRows; ++i) {
          const int key = warp_key + row_in_warp(i);
          masks[i] = Mask::of_key(common, visibility, bits, key, first_key + key, step.first_row,
                                  sample.stop);
        }
      }
      float ds[1][kBlockQ / 8][4];
      multiply_transposed(ds, k, warp_key, now);
      form_gradient(side.scale * kLog2e, of_rows, masks, l, ds);
      units.apply(ds, dk);
      add_product(dk, ds, now);  // (10), without the scale
      step = next;
    }
    wait_for_copies<0>();
    RAL_UNROLL for (int i = 0; i < kRows; ++i) RAL_UNROLL
      for (int c = 0; c < kHeadDim / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 2; ++e) dk[0][c][2 * i + e] *= units.inverse(i);
    if (!params.is_first) add_so_far(params, kv_head, first_key + warp_key, dk);
    if (params.is_last) {
      sync_block();  // the keys are no longer read
      store_rows<1>(
          rows_of<T>(params.dk, b, kv_head, sample.first_key + first_key), params.dk.stride_t, warp_key, num_keys, dk,
          [&](int) { return side.scale; }, k);
    } else {
      store_so_far(params, kv_head, first_key + warp_key, dk);
    }
  }

 private:
  RAL_DEVICE static void load_queries(const Params& params, const Sample& sample, Step step,
                                      TileT q, float* statistics) {
    const int32_t b = int32_t(sample.b);
    const ral_policy_side& side = params.side;
    const RowChunk& chunk = params.chunk;
    const int32_t num_rows = sample.stop - step.first_row;
    copy_rows<kBlockQ, kThreads>(q, rows_of<const T>(side.q, b, step.h, step.first_row),
                                 side.q.stride_t, [&](int row) { return row < num_rows; });
    const int row = thread_index();
    if (row >= kBlockQ) return;
    const int32_t t = step.first_row + row;
    const int64_t norm = (int64_t(b) * side.num_heads + step.h) * params.common.num_rows + t;
    const int64_t per_head = chunk.at(b, side.num_heads, step.h, t);
    const bool there = row < num_rows;
    store_shared(statistics + row, there ? load_global(side.norm + norm) : 0.0f);
    store_shared(statistics + kBlockQ + row, there ? load_global(params.c + chunk.at(b, t)) : 0.0f);
    store_shared(statistics + 2 * kBlockQ + row,
                 there ? load_global(params.factor + per_head) : 0.0f);
    store_shared(statistics + 3 * kBlockQ + row,
                 there ? load_global(params.delta + per_head) : 0.0f);
  }

  // Loads l of rows [first_row, first_row + 64) for the lane's keys of a warp's 16.
  RAL_DEVICE static void load_l_transposed(const Params& params, const Sample& sample,
                                           int32_t first_row, int32_t warp_key, float (&l)[1][kBlockQ / 8][4]) {
    const RowChunk& chunk = params.chunk;
    const int mine = 2 * (lane_index() % 4);
    const float* const lines =
        params.l + chunk.at(int32_t(sample.b), first_row) * chunk.stride + warp_key + lane_index() / 4;
    RAL_UNROLL for (int c = 0; c < kBlockQ / 8; ++c) RAL_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int row = 8 * c + mine + e;
        const bool there = first_row + row < sample.stop;
        RAL_UNROLL for (int i = 0; i < kRows; ++i)
          l[0][c][2 * i + e] = there ? load_global(lines + row * chunk.stride + 8 * i) : 0.0f;
      }
  }

  // Turns scores into dS (7).
  RAL_DEVICE static void form_gradient(float scale, const float* statistics,
                                       const Mask (&masks)[kRows], float (&l)[1][kBlockQ / 8][4],
                                       float (&ds)[1][kBlockQ / 8][4]) {
    const auto pair = [&](int which, int column_tile) {
      return load_shared(reinterpret_cast<const Float2*>(statistics + which * kBlockQ +
                                                         8 * column_tile + 2 * (lane_index() % 4)));
    };
    if (!all_full(masks)) {
      RAL_UNROLL for (int tile = 0; tile < kBlockQ / 8; ++tile) {
        const Float2 c = pair(1, tile);
        RAL_UNROLL for (int i = 0; i < kRows; ++i) RAL_UNROLL
          for (int e = 0; e < 2; ++e)
            hide_element(masks[i], tile, e, e == 0 ? c.x : c.y, ds[0][tile][2 * i + e],
                         l[0][tile][2 * i + e]);
      }
    }
    RAL_UNROLL for (int tile = 0; tile < kBlockQ / 8; ++tile) {
      const Float2 m = pair(0, tile), c = pair(1, tile);
      const Float2 factor = pair(2, tile), delta = pair(3, tile);
      RAL_UNROLL for (int i = 0; i < kRows; ++i) {
        float& low = ds[0][tile][2 * i];
        float& high = ds[0][tile][2 * i + 1];
        low = gradient_of_policy_score(exp2(low * scale - m.x), l[0][tile][2 * i], c.x, factor.x,
                                       delta.x);
        high = gradient_of_policy_score(exp2(high * scale - m.y), l[0][tile][2 * i + 1], c.y,
                                        factor.y, delta.y);
      }
    }
  }

  // The sum over earlier chunks, in float32, without the scale.
  RAL_DEVICE static float* line_so_far(const Params& params, int64_t kv_head, int32_t key) {
    return params.dk_so_far + (kv_head * params.common.seqlen_k + key) * kHeadDim +
           2 * (lane_index() % 4);
  }
  RAL_DEVICE static void add_so_far(const Params& params, int64_t kv_head, int32_t warp_key,
                                    float (&dk)[1][kHeadDim / 8][4]) {
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const int32_t key = warp_key + row_in_warp(i);
      if (key >= params.common.seqlen_k) continue;
      const float* const line = line_so_far(params, kv_head, key);
      RAL_UNROLL for (int c = 0; c < kHeadDim / 8; ++c) {
        const Float2 before = load_global(reinterpret_cast<const Float2*>(line + 8 * c));
        dk[0][c][2 * i] += before.x;
        dk[0][c][2 * i + 1] += before.y;
      }
    }
  }
  RAL_DEVICE static void store_so_far(const Params& params, int64_t kv_head, int32_t warp_key,
                                      const float (&dk)[1][kHeadDim / 8][4]) {
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const int32_t key = warp_key + row_in_warp(i);
      if (key >= params.common.seqlen_k) continue;
      float* const line = line_so_far(params, kv_head, key);
      RAL_UNROLL for (int c = 0; c < kHeadDim / 8; ++c)
        store_global(reinterpret_cast<Float2*>(line + 8 * c),
                     Float2{dk[0][c][2 * i], dk[0][c][2 * i + 1]});
    }
  }
};

}  // namespace cuda
}  // namespace ral
