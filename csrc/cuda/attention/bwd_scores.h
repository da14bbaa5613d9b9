// What the backward kernels of `attention` do between products, for a warp's 16 rows of scores.
// They form weights (5), the part of (9) that is no product, and (11). All kernels sum in the same
// order.
#pragma once

#include "attention/bwd.h"
#include "attention/general.h"
#include "core/blocks.h"
#include "core/softmax.h"

namespace ral {
namespace cuda {

// ---- CTAs with keys: dk, dv ---------------------------------------------------------------------

// A share is a band of columns of a part of the queries. The bands of a part are neighbours.
template <bool kGeneral = false>
RAL_DEVICE KeysOfBlock keys_of_block(const AttentionBwdParams& params, int32_t block_k,
                                     int32_t num_bands = 1) {
  const bool has_bias = kGeneral && params.call.span_bias.data != nullptr;
  return {params.call, params.order, num_bands * params.splits.num_parts, block_k,
          params.gradients.dmarginals != nullptr || has_bias};
}

// The heads [first_head, stop_head) and queries [low, high] that a CTA's share sums over. Ranges of
// queries do not depend on the keys, so kernels with other blocks of keys have the same parts.
struct QueriesOfPart {
  int32_t first_head, stop_head;
  int32_t low, high;

  RAL_DEVICE QueriesOfPart(const AttentionBwdParams& params, const KeysOfBlock& block) {
    const KeySplits& splits = params.splits;
    const int32_t group = int32_t(params.call.num_heads / params.call.num_kv_heads);
    const int32_t of_heads = block.share / splits.ranges, range = block.share % splits.ranges;
    // The first parts of heads are the larger ones.
    const auto cut = [&](int32_t part) {
      return int32_t(block.kv_head) * group + (part * group + splits.heads - 1) / splits.heads;
    };
    first_head = cut(of_heads);
    stop_head = cut(of_heads + 1);
    const int64_t tiles = (block.sequence.length_q + kTile - 1) / kTile;
    low = int32_t(range * tiles / splits.ranges) * kTile;
    high =
        minimum(int32_t((range + 1) * tiles / splits.ranges) * kTile, block.sequence.length_q) - 1;
  }

 private:
  static constexpr int32_t kTile = 64;  // queries that the kernels take at once
};

// Queries [low, high] of a part that may see one of the keys [first_key, first_key + num_keys).
struct QueryRange {
  int32_t low, high;

  RAL_DEVICE QueryRange(const KeysOfBlock& block, const QueriesOfPart& part, int32_t first_key,
                        int32_t num_keys)
      : low(maximum(block.visibility.first_query(first_key), part.low)),
        high(num_keys <= 0
                 ? -1
                 : minimum(block.visibility.last_query(first_key + num_keys - 1), part.high)) {}
};

// Writes columns from `first_column` on of dk and dv, of a warp's keys [row, row + 16) of
// `num_rows`: the gradients, or the part's own sums of kHeadDim columns. The stages as in
// store_rows. One branch for both keeps the Hopper kernel to registers.
template <int kHeadDim, bool kGeneral = false, typename T, int kColumns>
RAL_DEVICE void store_keys(const AttentionBwdParams& params, const KeysOfBlock& block,
                           int64_t first_token, int row, int32_t num_rows, int first_column,
                           const float (&dk)[1][kColumns / 8][4],
                           const float (&dv)[1][kColumns / 8][4], Tile<T, kColumns> stage_dk,
                           Tile<T, kColumns> stage_dv) {
  const ral_attention_params& call = params.call;
  const KeySplits& splits = params.splits;
  if (splits.num_parts == 1) {
    const ral_tensor &to_dk = params.gradients.dk, &to_dv = params.gradients.dv;
    const int64_t columns_v = kGeneral ? call.head_dim_v : call.head_dim;
    store_rows<1, kGeneral>(
        rows_of<T>(to_dk, block.b, block.kv_head, first_token) + first_column, to_dk.stride_t, row,
        num_rows, dk, [&](int) { return call.scale; }, stage_dk, call.head_dim - first_column);
    store_rows<1, kGeneral>(
        rows_of<T>(to_dv, block.b, block.kv_head, first_token) + first_column, to_dv.stride_t, row,
        num_rows, dv, [](int) { return 1.0f; }, stage_dv, columns_v - first_column);
  } else {
    const int64_t matrix =
        (block.share * call.batch_size + block.b) * call.num_kv_heads + block.kv_head;
    const int64_t at = (matrix * call.seqlen_k + first_token) * kHeadDim + first_column;
    store_float_rows<kHeadDim>(splits.dk + at, row, num_rows, dk);
    store_float_rows<kHeadDim>(splits.dv + at, row, num_rows, dv);
  }
}

// How the gradient of marginals, dm, reaches the rows and columns of a block of scores.
enum class DmOf {
  kNothing,  // there is none
  kOneSpan,  // the block is in one span, so dm belongs to a query
  kEachKey,
};

// A warp's 16 keys of a block of kBlockK. Scores are transposed: rows are keys, columns are
// queries.
struct WarpKeys {
  static constexpr int kRows = 2, kKeys = 16;
  KeyBlock keys;
  int32_t first_key, warp_key;  // the block's first; the warp's first, in the block
  DmOf dm_of;
  int32_t span[kRows];  // of the lane's keys
  int32_t first_span;   // of the warp's first key
  bool real[kRows];

  RAL_DEVICE WarpKeys(const KeysOfBlock& block, int32_t first_key, int warp_key)
      : keys(load_key_block(block.ids, block.padding, first_key, block.visibility.length_k)),
        first_key(first_key),
        warp_key(warp_key),
        dm_of(block.ids == nullptr ? DmOf::kNothing
              : keys.is_one_span() ? DmOf::kOneSpan
                                   : DmOf::kEachKey),
        first_span(keys.span_of(warp_key)) {
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const int key = warp_key + row_in_warp(i);
      real[i] = (keys.real >> key & 1) != 0;
      const int32_t from_low = shuffle(keys.low, key % 32),
                    from_high = shuffle(keys.high, key % 32);
      span[i] = key < 32 ? from_low : from_high;
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

  // Starts ds with what (9) and (11) add to its product, dm - delta. less_delta: -delta of the
  // queries or, if the block is in one span, dm - delta, in shared memory.
  template <int kTiles>
  RAL_DEVICE void begin(float (&ds)[1][kTiles][4], const float* less_delta,
                        const MarginalGradient& dm, int32_t first_query) const {
    if (dm_of == DmOf::kEachKey) {
      RAL_UNROLL for (int c = 0; c < kTiles; ++c) {
        const Float2 both =
            load_shared(reinterpret_cast<const Float2*>(less_delta + 8 * c + mine()));
        RAL_UNROLL for (int i = 0; i < kRows; ++i) {
          ds[0][c][2 * i] = dm.at(first_query + mine() + 8 * c, span[i]) + both.x;
          ds[0][c][2 * i + 1] = dm.at(first_query + mine() + 8 * c + 1, span[i]) + both.y;
        }
      }
      return;
    }
    RAL_UNROLL for (int c = 0; c < kTiles; ++c) {
      const Float2 both = load_shared(reinterpret_cast<const Float2*>(less_delta + 8 * c + mine()));
      RAL_UNROLL for (int i = 0; i < kRows; ++i) {
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

 protected:
  RAL_DEVICE static int mine() { return 2 * (lane_index() % 4); }

 private:
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

  RAL_DEVICE QueriesWithGradient(const AttentionBwdParams& params, int32_t block_q,
                                 bool has_bias = false, int32_t num_bands = 1)
      : QueriesOfBlock(params.call, params.order, block_q,
                       params.gradients.dmarginals != nullptr || has_bias, num_bands),
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

  // Starts ds with what (9) and (11) add to its product: dm - delta.
  RAL_DEVICE void begin(float (&ds)[1][kBlockK / 8][4], const KeyBlock& keys,
                        const QueriesWithGradient& block) const {
    const bool is_one_span = keys.is_one_span();
    const int32_t first_span = is_one_span && block.ids != nullptr ? keys.span_of(0) : -1;
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const float less_delta = block.dm.at(warp_query + row_in_warp(i), first_span) - delta[i];
      RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 2; ++e) ds[0][c][2 * i + e] = less_delta;
    }
    if (is_one_span) return;
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int32_t span = keys.span_of_column(c, e);
        RAL_UNROLL for (int i = 0; i < kRows; ++i)
          ds[0][c][2 * i + e] += block.dm.at(warp_query + row_in_warp(i), span);
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
