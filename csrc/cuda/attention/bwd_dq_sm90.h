// dq of `attention` for Hopper: equations (9), (11) and (14) of
// ral_kernels/ops/attention/README.md. attention/bwd_sm90.h says why accesses are in order.
#pragma once

#include "attention/bwd_sm90.h"

namespace ral {
namespace cuda {

// One CTA has 64 queries of a head for each consumer warpgroup, and walks over the keys that they
// see.
template <typename T, int kHeadDim>
struct attention_bwd_dq_sm90_kernel : AttentionBwdSm90<kHeadDim, kHeadDim == 64 ? 3 : 2> {
  using Params = AttentionBwdSm90Params;
  using Base = AttentionBwdSm90<kHeadDim, kHeadDim == 64 ? 3 : 2>;
  using Base::kConsumers, Base::kPanels, Base::kStages, Base::kTileBytes;
  using typename Base::Barriers;
  static constexpr int kGroupQ = kPanelRows, kBlockQ = kGroupQ * kConsumers;
  static constexpr int kMinBlocks = 1;
  static constexpr int kSharedBytes = Base::kStatisticsAt + kSwizzledBytes;
  static_assert(kBlockK == kPanelRows, "a block of keys is a tile");

  static const char* name() { return "attention_bwd_dq_sm90_kernel"; }

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const QueriesWithGradient block(params.backward, kBlockQ);
    if (block.num_queries <= 0) return;
    shared = Base::aligned(shared);
    Barriers& barriers = Base::set_up_barriers(shared);
    const KeyRange range(block.visibility, block.first_query, block.num_queries);
    const int32_t begin = range.low / kBlockK * kBlockK;
    const int group = warp_index() / 4;
    if (group == 0) {
      give_registers<Base::kProducerRegisters>();
      if (warp_index() == 0) produce(params, block, begin, range.high, shared, barriers);
    } else {
      take_registers<Base::kConsumerRegisters>();
      consume(params, block, begin, range.high, shared, barriers, group - 1);
    }
  }

 private:
  RAL_DEVICE static void produce(const Params& params, const QueriesWithGradient& block,
                                 int32_t begin, int32_t high, char* shared, Barriers& barriers) {
    const int32_t query_token = int32_t(block.first_token);
    Base::bring_own(shared, barriers, params.q, params.dout, query_token,
                    params.dout_token(query_token), block.h, block.b);
    Ring<kStages> ring;
    for (int32_t first = begin; first <= high; first += kBlockK, ring.advance()) {
      const int32_t token = block.sequence.k_start + first;
      Base::bring(shared, barriers, ring, 0, params.k, token, block.kv_head, block.b);
      Base::bring(shared, barriers, ring, 1, params.v, token, block.kv_head, block.b);
    }
  }

  RAL_DEVICE static void consume(const Params& params, const QueriesWithGradient& block,
                                 int32_t begin, int32_t high, char* shared, Barriers& barriers,
                                 int group) {
    const AttentionBwdParams& backward = params.backward;
    const ral_attention_params& call = backward.call;
    const int warp_row = warp_index() % 4 * 16;  // the warp's first row in its warpgroup
    const int32_t num_queries = block.num_queries - group * kGroupQ;  // none if negative
    const WarpQueries rows(backward, block, group * kGroupQ + warp_row);
    // Keys that the warpgroup's own queries see. Products with others would be wasted.
    const KeyRange range(block.visibility, block.first_query + group * kGroupQ,
                         minimum(num_queries, kGroupQ));
    const int32_t own_begin = range.low / kBlockK * kBlockK;
    // TMA does not zero padding, nor keys of other sequences.
    const bool is_ragged = block.padding != nullptr || call.cu_seqlens_q != nullptr;
    char* const q_tile = shared + Base::own_at(0) + group * kTileBytes;
    const uint32_t q = shared_address(q_tile);
    const uint32_t dout = shared_address(shared + Base::own_at(1) + group * kTileBytes);

    float dq[1][kHeadDim / 8][4];
    clear(dq);
    float p[1][kBlockK / 8][4], ds[1][kBlockK / 8][4];
    uint32_t left[4][4];
    const float scale = call.scale * kLog2e;
    Ring<kStages> ring;
    // Of the next block of its own, loaded while the last product of a round runs.
    const auto load_keys = [&](int32_t first) {
      return load_key_block(block.ids, block.padding, first, block.visibility.length_k);
    };
    KeyBlock keys = load_keys(own_begin);

    wait(&barriers.full_own, 0);
    for (int32_t first = begin; first <= high; first += kBlockK, ring.advance()) {
      if (first < own_begin || first > range.high) {
        Base::pass_over(barriers, ring);
        continue;
      }
      char* const k_tile = Base::tile(shared, ring, 0);
      const uint32_t k = shared_address(k_tile), v = shared_address(Base::tile(shared, ring, 1));
      Base::wait_for(barriers, ring, 0);
      if (is_ragged && ~keys.real != 0) {
        clear_rows<kPanels>(k_tile, ~keys.real);
        publish_to_async();
        sync_group(1 + group);
      }
      start_all_scores<T, kHeadDim>(p[0], q, k);
      Base::wait_for(barriers, ring, 1);
      start_all_scores<T, kHeadDim>(ds[0], dout, v);  // (9), without dm
      const WarpQueries::Dm dm = rows.load_dm(keys, block);
      wait_for_products<1>();
      pin(p[0]);
      rows.weigh(p, keys, first, range, scale, block.visibility);
      wait_for_products<0>();
      pin(ds[0]);
      Base::give_up(barriers, ring, 1);
      rows.differentiate(ds, p, keys, dm, block);
      round_left<T>(left, ds[0]);
      start_all_products<T>(dq[0], left, k);  // (14), without the scale
      keys = load_keys(first + kBlockK);
      wait_for_products<0>();
      pin(dq[0]);
      pin(left);
      Base::give_up(barriers, ring, 0);
    }
    sync_group(1 + group);
    const ral_tensor& tensor = backward.gradients.dq;
    store_rows<1>(
        rows_of<T>(tensor, block.b, block.h, block.first_token + group * kGroupQ), tensor.stride_t,
        warp_row, num_queries, dq, [&](int) { return call.scale; },
        Tile<T, kHeadDim>{reinterpret_cast<T*>(q_tile)});
  }
};

}  // namespace cuda
}  // namespace ral
