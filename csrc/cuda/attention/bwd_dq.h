// dq of `attention`: equations (9), (11) and (14) of ral_kernels/ops/attention/README.md. A CTA has
// kBlockQ queries of a head and walks over the keys that they see. The general kernel also writes
// dspan_bias (12), (16).
#pragma once

#include "attention/bwd_scores.h"
#include "attention/span_bias.h"

namespace ral {
namespace cuda {

// kGeneral: with what attention/general.h lists. A CTA forms at most 128 columns of dq, for want
// of registers; another one has the others.
template <typename T, int kHeadDim, bool kGeneral>
struct AttentionBwdDq {
  using Params = AttentionBwdParams;
  static constexpr int kWarps = 4;
  static constexpr int kBlockQ = 16 * kWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kColumns = kHeadDim < 128 ? kHeadDim : 128;  // of dq
  static constexpr int kBands = kHeadDim / kColumns;
  static constexpr int kMinBlocks = kBands == 1 ? 2 : 1;
  using TileT = Tile<T, kHeadDim>;
  using Columns = Tile<T, kColumns>;
  static_assert(kBlockQ <= kBlockK, "keys make room for the results");
  static constexpr int kSharedBytes = 2 * TileT::bytes(kBlockQ) + 2 * TileT::bytes(kBlockK);

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const ral_attention_params& call = params.call;
    const QueriesWithGradient block(params, kBlockQ, kGeneral && call.span_bias.data != nullptr,
                                    kBands);
    const int column = block.share * kColumns;
    if (block.num_queries <= 0 || column >= call.head_dim) return;
    const int64_t b = block.b, h = block.h, first_token = block.first_token;

    const TileT q{reinterpret_cast<T*>(shared)};
    const TileT dout{q.data + kBlockQ * TileT::kStride};
    const TileT k{dout.data + kBlockQ * TileT::kStride};
    const TileT v{k.data + kBlockK * TileT::kStride};
    const T* k_rows = rows_of<const T>(call.k, b, block.kv_head, block.sequence.k_start);
    const T* v_rows = rows_of<const T>(call.v, b, block.kv_head, block.sequence.k_start);
    const auto has_query = [&](int row) { return row < block.num_queries; };
    copy_rows<kBlockQ, kThreads, kGeneral>(q, rows_of<const T>(call.q, b, h, first_token),
                                           call.q.stride_t, has_query, call.head_dim);
    const ral_tensor& dout_tensor = params.gradients.dout;
    const bool has_dout = dout_tensor.data != nullptr;
    const int64_t& columns_v = kGeneral ? call.head_dim_v : call.head_dim;
    copy_rows<kBlockQ, kThreads, kGeneral>(
        dout, has_dout ? rows_of<const T>(dout_tensor, b, h, first_token) : nullptr,
        dout_tensor.stride_t, [&](int row) { return has_dout && row < block.num_queries; },
        columns_v);
    commit_copies();

    const int warp_row = warp_index() * 16;
    const WarpQueries rows(params, block, warp_row);
    const GeneralScores<kGeneral> general(call, block.sequence, b, h);
    SpanBiasGradient<kGeneral> dbias(params, block, warp_row);

    const float scale = kGeneral ? 1.0f : call.scale * kLog2e;
    const KeyRange range(block.visibility, block.first_query, block.num_queries);

    float dq[1][kColumns / 8][4];
    clear(dq);
    for (int32_t first = range.low / kBlockK * kBlockK; first <= range.high; first += kBlockK) {
      // 0 · NaN is NaN, so neither keys nor values of padding are read.
      const auto is_real = [&](int row) {
        return first + row < block.visibility.length_k &&
               (block.padding == nullptr || load_global(block.padding + first + row) != 0);
      };
      copy_rows<kBlockK, kThreads, kGeneral>(k, k_rows + first * call.k.stride_t, call.k.stride_t,
                                             is_real, call.head_dim);
      commit_copies();
      copy_rows<kBlockK, kThreads, kGeneral>(v, v_rows + first * call.v.stride_t, call.v.stride_t,
                                             is_real, columns_v);
      commit_copies();
      const KeyBlock keys =
          load_key_block(block.ids, block.padding, first, block.visibility.length_k);
      wait_for_copies<1>();
      sync_block();  // q, dout and k have arrived
      float p[1][kBlockK / 8][4];
      multiply_transposed(p, q, warp_row, k);
      GeneralSlopes<kGeneral, kBlockK / 8> slopes;
      general.bend(p);
      general.differentiate(slopes, p);
      general.template add<T>(p, keys, first, rows.warp_query);
      rows.weigh(p, keys, first, range, scale, block.visibility);
      dbias.add_weights(p, keys);  // before there is ds, for want of registers
      float ds[1][kBlockK / 8][4];
      rows.begin(ds, keys, block);
      wait_for_copies<0>();
      sync_block();                                   // v has arrived
      add_product_transposed(ds, dout, warp_row, v);  // (9)
      rows.differentiate(ds, p);
      dbias.add(ds, keys);
      slopes.multiply(ds);
      add_product(dq, ds, TileT{opaque(k.data) + column});  // (14), without the scale
      sync_block();                                         // k and v are no longer read
    }
    dbias.end();
    wait_for_copies<0>();  // in flight still where queries see no key
    sync_block();
    // No longer read, k stages the results.
    store_rows<1, kGeneral>(
        rows_of<T>(params.gradients.dq, b, h, first_token) + column, params.gradients.dq.stride_t,
        warp_row, block.num_queries, dq, [&](int) { return call.scale; }, Columns{k.data},
        call.head_dim - column);
  }
};

template <typename T, int kHeadDim>
struct attention_bwd_dq_kernel : AttentionBwdDq<T, kHeadDim, false> {
  static const char* name() { return "attention_bwd_dq_kernel"; }
};
template <typename T, int kHeadDim>
struct attention_bwd_dq_general_kernel : AttentionBwdDq<T, kHeadDim, true> {
  static const char* name() { return "attention_bwd_dq_general_kernel"; }
};

}  // namespace cuda
}  // namespace ral
