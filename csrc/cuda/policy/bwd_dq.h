// dq of `policy_divergence`: equations (7) and (9) of ral_kernels/ops/policy/divergence.md.
#pragma once

#include "policy/bwd.h"

namespace ral {
namespace cuda {

// One CTA has kBlockQ rows of a head and a piece of the keys.
template <typename T, int kHeadDim>
struct policy_bwd_dq_kernel {
  using Params = PolicyBwdParams;
  static constexpr int kWarps = 4, kRows = 2;
  static constexpr int kBlockQ = 16 * kWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMinBlocks = kHeadDim == 64 ? 3 : 2;
  using TileT = Tile<T, kHeadDim>;
  static constexpr int kSharedBytes = TileT::bytes(kBlockQ) + 2 * TileT::bytes(kBlockK);
  static const char* name() { return "policy_bwd_dq_kernel"; }

  // Statistics of a row.
  struct Row {
    float m, c, factor, delta;
  };

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const RowsOfHead at(params, kBlockQ);
    if (at.num_rows <= 0) return;
    const TileT q{reinterpret_cast<T*>(shared)};
    const TileT k{q.data + kBlockQ * kHeadDim};  // double buffer
    const ral_policy_common& common = params.common;
    const ral_policy_side& side = params.side;
    const Visibility visibility = visibility_of(at.sample, side);
    const HeadKeys<T> keys(side, at.sample, at.kv_head);
    copy_rows<kBlockQ, kThreads>(q, rows_of<const T>(side.q, at.b, at.h, at.first_row),
                                 side.q.stride_t, [&](int row) { return row < at.num_rows; });
    KeyBits next(common, at.sample, at.begin);
    if (at.begin < at.end) keys.template copy_block<kThreads>(k, at.begin, next);
    commit_copies();

    const int warp_row = warp_index() * 16;
    const float scale = side.scale * kLog2e;
    Row rows[kRows];
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      rows[i] = load_statistics(params, at, warp_row + row_in_warp(i));
    float dq[1][kHeadDim / 8][4];
    clear(dq);
    Units<T, kRows> units;
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
      float l[1][kBlockK / 8][4], ds[1][kBlockK / 8][4];
      at.load_l(params, warp_row, first, l);
      multiply_transposed(ds, q, warp_row, now);
      Mask masks[kRows];
      RAL_UNROLL for (int i = 0; i < kRows; ++i)
        masks[i] =
            Mask::of_row(common, visibility, bits, at.first_row + warp_row + row_in_warp(i), first);
      if (!all_full(masks)) {
        RAL_UNROLL for (int i = 0; i < kRows; ++i) RAL_UNROLL
          for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
            for (int e = 0; e < 2; ++e)
              hide_element(masks[i], c, e, rows[i].c, ds[0][c][2 * i + e], l[0][c][2 * i + e]);
      }
      RAL_UNROLL for (int i = 0; i < kRows; ++i) RAL_UNROLL
        for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
          for (int e = 0; e < 2; ++e) {
            float& x = ds[0][c][2 * i + e];
            const Row& row = rows[i];
            x = gradient_of_policy_score(exp2(x * scale - row.m), l[0][c][2 * i + e], row.c,
                                         row.factor, row.delta);
          }
      units.apply(ds, dq);
      add_product(dq, ds, now);  // (9), without the scale
    }
    wait_for_copies<0>();
    if (params.dq_parts != nullptr) {
      store_part(params, at, warp_row, dq, units);
    } else {
      sync_block();  // the queries are no longer read
      store_rows<1>(
          rows_of<T>(params.dq, at.b, at.h, at.first_row), params.dq.stride_t, warp_row,
          at.num_rows, dq, [&](int i) { return side.scale * units.inverse(i); }, q);
    }
  }

 private:
  RAL_DEVICE static Row load_statistics(const Params& params, const RowsOfHead& at, int row) {
    if (row >= at.num_rows) return Row{};
    const ral_policy_side& side = params.side;
    const RowChunk& chunk = params.chunk;
    const int32_t b = int32_t(at.b), t = at.first_row + row;
    const int64_t norm = (at.b * side.num_heads + at.h) * params.common.num_rows + t;
    const int64_t per_head = chunk.at(b, side.num_heads, at.h, t);
    return Row{load_global(side.norm + norm), load_global(params.c + chunk.at(b, t)),
               load_global(params.factor + per_head), load_global(params.delta + per_head)};
  }

  RAL_DEVICE static void store_part(const Params& params, const RowsOfHead& at, int warp_row,
                                    const float (&dq)[1][kHeadDim / 8][4],
                                    const Units<T, kRows>& units) {
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const int row = warp_row + row_in_warp(i);
      if (row >= at.num_rows) continue;
      float* const line =
          params.dq_parts + (at.in_parts(params) + row) * kHeadDim + 2 * (lane_index() % 4);
      const float factor = params.side.scale * units.inverse(i);
      RAL_UNROLL for (int c = 0; c < kHeadDim / 8; ++c)
        store_global(reinterpret_cast<Float2*>(line + 8 * c),
                     Float2{dq[0][c][2 * i] * factor, dq[0][c][2 * i + 1] * factor});
    }
  }
};

// Adds the pieces of dq in order, two numbers per thread.
template <typename T, int kHeadDim>
struct policy_bwd_join_kernel {
  using Params = PolicyBwdParams;
  static constexpr int kThreads = 128, kMinBlocks = 8, kSharedBytes = 0;
  static constexpr int kPairs = kHeadDim / 2;
  static const char* name() { return "policy_bwd_join_kernel"; }

  RAL_DEVICE static void run(const Params& params, char*) {
    const RowChunk& chunk = params.chunk;
    const int64_t num_heads = params.side.num_heads;
    const int64_t rows = chunk.num_samples * num_heads * chunk.num_rows;
    const int64_t index = block_index() * kThreads + thread_index();
    const int64_t row = index / kPairs, pair = index % kPairs;
    if (row >= rows) return;
    const Float2* part = reinterpret_cast<const Float2*>(params.dq_parts) + index;
    Float2 sum{0.0f, 0.0f};
    for (int32_t i = 0; i < params.pieces; ++i) {
      const Float2 more = load_global(part + i * rows * kPairs);
      sum.x += more.x;
      sum.y += more.y;
    }
    const int64_t t = chunk.first_row + row % chunk.num_rows;
    if (t >= stop_of_rows(params.common)) return;
    const int64_t h = row / chunk.num_rows % num_heads;
    const int64_t b = chunk.first_sample + row / chunk.num_rows / num_heads;
    store_global(reinterpret_cast<uint32_t*>(rows_of<T>(params.dq, b, h, t)) + pair,
                 pack<T>(sum.x, sum.y));
  }
};

}  // namespace cuda
}  // namespace ral
