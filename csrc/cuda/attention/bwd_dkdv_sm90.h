// dk and dv of `attention` for Hopper: equations (8), (9), (11) and (15) of
// ral_kernels/ops/attention/README.md. attention/bwd_sm90.h says why accesses are in order.
#pragma once

#include "attention/bwd_runs_sm90.h"

namespace ral {
namespace cuda {

// One CTA has 64 keys of a kv head for each consumer warpgroup. It walks over the queries of its
// part that see them, head by head, so that the sum over a group has one fixed order. Scores are
// transposed, so their accumulators are the A operands of pᵀ dout and dsᵀ q.
template <typename T, int kHeadDim>
struct attention_bwd_dkdv_sm90_kernel : AttentionBwdSm90<kHeadDim, 2> {
  using Params = AttentionBwdSm90Params;
  using Base = AttentionBwdSm90<kHeadDim, 2>;
  using Base::kConsumers, Base::kPanels, Base::kTileBytes;
  using typename Base::Barriers, typename Base::Rings;
  static constexpr int kGroupK = kPanelRows, kBlockKeys = kGroupK * kConsumers;
  static constexpr int kBlockQ = TileStatistics::kQueries;
  static constexpr int kMinBlocks = 1;
  static constexpr int kUsedBytes =
      Base::kStatisticsAt + 4 * kConsumers * int(sizeof(TileStatistics));
  static constexpr int kSharedBytes = kUsedBytes + kSwizzledBytes;  // room to align to 1024 bytes
  static_assert(kGroupK == kBlockK, "a warp knows of 64 keys");

  static const char* name() { return "attention_bwd_dkdv_sm90_kernel"; }

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const KeysOfBlock block = keys_of_block(params.backward, kBlockKeys);
    if (block.num_keys <= 0) return;
    shared = Base::aligned(shared);
    Barriers& barriers = Base::set_up_barriers(shared);
    const QueriesOfPart part(params.backward, block);
    const QueryRange range(block, part, block.first_key, block.num_keys);
    const int32_t begin = range.low / kBlockQ * kBlockQ;
    const int group = warp_index() / 4;
    if (group == 0) {
      give_registers<Base::kProducerRegisters>();
      if (warp_index() == 0) produce(params, block, part, begin, range.high, shared, barriers);
    } else {
      take_registers<Base::kConsumerRegisters>();
      consume(params, block, part, begin, range.high, shared, barriers, group - 1);
    }
  }

 private:
  RAL_DEVICE static void produce(const Params& params, const KeysOfBlock& block,
                                 const QueriesOfPart& part, int32_t begin, int32_t high,
                                 char* shared, Barriers& barriers) {
    const int32_t key_token = int32_t(block.first_token);
    Base::bring_own(shared, barriers, params.k, params.v, key_token, key_token, block.kv_head,
                    block.b);
    Rings rings;
    for (int32_t h = part.first_head; h < part.stop_head; ++h) {
      for (int32_t first = begin; first <= high; first += kBlockQ, rings.advance()) {
        const int32_t token = block.sequence.q_start + first;
        Base::bring(shared, barriers, rings, 0, params.q, token, h, block.b);
        Base::bring(shared, barriers, rings, 1, params.dout, params.dout_token(token), h, block.b);
      }
    }
  }

  RAL_DEVICE static void consume(const Params& params, const KeysOfBlock& block,
                                 const QueriesOfPart& part, int32_t begin, int32_t high,
                                 char* shared, Barriers& barriers, int group) {
    const AttentionBwdParams& backward = params.backward;
    const ral_attention_params& call = backward.call;
    const int warp_key = warp_index() % 4 * 16;  // the warp's first key in its warpgroup
    const int32_t first_key = block.first_key + group * kGroupK;
    const int32_t num_keys = block.num_keys - group * kGroupK;  // none if negative
    const WarpRuns keys(block, first_key, warp_key);
    // Queries that see the warpgroup's own keys. Products with others would be wasted.
    const QueryRange range(block, part, first_key, minimum(num_keys, kGroupK));
    const int32_t own_begin = range.low / kBlockQ * kBlockQ;
    auto* const statistics = reinterpret_cast<TileStatistics*>(shared + Base::kStatisticsAt) +
                             group * 4 + warp_index() % 4;
    char* const k_tile = shared + Base::own_at(0) + group * kTileBytes;
    char* const v_tile = shared + Base::own_at(1) + group * kTileBytes;
    const uint32_t k = shared_address(k_tile), v = shared_address(v_tile);

    float dk[1][kHeadDim / 8][4], dv[1][kHeadDim / 8][4];
    clear(dk);
    clear(dv);
    float p[1][kBlockQ / 8][4], ds[1][kBlockQ / 8][4];
    uint32_t left_p[4][4], left_ds[4][4];
    const float scale = call.scale * kLog2e;
    Rings rings;

    wait(&barriers.full_own, 0);
    for (int32_t h = part.first_head; h < part.stop_head; ++h) {
      const MarginalGradient dm(backward, block.sequence, block.b, h);
      const int64_t first_row =
          (block.b * call.num_heads + h) * call.seqlen_q + block.sequence.q_start;
      for (int32_t first = begin; first <= high; first += kBlockQ, rings.advance()) {
        if (first < own_begin || first > range.high) {
          Base::pass_over(barriers, rings);
          continue;
        }
        char* const q_tile = Base::tile(shared, rings, 0);
        char* const dout_tile = Base::tile(shared, rings, 1);
        const uint32_t q = shared_address(q_tile), dout = shared_address(dout_tile);
        const int32_t num_queries = block.sequence.length_q - first;
        // Loaded before products start, and read after that.
        OfQueries lse_log2, delta;
        lse_log2.load(backward.lse_log2, first_row + first, num_queries);
        delta.load(backward.delta, first_row + first, num_queries);
        const WarpRuns::OwnDm own_dm = keys.load_dm(dm, first);
        Base::wait_for(barriers, rings, 0);
        // TMA does not zero queries of the next sequence.
        if (call.cu_seqlens_q != nullptr && num_queries < kBlockQ) {
          Base::wait_for(barriers, rings, 1);
          clear_rows<kPanels>(q_tile, ~uint64_t(0) << num_queries);
          clear_rows<kPanels>(dout_tile, ~uint64_t(0) << num_queries);
          publish_to_async();
          sync_group(1 + group);
        }
        start_all_scores<T, kHeadDim>(p[0], k, q);

        sync_warp();  // all lanes have read the previous statistics
        lse_log2.store(statistics->lse_log2);
        keys.store_less_delta(statistics, delta, own_dm, dm, first);
        sync_warp();
        keys.begin(ds, statistics);
        Base::wait_for(barriers, rings, 1);
        start_all_scores<T, kHeadDim, true>(ds[0], v, dout);  // (9)

        wait_for_products<1>();
        pin(p[0]);
        keys.weigh(p, statistics->lse_log2, scale, block.visibility, first);
        round_left<T>(left_p, p[0]);
        start_all_products<T>(dv[0], left_p, dout);  // (8)
        wait_for_products<1>();
        pin(ds[0]);
        keys.differentiate(ds, p);
        round_left<T>(left_ds, ds[0]);
        start_all_products<T>(dk[0], left_ds, q);  // (15), without the scale
        wait_for_products<1>();
        pin(dv[0]);
        pin(left_p);
        Base::give_up(barriers, rings, 1);
        wait_for_products<0>();
        pin(dk[0]);
        pin(left_ds);
        Base::give_up(barriers, rings, 0);
      }
    }
    sync_group(1 + group);
    const int64_t token = block.first_token + group * kGroupK;
    store_keys<kHeadDim, true>(backward, block, token, warp_key, num_keys, 0, dk, dv,
                               Tile<T, kHeadDim>{reinterpret_cast<T*>(k_tile)},
                               Tile<T, kHeadDim>{reinterpret_cast<T*>(v_tile)});
  }
};

}  // namespace cuda
}  // namespace ral
