// dq of `attention` for Hopper: equations (9), (11) and (14) of
// ral_kernels/ops/attention/README.md. attention/bwd_sm90.h says why accesses are in order.
#pragma once

#include "attention/bwd_sm90.h"

namespace ral {
namespace cuda {

// A warp's queries. dm of a block is loaded long before it is used.
struct WarpQueriesSm90 : WarpQueries {
  using WarpQueries::WarpQueries;

  // dm of a block of keys, as the lane's rows need it. With more spans than two, ds holds it.
  struct Dm {
    enum { kNothing, kOneSpan, kTwoSpans, kEachKey } of;
    int32_t border;  // with two spans: the second's first key
    float low[kRows], high[kRows];
  };
  // begin() may come later: nothing waits for what this loads. Until then ds has no other use.
  RAL_DEVICE Dm load_dm(float (&ds)[1][kBlockK / 8][4], const KeyBlock& keys,
                        const QueriesWithGradient& block) const {
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
          ds[0][c][2 * i + e] = MarginalGradient::at(rows_of_lane[i], span);
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
        for (int e = 0; e < 4; ++e) ds[0][c][e] -= delta[e / 2];
    } else if (dm.of == Dm::kTwoSpans) {
      RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 4; ++e) ds[0][c][e] = 8 * c + e % 2 < border ? low[e / 2] : high[e / 2];
    } else {
      RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 4; ++e) ds[0][c][e] = low[e / 2];
    }
  }
};

template <int kHeadDim>
using BaseOfDqSm90 = AttentionBwdSm90<kHeadDim, kHeadDim == 64 ? 3 : 2, kHeadDim == 64 ? 3 : 2,
                                      kHeadDim == 256 ? 2 : 3, kHeadDim == 256 ? 1 : 3>;

// One CTA has 64 queries of a head for each consumer warpgroup, and walks over the keys that they
// see. Of 256 columns there is room for two blocks of keys and one of values. The next values come
// while a consumer forms dq.
template <typename T, int kHeadDim>
struct attention_bwd_dq_sm90_kernel : BaseOfDqSm90<kHeadDim> {
  using Params = AttentionBwdSm90Params;
  using Base = BaseOfDqSm90<kHeadDim>;
  using Base::kConsumers, Base::kPanels, Base::kTileBytes;
  using typename Base::Barriers, typename Base::Rings;
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
    Rings rings;
    for (int32_t first = begin; first <= high; first += kBlockK, rings.advance()) {
      const int32_t token = block.sequence.k_start + first;
      Base::bring(shared, barriers, rings, 0, params.k, token, block.kv_head, block.b);
      Base::bring(shared, barriers, rings, 1, params.v, token, block.kv_head, block.b);
    }
  }

  RAL_DEVICE static void consume(const Params& params, const QueriesWithGradient& block,
                                 int32_t begin, int32_t high, char* shared, Barriers& barriers,
                                 int group) {
    const AttentionBwdParams& backward = params.backward;
    const ral_attention_params& call = backward.call;
    const int warp_row = warp_index() % 4 * 16;  // the warp's first row in its warpgroup
    const int32_t num_queries = block.num_queries - group * kGroupQ;  // none if negative
    const WarpQueriesSm90 rows(backward, block, group * kGroupQ + warp_row);
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
    Rings rings;
    // Of the next block of its own: keys are loaded a round before, dm while the last product of a
    // round runs.
    const auto load = [&](int32_t first) {
      return load_keys<true>(block.ids, block.padding, first, block.visibility.length_k);
    };
    KeyBlock keys = describe(load(own_begin));
    WarpQueriesSm90::Dm dm = rows.load_dm(ds, keys, block);
    LoadedKeys next = load(own_begin + kBlockK);

    wait(&barriers.full_own, 0);
    for (int32_t first = begin; first <= high; first += kBlockK, rings.advance()) {
      if (first < own_begin || first > range.high) {
        Base::pass_over(barriers, rings);
        continue;
      }
      // Before products start: ptxas would wait for them where branches meet that write `ds`.
      rows.begin(ds, dm);
      char* const k_tile = Base::tile(shared, rings, 0);
      const uint32_t k = shared_address(k_tile), v = shared_address(Base::tile(shared, rings, 1));
      Base::wait_for(barriers, rings, 0);
      if (is_ragged && ~keys.real != 0) {
        clear_rows<kPanels>(k_tile, ~keys.real);
        publish_to_async();
        sync_group(1 + group);
      }
      start_all_scores<T, kHeadDim>(p[0], q, k);
      Base::wait_for(barriers, rings, 1);
      start_all_scores<T, kHeadDim, true>(ds[0], dout, v);  // (9)
      wait_for_products<1>();
      pin(p[0]);
      rows.weigh(p, keys, first, range, scale, block.visibility);
      wait_for_products<0>();
      pin(ds[0]);
      Base::give_up(barriers, rings, 1);
      rows.differentiate(ds, p);
      round_left<T>(left, ds[0]);
      start_all_products<T>(dq[0], left, k);  // (14), without the scale
      keys = describe(next);
      dm = rows.load_dm(ds, keys, block);
      next = load(first + 2 * kBlockK);
      wait_for_products<0>();
      pin(dq[0]);
      pin(left);
      Base::give_up(barriers, rings, 0);
    }
    sync_group(1 + group);
    const ral_tensor& tensor = backward.gradients.dq;
    store_rows<1, true>(
        rows_of<T>(tensor, block.b, block.h, block.first_token + group * kGroupQ), tensor.stride_t,
        warp_row, num_queries, dq, [&](int) { return call.scale; },
        Tile<T, kHeadDim>{reinterpret_cast<T*>(q_tile)}, call.head_dim);
  }
};

}  // namespace cuda
}  // namespace ral
