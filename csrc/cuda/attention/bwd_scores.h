// What the backward kernels of `attention` do between products, for a warp's 16 rows of scores.
// They form weights (5), the part of (9) that is no product, and (11). All kernels sum in the same
// order.
#pragma once

#include "attention/bwd.h"
#include "core/blocks.h"
#include "core/softmax.h"

namespace ral {
namespace cuda {

// ---- CTAs with keys: dk, dv ---------------------------------------------------------------------

RAL_DEVICE KeysOfBlock keys_of_block(const AttentionBwdParams& params, int32_t block_k) {
  return {params.call, params.num_blocks, block_k, params.gradients.dmarginals != nullptr};
}

// Queries [low, high] that may see one of the keys [first_key, first_key + num_keys).
struct QueryRange {
  int32_t low, high;

  RAL_DEVICE QueryRange(const KeysOfBlock& block, int32_t first_key, int32_t num_keys)
      : low(block.visibility.first_query(first_key)),
        high(num_keys <= 0 ? -1
                           : minimum(block.visibility.last_query(first_key + num_keys - 1),
                                     block.sequence.length_q - 1)) {}
};

// A warp's 16 keys of a block of kBlockK. Scores are transposed: rows are keys, columns are
// queries. A run is a row of keys of one span.
struct WarpKeys {
  static constexpr int kRows = 2, kKeys = 16;
  KeyBlock keys;
  int32_t first_key, warp_key;  // the block's first; the warp's first, in the block
  bool has_dm;
  int32_t span[kRows], run[kRows];  // of the lane's keys; runs count from the warp's first key
  int32_t num_runs;                 // 1 without dm
  int32_t span_of_run;              // of run `lane % kKeys`; -1 = there is none
  int32_t first_span, last_span;    // of the warp's first key and of its last
  bool real[kRows];

  RAL_DEVICE WarpKeys(const KeysOfBlock& block, int32_t first_key, int warp_key)
      : keys(load_key_block(block.ids, block.padding, first_key, block.visibility.length_k)),
        first_key(first_key),
        warp_key(warp_key),
        has_dm(block.ids != nullptr),
        num_runs(1),
        span_of_run(-1),
        first_span(keys.span_of(warp_key)),
        last_span(keys.span_of(warp_key + kKeys - 1)) {
    for (int key = 0; key < kKeys; ++key) {
      const int32_t of_key = keys.span_of(warp_key + key);
      if (key > 0 && (keys.starts >> (warp_key + key) & 1) != 0) ++num_runs;
      if (lane_index() % kKeys == num_runs - 1) span_of_run = of_key;
      RAL_UNROLL for (int i = 0; i < kRows; ++i) {
        if (row_in_warp(i) != key) continue;
        real[i] = (keys.real >> (warp_key + key) & 1) != 0;
        span[i] = of_key;
        run[i] = num_runs - 1;
      }
    }
  }

  // Turns scores into weights (5). lse_log2: of the queries, in shared memory.
  template <int kTiles>
  RAL_DEVICE void weigh(float (&p)[1][kTiles][4], const float* lse_log2, float scale,
                        const Visibility& visibility, int32_t first_query) const {
    RAL_UNROLL for (int c = 0; c < kTiles; ++c) {
      const Float2 lse = load_shared(reinterpret_cast<const Float2*>(lse_log2 + 8 * c + mine()));
      RAL_UNROLL for (int i = 0; i < kRows; ++i) {
        float& low = p[0][c][2 * i];
        float& high = p[0][c][2 * i + 1];
        low = exp2(low * scale - lse.x);
        high = exp2(high * scale - lse.y);
      }
    }
    // Queries past the last are zeros, and all that they add is zero.
    const bool all_visible = ~keys.real == 0 &&
                             visibility.first_key(first_query + 8 * kTiles - 1) <= first_key &&
                             visibility.last_key(first_query) >= first_key + kBlockK - 1;
    if (!all_visible) hide(p, visibility, first_query);
  }

  // Starts ds with what (9) and (11) add to its product, dm - delta: in the kernel where the warps
  // of a CTA share the queries' statistics. less_delta: -delta of the queries or, if the block is
  // in one span, dm - delta, in shared memory.
  template <int kTiles>
  RAL_DEVICE void begin(float (&ds)[1][kTiles][4], const float* less_delta,
                        const MarginalGradient& dm, int32_t first_query) const {
    const bool adds = has_dm && !keys.is_one_span();
    RAL_UNROLL for (int c = 0; c < kTiles; ++c) RAL_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float shared = load_shared(less_delta + 8 * c + mine() + e);
        RAL_UNROLL for (int i = 0; i < kRows; ++i)
          ds[0][c][2 * i + e] =
              adds ? dm.at(first_query + mine() + 8 * c + e, span[i]) + shared : shared;
      }
  }

  // The same from numbers of each run of the warp, in its own shared memory.
  template <int kTiles>
  RAL_DEVICE void begin(float (&ds)[1][kTiles][4], const float* less_delta, int32_t stride) const {
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const float* of_key = less_delta + run[i] * stride + mine();
      RAL_UNROLL for (int c = 0; c < kTiles; ++c) {
        const Float2 both = load_shared(reinterpret_cast<const Float2*>(of_key + 8 * c));
        ds[0][c][2 * i] = both.x;
        ds[0][c][2 * i + 1] = both.y;
      }
    }
  }

  // Turns gradients of weights, less delta, into gradients of scores (11).
  template <int kTiles>
  RAL_DEVICE void differentiate(float (&ds)[1][kTiles][4], const float (&p)[1][kTiles][4]) const {
    RAL_UNROLL for (int c = 0; c < kTiles; ++c) RAL_UNROLL
      for (int e = 0; e < 4; ++e) ds[0][c][e] = gradient_of_score(p[0][c][e], ds[0][c][e]);
  }

 private:
  RAL_DEVICE static int mine() { return 2 * (lane_index() % 4); }

  // Writes 0 where the query does not see the lane's key.
  template <int kTiles>
  RAL_DEVICE void hide(float (&p)[1][kTiles][4], const Visibility& visibility,
                       int32_t first_query) const {
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const int32_t key = first_key + warp_key + row_in_warp(i);
      const int32_t shift = first_query + mine();
      const int32_t low = visibility.first_query(key) - shift;
      const int32_t high = real[i] ? visibility.last_query(key) - shift : -1;
      RAL_UNROLL for (int c = 0; c < kTiles; ++c) {
        if (8 * c < low || 8 * c > high) p[0][c][2 * i] = 0.0f;
        if (8 * c + 1 < low || 8 * c + 1 > high) p[0][c][2 * i + 1] = 0.0f;
      }
    }
  }
};

// ---- CTAs with queries: dq ----------------------------------------------------------------------

struct QueriesWithGradient : QueriesOfBlock {
  MarginalGradient dm;

  RAL_DEVICE QueriesWithGradient(const AttentionBwdParams& params, int32_t block_q)
      : QueriesOfBlock(params.call, params.num_blocks, block_q,
                       params.gradients.dmarginals != nullptr),
        dm(params, sequence, b, h) {}
};

// Keys [low, high] that some of the queries [first_query, first_query + num_queries) may see, and
// [full_low, full_high] that all of them see, before padding.
struct KeyRange {
  int32_t low, high, full_low, full_high;

  RAL_DEVICE KeyRange(const Visibility& visibility, int32_t first_query, int32_t num_queries)
      : low(visibility.first_key(first_query)),
        high(num_queries <= 0 ? -1 : visibility.last_key(first_query + num_queries - 1)),
        full_low(visibility.first_key(first_query + num_queries - 1)),
        full_high(visibility.last_key(first_query)) {}
};

// A warp's 16 queries. Rows are queries, columns are keys.
struct WarpQueries {
  static constexpr int kRows = 2;
  int32_t warp_query;  // the warp's first query in the sequence
  float lse_log2[kRows], delta[kRows];

  // The warp's rows begin `warp_row` after the block's first query.
  RAL_DEVICE WarpQueries(const AttentionBwdParams& params, const QueriesWithGradient& block,
                         int warp_row)
      : warp_query(block.first_query + warp_row) {
    const ral_attention_params& call = params.call;
    const int64_t statistics =
        (block.b * call.num_heads + block.h) * call.seqlen_q + block.first_token;
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const int row = warp_row + row_in_warp(i);
      const bool there = row < block.num_queries;
      lse_log2[i] = there ? load_global(params.lse_log2 + statistics + row) : 0.0f;
      delta[i] = there ? load_global(params.delta + statistics + row) : 0.0f;
    }
  }

  // Turns scores of keys from `first` on into weights (5).
  RAL_DEVICE void weigh(float (&p)[1][kBlockK / 8][4], const KeyBlock& keys, int32_t first,
                        const KeyRange& range, float scale, const Visibility& visibility) const {
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
      for (int e = 0; e < 4; ++e) p[0][c][e] = exp2(p[0][c][e] * scale - lse_log2[e / 2]);
    const bool all_visible = first >= range.full_low && first + kBlockK - 1 <= range.full_high;
    if (!all_visible || ~keys.real != 0) hide(p, visibility, keys.real, first, warp_query, 0.0f);
  }

  // dm of a block of keys, as the lane's rows need it.
  struct Dm {
    enum { kNothing, kOneSpan, kTwoSpans, kEachKey } of;
    int32_t border;  // with two spans: the second's first key
    float low[kRows], high[kRows];
    float each[kBlockK / 8][4];  // with more
  };
  // begin() may come later: nothing waits for what this loads.
  RAL_DEVICE Dm load_dm(const KeyBlock& keys, const QueriesWithGradient& block) const {
    Dm dm;
    dm.of = Dm::kNothing;
    dm.border = 0;
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      dm.low[i] = dm.high[i] = 0.0f;
    if (block.ids == nullptr) return dm;
    const float* rows_of_lane[kRows];
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      rows_of_lane[i] = block.dm.row(warp_query + row_in_warp(i));
    const uint64_t borders = keys.starts & ~uint64_t(1);
    if ((borders & (borders - 1)) == 0) {
      dm.of = borders == 0 ? Dm::kOneSpan : Dm::kTwoSpans;
      const int32_t low_span = keys.span_of(0), high_span = keys.span_of(kBlockK - 1);
      RAL_UNROLL for (int i = 0; i < kRows; ++i) {
        dm.low[i] = MarginalGradient::at(rows_of_lane[i], low_span);
        if (borders != 0) dm.high[i] = MarginalGradient::at(rows_of_lane[i], high_span);
      }
      if (borders != 0) dm.border = lowest_bit(borders);
      return dm;
    }
    dm.of = Dm::kEachKey;
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int32_t span = keys.span_of_column(c, e);
        RAL_UNROLL for (int i = 0; i < kRows; ++i)
          dm.each[c][2 * i + e] = MarginalGradient::at(rows_of_lane[i], span);
      }
    return dm;
  }

  // Starts ds with what (9) and (11) add to its product: dm - delta.
  RAL_DEVICE void begin(float (&ds)[1][kBlockK / 8][4], const Dm& dm) const {
    const int32_t border = dm.border - 2 * (lane_index() % 4);  // from the lane's first column
    float low[kRows], high[kRows];
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      low[i] = dm.low[i] - delta[i];
      high[i] = dm.high[i] - delta[i];
    }
    if (dm.of == Dm::kEachKey) {
      RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 4; ++e) ds[0][c][e] = dm.each[c][e] - delta[e / 2];
    } else if (dm.of == Dm::kTwoSpans) {
      RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 4; ++e) ds[0][c][e] = 8 * c + e % 2 < border ? low[e / 2] : high[e / 2];
    } else {
      RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 4; ++e) ds[0][c][e] = low[e / 2];
    }
  }

  // Turns gradients of weights, less delta, into gradients of scores (11).
  RAL_DEVICE void differentiate(float (&ds)[1][kBlockK / 8][4],
                                const float (&p)[1][kBlockK / 8][4]) const {
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
      for (int e = 0; e < 4; ++e) ds[0][c][e] = gradient_of_score(p[0][c][e], ds[0][c][e]);
  }
};

}  // namespace cuda
}  // namespace ral
