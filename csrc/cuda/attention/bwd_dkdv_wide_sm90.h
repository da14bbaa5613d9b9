// dk and dv of `attention` for Hopper, of 256 columns: equations (8), (9), (11) and (15) of
// ral_kernels/ops/attention/README.md. attention/bwd_sm90.h says why accesses are in order.
#pragma once

#include "attention/bwd_runs_sm90.h"

namespace ral {
namespace cuda {

// One CTA has 64 keys of a kv head, and walks over queries as attention_bwd_dkdv_sm90_kernel does.
// Sums of 64 keys and 256 columns fill the registers of a warpgroup. So the first consumer forms
// weights and dv, the second gradients of scores and dk. Each has two of the four products. In
// round n it starts the one of tile n with its own tile, and the one that adds tile n - 1 to its
// sum. So its tensor cores have work while it forms weights or gradients.
//
// A warp of the second consumer has the keys of one of the first, and its lanes hold the same
// elements. It takes the weights from shared memory, from where dm - delta of the tile were, in
// this order:
//  1. It reads dm - delta, and arrives at `wants`.
//  2. The warp of the first consumer waits for that, writes the weights and arrives at `given`.
//  3. The second waits for that, and reads them. Only then does it write dm - delta of the next
//     tile.
// Both wait for every phase, one for each tile.
//
// Neither waits for ever, by induction. When both have ended round n - 1, all buffers of pair n - 2
// are released, so the producer fills pair n. Before `wants` of round n the second consumer waits
// for nothing else, nor does the first before it waits for `wants`. Then each has what it needs.
template <typename T, int kHeadDim>
struct attention_bwd_dkdv_wide_sm90_kernel : AttentionBwdSm90<kHeadDim, 2, 1, 2, 2> {
  using Params = AttentionBwdSm90Params;
  using Base = AttentionBwdSm90<kHeadDim, 2, 1, 2, 2>;
  using Base::kPanels, Base::kTileBytes;
  using typename Base::Barriers, typename Base::Rings;
  static constexpr int kBlockKeys = kPanelRows, kBlockQ = TileStatistics::kQueries;
  static constexpr int kMinBlocks = 1;
  struct Handover {
    Barrier wants[4], given[4];  // of each pair of warps
  };
  static constexpr int kHandoverAt = Base::kStatisticsAt + 4 * int(sizeof(TileStatistics));
  static constexpr int kUsedBytes = kHandoverAt + int(sizeof(Handover));
  static constexpr int kSharedBytes = kUsedBytes + kSwizzledBytes;  // room to align to 1024 bytes
  static_assert(kBlockKeys == kBlockK, "a warp knows of 64 keys");

  static const char* name() { return "attention_bwd_dkdv_wide_sm90_kernel"; }

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const KeysOfBlock block = keys_of_block(params.backward, kBlockKeys);
    if (block.num_keys <= 0) return;
    shared = Base::aligned(shared);
    auto* const handover = reinterpret_cast<Handover*>(shared + kHandoverAt);
    if (thread_index() == 0)
      for (int warp = 0; warp < 4; ++warp) {
        begin_barrier(&handover->wants[warp], 1);
        begin_barrier(&handover->given[warp], 1);
      }
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
      if (group == 1)
        form_dv(params, block, part, begin, range.high, shared, barriers, *handover);
      else
        form_dk(params, block, part, begin, range.high, shared, barriers, *handover);
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

  RAL_DEVICE static TileStatistics* statistics_of_warp(char* shared) {
    return reinterpret_cast<TileStatistics*>(shared + Base::kStatisticsAt) + warp_index() % 4;
  }
  // The lane's four weights of column tile c, in place of dm - delta.
  RAL_DEVICE static Float4* weights_of_lane(TileStatistics* at, int c) {
    static_assert(sizeof at->less_delta >= kBlockQ / 8 * kWarpSize * sizeof(Float4),
                  "room for all");
    return reinterpret_cast<Float4*>(at->less_delta) + c * kWarpSize + lane_index();
  }
  // TMA does not zero queries of the next sequence. Each consumer does so before it reads them.
  RAL_DEVICE static void clear_past(char* tile, const Params& params, int32_t num_queries,
                                    int group) {
    if (params.backward.call.cu_seqlens_q == nullptr || num_queries >= kBlockQ) return;
    clear_rows<kPanels>(tile, ~uint64_t(0) << num_queries);
    publish_to_async();
    sync_group(1 + group);
  }

  // Where a consumer is in its walk over tiles of queries, head by head.
  struct Walk {
    int32_t begin, high, stop_head;
    int32_t h, first;  // the head, and the tile's first query

    RAL_DEVICE Walk(const QueriesOfPart& part, int32_t begin, int32_t high)
        : begin(begin),
          high(high),
          stop_head(begin <= high ? part.stop_head : part.first_head),
          h(part.first_head),
          first(begin) {}

    RAL_DEVICE bool goes_on() const { return h < stop_head; }
    RAL_DEVICE void advance() {
      first += kBlockQ;
      if (first > high) {
        first = begin;
        ++h;
      }
    }
  };

  RAL_DEVICE static void form_dv(const Params& params, const KeysOfBlock& block,
                                 const QueriesOfPart& part, int32_t begin, int32_t high,
                                 char* shared, Barriers& barriers, Handover& handover) {
    const AttentionBwdParams& backward = params.backward;
    const ral_attention_params& call = backward.call;
    const int warp = warp_index() % 4;
    const WarpKeys keys(block, block.first_key, 16 * warp);
    TileStatistics* const statistics = statistics_of_warp(shared);
    char* const k_tile = shared + Base::own_at(0);
    const uint32_t k = shared_address(k_tile);

    float dv[1][kHeadDim / 8][4];
    clear(dv);
    float p[1][kBlockQ / 8][4];
    uint32_t left[4][4];
    const float scale = call.scale * kLog2e;
    Rings rings, rings_before;  // of the tile, and of the one before it
    Ring<1> tiles;
    OfQueries lse_log2;
    Walk walk(part, begin, high);
    int32_t num_queries_before = 0;

    const auto num_queries = [&] { return block.sequence.length_q - walk.first; };
    const auto start_scores = [&] {
      const int64_t first_row =
          (block.b * call.num_heads + walk.h) * call.seqlen_q + block.sequence.q_start;
      lse_log2.load(backward.lse_log2, first_row + walk.first, num_queries());
      char* const q_tile = Base::tile(shared, rings, 0);
      Base::wait_for(barriers, rings, 0);
      clear_past(q_tile, params, num_queries(), 0);
      start_all_scores<T, kHeadDim>(p[0], opaque(k), shared_address(q_tile));
    };
    const auto start_dv = [&] {
      char* const dout_tile = Base::tile(shared, rings_before, 1);
      Base::wait_for(barriers, rings_before, 1);
      clear_past(dout_tile, params, num_queries_before, 0);
      start_all_products<T>(dv[0], left, shared_address(dout_tile));  // (8)
    };
    const auto end_dv = [&] {
      wait_for_products<0>();
      pin(dv[0]);
      pin(left);
      Base::give_up(barriers, rings_before, 1);
      rings_before.advance();
    };
    const auto weigh = [&] {
      pin(p[0]);
      Base::give_up(barriers, rings, 0);
      // The lanes have met since they read the statistics of the tile before.
      lse_log2.store(statistics->lse_log2);
      sync_warp();
      keys.weigh(p, statistics->lse_log2, scale, block.visibility, walk.first);
      wait(&handover.wants[warp], tiles.parity());
      RAL_UNROLL for (int c = 0; c < kBlockQ / 8; ++c) {
        const float (&of_tile)[4] = p[0][c];
        store_shared(weights_of_lane(statistics, c),
                     Float4{{of_tile[0], of_tile[1], of_tile[2], of_tile[3]}});
      }
      sync_warp();
      if (lane_index() == 0) arrive(&handover.given[warp]);
    };
    const auto advance = [&] {
      round_left<T>(left, p[0]);
      num_queries_before = num_queries();
      walk.advance();
      rings.advance();
      tiles.advance();
    };

    wait(&barriers.full_own, 0);
    if (walk.goes_on()) {
      start_scores();
      wait_for_products<0>();
      weigh();
      advance();
      while (walk.goes_on()) {
        start_scores();
        start_dv();
        wait_for_products<1>();
        weigh();
        end_dv();
        advance();
      }
      start_dv();
      end_dv();
    }
    sync_group(1);
    store_sum(params, block, backward.gradients.dv, call.head_dim_v, backward.splits.dv, 1.0f, dv,
              k_tile);
  }

  RAL_DEVICE static void form_dk(const Params& params, const KeysOfBlock& block,
                                 const QueriesOfPart& part, int32_t begin, int32_t high,
                                 char* shared, Barriers& barriers, Handover& handover) {
    const AttentionBwdParams& backward = params.backward;
    const ral_attention_params& call = backward.call;
    const int warp = warp_index() % 4;
    const WarpRuns keys(block, block.first_key, 16 * warp);
    TileStatistics* const statistics = statistics_of_warp(shared);
    char* const v_tile = shared + Base::own_at(1);
    const uint32_t v = shared_address(v_tile);

    float dk[1][kHeadDim / 8][4];
    clear(dk);
    float ds[1][kBlockQ / 8][4];
    uint32_t left[4][4];
    Rings rings, rings_before;
    Ring<1> tiles;
    Walk walk(part, begin, high);
    int32_t num_queries_before = 0;

    const auto num_queries = [&] { return block.sequence.length_q - walk.first; };
    const auto start_ds = [&] {
      const MarginalGradient dm(backward, block.sequence, block.b, walk.h);
      const int64_t first_row =
          (block.b * call.num_heads + walk.h) * call.seqlen_q + block.sequence.q_start;
      OfQueries delta;
      delta.load(backward.delta, first_row + walk.first, num_queries());
      const WarpRuns::OwnDm own_dm = keys.load_dm(dm, walk.first);
      sync_warp();  // all lanes have read the weights of the tile before
      keys.store_less_delta(statistics, delta, own_dm, dm, walk.first);
      sync_warp();
      keys.begin(ds, statistics);
      sync_warp();
      if (lane_index() == 0) arrive(&handover.wants[warp]);
      char* const dout_tile = Base::tile(shared, rings, 1);
      Base::wait_for(barriers, rings, 1);
      clear_past(dout_tile, params, num_queries(), 1);
      start_all_scores<T, kHeadDim, true>(ds[0], opaque(v), shared_address(dout_tile));  // (9)
    };
    const auto start_dk = [&] {
      char* const q_tile = Base::tile(shared, rings_before, 0);
      Base::wait_for(barriers, rings_before, 0);
      clear_past(q_tile, params, num_queries_before, 1);
      start_all_products<T>(dk[0], left, shared_address(q_tile));  // (15), without the scale
    };
    const auto give_up_dk = [&] {
      pin(dk[0]);
      pin(left);
      Base::give_up(barriers, rings_before, 0);
      rings_before.advance();
    };
    const auto differentiate = [&] {
      pin(ds[0]);
      Base::give_up(barriers, rings, 1);
      wait(&handover.given[warp], tiles.parity());
      RAL_UNROLL for (int c = 0; c < kBlockQ / 8; ++c) {
        const Float4 p = load_shared(weights_of_lane(statistics, c));
        RAL_UNROLL for (int e = 0; e < 4; ++e)
          ds[0][c][e] = gradient_of_score(p.x[e], ds[0][c][e]);
      }
    };
    const auto advance = [&] {
      round_left<T>(left, ds[0]);
      num_queries_before = num_queries();
      walk.advance();
      rings.advance();
      tiles.advance();
    };

    wait(&barriers.full_own, 0);
    if (walk.goes_on()) {
      start_ds();
      wait_for_products<0>();
      differentiate();
      advance();
      while (walk.goes_on()) {
        start_dk();  // first: it runs while dm arrives
        start_ds();
        wait_for_products<1>();
        give_up_dk();
        wait_for_products<0>();
        differentiate();
        advance();
      }
      start_dk();
      wait_for_products<0>();
      give_up_dk();
    }
    sync_group(2);
    store_sum(params, block, backward.gradients.dk, call.head_dim, backward.splits.dk, call.scale,
              dk, v_tile);
  }

  // Writes a consumer's sum: the gradient times `factor`, or the part's own sum. It passes through
  // `stage`, the consumer's own tile.
  RAL_DEVICE static void store_sum(const Params& params, const KeysOfBlock& block,
                                   const ral_tensor& gradient, int64_t num_columns, float* parts,
                                   float factor, const float (&sum)[1][kHeadDim / 8][4],
                                   char* stage) {
    const ral_attention_params& call = params.backward.call;
    const int warp_key = warp_index() % 4 * 16;
    if (params.backward.splits.num_parts == 1) {
      store_rows<1, true>(
          rows_of<T>(gradient, block.b, block.kv_head, block.first_token), gradient.stride_t,
          warp_key, block.num_keys, sum, [&](int) { return factor; },
          Tile<T, kHeadDim>{reinterpret_cast<T*>(stage)}, num_columns);
    } else {
      const int64_t matrix =
          (block.share * call.batch_size + block.b) * call.num_kv_heads + block.kv_head;
      store_float_rows<kHeadDim>(parts + (matrix * call.seqlen_k + block.first_token) * kHeadDim,
                                 warp_key, block.num_keys, sum);
    }
  }
};

}  // namespace cuda
}  // namespace ral
