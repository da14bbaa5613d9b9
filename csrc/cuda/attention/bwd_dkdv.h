// dk and dv of `attention`: equations (8), (9), (11) and (15) of
// ral_kernels/ops/attention/README.md. A CTA has kBlockK keys of a kv head. It walks over the
// queries of its part that see them, head by head, so that the sum over a group has one fixed
// order.
#pragma once

#include "attention/bwd_scores.h"

namespace ral {
namespace cuda {

// kGeneral: with what attention/general.h lists, and half the queries, for want of registers. For
// the same want, a CTA forms at most 128 columns of dk and dv; another one has the others.
template <typename T, int kHeadDim, bool kGeneral>
struct AttentionBwdDkdv {
  using Params = AttentionBwdParams;
  static constexpr int kBlockQ = kGeneral ? 32 : 64;
  static constexpr int kWarps = kBlockK / 16;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kColumns = kHeadDim < 128 ? kHeadDim : 128;  // of dk and dv
  static constexpr int kBands = kHeadDim / kColumns;
  static constexpr int kMinBlocks = kBands == 1 ? 2 : 1;
  using TileT = Tile<T, kHeadDim>;
  using Columns = Tile<T, kColumns>;
  static constexpr int kSharedBytes =
      2 * TileT::bytes(kBlockK) + 2 * TileT::bytes(kBlockQ) + 2 * kBlockQ * int(sizeof(float));
  static_assert(2 * kBlockQ >= kBlockK, "queries make room for the results");

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const ral_attention_params& call = params.call;
    KeysOfBlock block = keys_of_block<kGeneral>(params, kBlockK, kBands);
    const int column = block.share % kBands * kColumns;
    block.share /= kBands;
    if (block.num_keys <= 0) return;
    const Sequence& sequence = block.sequence;

    const TileT k{reinterpret_cast<T*>(shared)};
    const TileT v{k.data + kBlockK * TileT::kStride};
    const TileT q{v.data + kBlockK * TileT::kStride};
    const TileT dout{q.data + kBlockQ * TileT::kStride};
    float* const statistics = reinterpret_cast<float*>(dout.data + kBlockQ * TileT::kStride);

    copy_rows<kBlockK, kThreads, kGeneral>(
        k, rows_of<const T>(call.k, block.b, block.kv_head, block.first_token), call.k.stride_t,
        [&](int row) { return row < block.num_keys; }, call.head_dim);
    const int64_t columns_v = kGeneral ? call.head_dim_v : call.head_dim;
    copy_rows<kBlockK, kThreads, kGeneral>(
        v, rows_of<const T>(call.v, block.b, block.kv_head, block.first_token), call.v.stride_t,
        [&](int row) {
          return row < block.num_keys && (block.padding == nullptr ||
                                          load_global(block.padding + block.first_key + row) != 0);
        },
        columns_v);
    commit_copies();
    const int warp_key = warp_index() * 16;
    const WarpKeys keys(block, block.first_key, warp_key);

    const float scale = kGeneral ? 1.0f : call.scale * kLog2e;
    const QueriesOfPart part(params, block);
    const QueryRange range(block, part, block.first_key, block.num_keys);
    const ral_tensor& dout_tensor = params.gradients.dout;
    const bool has_dout = dout_tensor.data != nullptr;

    float dk[1][kColumns / 8][4], dv[1][kColumns / 8][4];
    clear(dk);
    clear(dv);
    for (int32_t h = part.first_head; h < part.stop_head; ++h) {
      const MarginalGradient dm(params, sequence, block.b, h);
      const GeneralScores<kGeneral> general(call, sequence, block.b, h);
      const int64_t statistics_row =
          (block.b * call.num_heads + h) * call.seqlen_q + sequence.q_start;
      const T* q_rows = rows_of<const T>(call.q, block.b, h, sequence.q_start);
      const T* dout_rows =
          has_dout ? rows_of<const T>(dout_tensor, block.b, h, sequence.q_start) : nullptr;
      for (int32_t first = range.low / kBlockQ * kBlockQ; first <= range.high; first += kBlockQ) {
        sync_block();  // the previous queries are no longer read
        copy_rows<kBlockQ, kThreads, kGeneral>(
            q, q_rows + first * call.q.stride_t, call.q.stride_t,
            [&](int row) { return first + row < sequence.length_q; }, call.head_dim);
        commit_copies();
        copy_rows<kBlockQ, kThreads, kGeneral>(
            dout, dout_rows + first * dout_tensor.stride_t, dout_tensor.stride_t,
            [&](int row) { return has_dout && first + row < sequence.length_q; }, columns_v);
        commit_copies();
        if (thread_index() < kBlockQ) {
          const int32_t query = first + thread_index();
          const bool there = query < sequence.length_q;
          const float lse = there ? load_global(params.lse_log2 + statistics_row + query) : 0.0f;
          const float delta = there ? load_global(params.delta + statistics_row + query) : 0.0f;
          const bool is_of_query = keys.dm_of == DmOf::kOneSpan;
          const float of_query = is_of_query ? dm.at(query, keys.first_span) : 0.0f;
          store_shared(statistics + thread_index(), lse);
          store_shared(statistics + kBlockQ + thread_index(), of_query - delta);
        }
        wait_for_copies<1>();
        sync_block();                // k, v, q and the statistics have arrived
        float p[1][kBlockQ / 8][4];  // transposed: rows are keys, columns are queries
        multiply_transposed(p, k, warp_key, q);
        GeneralSlopes<kGeneral, kBlockQ / 8> slopes;
        general.bend(p);
        general.differentiate(slopes, p);
        general.template add_transposed<T>(p, keys, first);
        keys.weigh(p, statistics, scale, block.visibility, first);
        float ds[1][kBlockQ / 8][4];
        keys.begin(ds, statistics + kBlockQ, dm, first);
        wait_for_copies<0>();
        sync_block();                                           // dout has arrived
        add_product(dv, p, TileT{opaque(dout.data) + column});  // (8)
        add_product_transposed(ds, v, warp_key, dout);          // (9)
        keys.differentiate(ds, p);
        slopes.multiply(ds);
        add_product(dk, ds, TileT{opaque(q.data) + column});  // (15), without the scale
      }
    }
    wait_for_copies<0>();  // in flight still where no query sees the keys
    sync_block();          // q and dout now stage the results
    const Columns stage{q.data};
    store_keys<kHeadDim, kGeneral>(params, block, block.first_token, warp_key, block.num_keys,
                                   column, dk, dv, stage, stage);
  }
};

template <typename T, int kHeadDim>
struct attention_bwd_dkdv_kernel : AttentionBwdDkdv<T, kHeadDim, false> {
  static const char* name() { return "attention_bwd_dkdv_kernel"; }
};
template <typename T, int kHeadDim>
struct attention_bwd_dkdv_general_kernel : AttentionBwdDkdv<T, kHeadDim, true> {
  static const char* name() { return "attention_bwd_dkdv_general_kernel"; }
};

}  // namespace cuda
}  // namespace ral
