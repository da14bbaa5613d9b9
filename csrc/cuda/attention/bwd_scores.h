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

// How the gradient of marginals, dm, reaches the rows and columns of a block of scores.
enum class DmOf {
  kNothing,   // there is none
  kOneSpan,   // the block has one span: dm belongs to a query, so it is part of what (11) subtracts
  kTwoSpans,  // two numbers a query, loaded in advance
  kEachKey,   // loaded where it is added
};

// A warp's 16 keys of a block of kBlockK. Scores are transposed: rows are keys, columns are
// queries.
struct WarpKeys {
  static constexpr int kRows = 2;
  KeyBlock keys;
  int32_t first_key, warp_key;  // the block's first; the warp's first, in the block
  DmOf dm_of;
  int32_t span[kRows];            // of the lane's keys
  int32_t low_span, high_span;    // of the warp's first key and of its last
  bool real[kRows], high[kRows];  // high: the key's span is high_span, if there are two

  RAL_DEVICE WarpKeys(const KeysOfBlock& block, int32_t first_key, int warp_key)
      : keys(load_key_block(block.ids, block.padding, first_key, block.visibility.length_k)),
        first_key(first_key),
        warp_key(warp_key),
        low_span(keys.span_of(warp_key)),
        high_span(keys.span_of(warp_key + 15)) {
    // Bit i: spans differ between the warp's keys i - 1 and i.
    const uint32_t borders = uint32_t(keys.starts >> warp_key) & 0xfffe;
    dm_of = block.ids == nullptr             ? DmOf::kNothing
            : keys.is_one_span()             ? DmOf::kOneSpan
            : (borders & (borders - 1)) == 0 ? DmOf::kTwoSpans
                                             : DmOf::kEachKey;
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const int key = warp_key + row_in_warp(i);
      real[i] = (keys.real >> key & 1) != 0;
      const int32_t from_low = shuffle(keys.low, key % 32),
                    from_high = shuffle(keys.high, key % 32);
      span[i] = key < 32 ? from_low : from_high;
      high[i] = (borders & (2u << row_in_warp(i)) - 1) != 0;
    }
  }

  // Whether load_dm loads all of dm that the warp's keys need.
  RAL_DEVICE bool dm_is_of_query() const {
    return dm_of == DmOf::kOneSpan || dm_of == DmOf::kTwoSpans;
  }
  // dm of a query: of low_span and of high_span.
  RAL_DEVICE void load_dm(float (&of_query)[2], const MarginalGradient& dm, int32_t query) const {
    of_query[0] = dm.at(query, low_span);
    of_query[1] = dm_of == DmOf::kTwoSpans ? dm.at(query, high_span) : 0.0f;
  }

  // What (11) subtracts from the gradients of a query's weights. low_dm: dm of low_span.
  RAL_DEVICE float delta_of(float delta, float low_dm) const {
    return dm_of == DmOf::kOneSpan ? delta - low_dm : delta;
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

  // Turns gradients of weights into gradients of scores: the rest of (9), whose product is in `ds`,
  // and (11). delta, low_dm, high_dm: of the queries, in shared memory. Without the last two, dm is
  // loaded for each key.
  template <int kTiles>
  RAL_DEVICE void differentiate(float (&ds)[1][kTiles][4], const float (&p)[1][kTiles][4],
                                const float* delta, const MarginalGradient& dm, int32_t first_query,
                                const float* low_dm = nullptr,
                                const float* high_dm = nullptr) const {
    if (dm_of == DmOf::kTwoSpans && low_dm != nullptr)
      add_dm(ds, low_dm, high_dm);
    else if (dm_of == DmOf::kTwoSpans || dm_of == DmOf::kEachKey)
      add_dm(ds, dm, first_query);
    RAL_UNROLL for (int c = 0; c < kTiles; ++c) {
      const Float2 both = load_shared(reinterpret_cast<const Float2*>(delta + 8 * c + mine()));
      RAL_UNROLL for (int i = 0; i < kRows; ++i) {
        float& low = ds[0][c][2 * i];
        float& high = ds[0][c][2 * i + 1];
        low = gradient_of_score(p[0][c][2 * i], low, both.x);
        high = gradient_of_score(p[0][c][2 * i + 1], high, both.y);
      }
    }
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

  // Adds dm of each key's span, out of two in shared memory.
  template <int kTiles>
  RAL_DEVICE void add_dm(float (&dp)[1][kTiles][4], const float* low_dm,
                         const float* high_dm) const {
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const float* of_key = (high[i] ? high_dm : low_dm) + mine();
      RAL_UNROLL for (int c = 0; c < kTiles; ++c) {
        const Float2 both = load_shared(reinterpret_cast<const Float2*>(of_key + 8 * c));
        dp[0][c][2 * i] += both.x;
        dp[0][c][2 * i + 1] += both.y;
      }
    }
  }

  // Adds dm of each key's span.
  template <int kTiles>
  RAL_DEVICE void add_dm(float (&dp)[1][kTiles][4], const MarginalGradient& dm,
                         int32_t first_query) const {
    RAL_UNROLL for (int c = 0; c < kTiles; ++c) RAL_UNROLL
      for (int i = 0; i < kRows; ++i) {
        dp[0][c][2 * i] += dm.at(first_query + mine() + 8 * c, span[i]);
        dp[0][c][2 * i + 1] += dm.at(first_query + mine() + 8 * c + 1, span[i]);
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

  // dm of the lane's rows in a block of at most two spans: of the first span and of the second.
  struct Dm {
    DmOf of;
    float low[kRows], high[kRows];
  };
  RAL_DEVICE Dm load_dm(const KeyBlock& keys, const QueriesWithGradient& block) const {
    Dm dm{DmOf::kNothing, {0.0f, 0.0f}, {0.0f, 0.0f}};
    if (block.ids == nullptr) return dm;
    const uint64_t borders = keys.starts & ~uint64_t(1);
    dm.of = borders == 0                     ? DmOf::kOneSpan
            : (borders & (borders - 1)) == 0 ? DmOf::kTwoSpans
                                             : DmOf::kEachKey;
    if (dm.of == DmOf::kEachKey) return dm;
    const int32_t low_span = keys.span_of(0), high_span = keys.span_of(kBlockK - 1);
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const int32_t query = warp_query + row_in_warp(i);
      dm.low[i] = block.dm.at(query, low_span);
      if (dm.of == DmOf::kTwoSpans) dm.high[i] = block.dm.at(query, high_span);
    }
    return dm;
  }

  // Turns gradients of weights into gradients of scores: the rest of (9), whose product is in `ds`,
  // and (11).
  RAL_DEVICE void differentiate(float (&ds)[1][kBlockK / 8][4], const float (&p)[1][kBlockK / 8][4],
                                const KeyBlock& keys, const Dm& dm,
                                const QueriesWithGradient& block) const {
    if (dm.of == DmOf::kTwoSpans) {
      const int32_t border =
          lowest_bit(keys.starts & ~uint64_t(1)) - 2 * (lane_index() % 4);  // from the lane's first
      RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 4; ++e)
          ds[0][c][e] += 8 * c + e % 2 < border ? dm.low[e / 2] : dm.high[e / 2];
    } else if (dm.of == DmOf::kEachKey) {
      RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int32_t span = keys.span_of_column(c, e);
          RAL_UNROLL for (int i = 0; i < kRows; ++i)
            ds[0][c][2 * i + e] += block.dm.at(warp_query + row_in_warp(i), span);
        }
    }
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const float row_delta = dm.of == DmOf::kOneSpan ? delta[i] - dm.low[i] : delta[i];
      RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& dp = ds[0][c][2 * i + e];
          dp = gradient_of_score(p[0][c][2 * i + e], dp, row_delta);
        }
    }
  }
};

}  // namespace cuda
}  // namespace ral
