// Forward of `attention`: equations (1) to (7) of ral_kernels/ops/attention/README.md.
#pragma once

#include "attention/fwd_rows.h"

namespace ral {
namespace cuda {

// One CTA has kBlockQ queries of a head and walks over all keys that they see. Each warp owns
// kWarpQ rows. K and V pass through shared memory, one block of each at a time. The next K arrives
// while weights are multiplied with V; V arrives while scores are formed.
//
// kGeneral: with what attention/general.h lists, and half the rows, for want of registers. kSplit:
// a CTA walks over the keys of its part alone (KeyParts).
template <typename T, int kHeadDim, bool kGeneral, bool kSplit = false>
struct AttentionFwd {
  using Params = AttentionFwdParams;
  static constexpr int kRowTiles = kGeneral ? 1 : 2, kWarps = 4;
  static constexpr int kRows = 2 * kRowTiles;    // per lane
  static constexpr int kWarpQ = 16 * kRowTiles;  // per warp
  static constexpr int kBlockQ = kWarpQ * kWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMinBlocks = kHeadDim > 128 ? 1 : 2;
  using TileT = Tile<T, kHeadDim>;
  static constexpr int kSharedBytes =
      TileT::bytes(kBlockQ) + 2 * TileT::bytes(kBlockK) + kWarps * int(sizeof(MarginalRows));

  using Scores = float[kRowTiles][kBlockK / 8][4];

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const ral_attention_params& call = params.call;
    const QueriesOfBlock block = queries_of_block<kGeneral, kSplit>(params, kBlockQ);
    if (block.num_queries <= 0) return;
    const Sequence& sequence = block.sequence;
    const Visibility& visibility = block.visibility;
    const int32_t first_query = block.first_query, num_queries = block.num_queries;

    const TileT q{reinterpret_cast<T*>(shared)};
    const TileT k{q.data + kBlockQ * TileT::kStride};
    const TileT v{k.data + kBlockK * TileT::kStride};
    const T* q_rows = rows_of<const T>(call.q, block.b, block.h, block.first_token);
    const T* k_rows = rows_of<const T>(call.k, block.b, block.kv_head, sequence.k_start);
    const T* v_rows = rows_of<const T>(call.v, block.b, block.kv_head, sequence.k_start);

    const int warp_row = warp_index() * kWarpQ;  // the warp's first row in the CTA
    auto* marginal_rows = reinterpret_cast<MarginalRows*>(v.data + kBlockK * TileT::kStride);
    auto marginals = begin_marginals<Marginals<kRowTiles>, kSplit>(
        params, block, block.first_token, num_queries, warp_row, marginal_rows + warp_index());

    float out[kRowTiles][kHeadDim / 8][4];
    clear(out);
    float m[kRows], normaliser[kRows];  // m in base 2; normaliser: the lane's part of the sum
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      m[i] = minus_infinity();
      normaliser[i] = 0.0f;
    }
    const float scale = kGeneral ? 1.0f : call.scale * kLog2e;
    const GeneralScores<kGeneral> general(call, sequence, block.b, block.h);
    const int64_t columns_v = kGeneral ? call.head_dim_v : call.head_dim;

    const int32_t last_query = first_query + num_queries - 1;
    int32_t low = visibility.first_key(first_query), high = visibility.last_key(last_query);
    if (kSplit) {
      const KeysOfPart part(params.parts, block.share, visibility.length_k);
      low = maximum(low, part.low);
      high = minimum(high, part.high);
    }
    // Range of keys that all rows see, before padding.
    const int32_t full_low = visibility.first_key(last_query);
    const int32_t full_high = visibility.last_key(first_query);
    const int32_t begin = low / kBlockK * kBlockK;

    const auto copy_keys = [&](TileT tile, const T* rows, int64_t stride, int32_t first,
                               const uint8_t* hidden, int64_t columns) {
      copy_rows<kBlockK, kThreads, kGeneral>(
          tile, rows + first * stride, stride,
          [&](int row) {
            if (first + row >= visibility.length_k) return false;
            return hidden == nullptr || load_global(hidden + first + row) != 0;
          },
          columns);
      commit_copies();
    };
    copy_rows<kBlockQ, kThreads, kGeneral>(
        q, q_rows, call.q.stride_t, [&](int row) { return row < num_queries; }, call.head_dim);
    commit_copies();
    if (low <= high) copy_keys(k, k_rows, call.k.stride_t, begin, nullptr, call.head_dim);

    for (int32_t first = begin; first <= high; first += kBlockK) {
      const KeyBlock keys = load_key_block(block.ids, block.padding, first, visibility.length_k);
      wait_for_copies<0>();
      sync_block();  // K has arrived; the previous block's V is no longer read
      // 0 · NaN is NaN, so values of padding are not read.
      copy_keys(v, v_rows, call.v.stride_t, first, block.padding, columns_v);
      Scores s;
      multiply_transposed(s, q, warp_row, k);
      general.bend(s);
      general.template add<T>(s, keys, first, first_query + warp_row);
      const bool all_visible = first >= full_low && first + kBlockK - 1 <= full_high;
      if (!all_visible || ~keys.real != 0)
        hide(s, visibility, keys.real, first, first_query + warp_row, minus_infinity());
      if (marginals.num_spans != 0) marginals.enter(keys, m);
      RAL_UNROLL for (int i = 0; i < kRows; ++i) {
        float sum;
        const float alpha = weigh(s, i, m[i], scale, sum);
        normaliser[i] = normaliser[i] * alpha + sum;
        marginals.scale_and_add(i, alpha, sum, keys);
        RAL_UNROLL for (int c = 0; c < kHeadDim / 8; ++c) RAL_UNROLL
          for (int e = 0; e < 2; ++e) out[i / 2][c][i % 2 * 2 + e] *= alpha;
      }
      if (marginals.num_spans != 0 && !keys.is_one_span()) marginals.add_spans(s, keys, m);
      wait_for_copies<0>();
      sync_block();  // V has arrived; all warps have formed their scores
      if (first + kBlockK <= high)
        copy_keys(k, k_rows, call.k.stride_t, first + kBlockK, nullptr, call.head_dim);
      add_product(out, s, v);  // (6)
    }
    wait_for_copies<0>();  // in flight still where queries see no key
    sync_block();
    // The warp's rows of the query tile are no longer read, so they stage the output.
    finish<kRowTiles, kGeneral, kSplit>(params, block, block.first_token, num_queries, warp_row, q,
                                        out, m, normaliser, marginals);
  }
};

template <typename T, int kHeadDim>
struct attention_fwd_kernel : AttentionFwd<T, kHeadDim, false> {
  static const char* name() { return "attention_fwd_kernel"; }
};
template <typename T, int kHeadDim>
struct attention_fwd_general_kernel : AttentionFwd<T, kHeadDim, true> {
  static const char* name() { return "attention_fwd_general_kernel"; }
};

template <typename T, int kHeadDim>
struct attention_fwd_split_kernel : AttentionFwd<T, kHeadDim, true, true> {
  static const char* name() { return "attention_fwd_split_kernel"; }
};

}  // namespace cuda
}  // namespace ral
