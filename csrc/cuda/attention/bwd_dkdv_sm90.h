// dk and dv of `attention` for Hopper: equations (8), (9), (11) and (15) of
// ral_kernels/ops/attention/README.md. attention/bwd_sm90.h says why accesses are in order.
#pragma once

#include "attention/bwd_sm90.h"

namespace ral {
namespace cuda {

// A warp's keys and their runs. A run is a row of keys of one span.
struct WarpRuns : WarpKeys {
  int32_t run[kRows];   // of the lane's keys; runs count from the warp's first key
  int32_t num_runs;     // 1 without dm
  int32_t span_of_run;  // of run `lane % kKeys`; -1 = there is none
  int32_t last_span;    // of the warp's last key

  RAL_DEVICE WarpRuns(const KeysOfBlock& block, int32_t first_key, int warp_key)
      : WarpKeys(block, first_key, warp_key),
        num_runs(1),
        span_of_run(-1),
        last_span(keys.span_of(warp_key + kKeys - 1)) {
    for (int key = 0; key < kKeys; ++key) {
      const int32_t of_key = keys.span_of(warp_key + key);
      if (key > 0 && (keys.starts >> (warp_key + key) & 1) != 0) ++num_runs;
      if (lane_index() % kKeys == num_runs - 1) span_of_run = of_key;
      RAL_UNROLL for (int i = 0; i < kRows; ++i)
        if (row_in_warp(i) == key) run[i] = num_runs - 1;
    }
  }

  // Starts ds with what (9) and (11) add to its product, dm - delta of each run, in the warp's own
  // shared memory.
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
};

// One CTA has 64 keys of a kv head for each consumer warpgroup. It walks over the queries of its
// part that see them, head by head, so that the sum over a group has one fixed order. Scores are
// transposed, so their accumulators are the A operands of pᵀ dout and dsᵀ q.
template <typename T, int kHeadDim>
struct attention_bwd_dkdv_sm90_kernel : AttentionBwdSm90<kHeadDim, 2> {
  using Params = AttentionBwdSm90Params;
  using Base = AttentionBwdSm90<kHeadDim, 2>;
  using Base::kConsumers, Base::kPanels, Base::kStages, Base::kTileBytes;
  using typename Base::Barriers;
  static constexpr int kGroupK = kPanelRows, kBlockKeys = kGroupK * kConsumers;
  static constexpr int kBlockQ = kPanelRows, kLaneQueries = kBlockQ / kWarpSize;
  static constexpr int kMinBlocks = 1;
  // Per warp: lse_log2, delta, and dm of each run of its keys, dm - delta if there are one or two.
  // Rows of runs are 8 banks apart.
  static constexpr int kRunStride = kBlockQ + 8;
  static constexpr int kStatisticsBytes =
      (2 * kBlockQ + WarpKeys::kKeys * kRunStride) * int(sizeof(float));
  static constexpr int kUsedBytes = Base::kStatisticsAt + 4 * kConsumers * kStatisticsBytes;
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
    Ring<kStages> ring;
    for (int32_t h = part.first_head; h < part.stop_head; ++h) {
      for (int32_t first = begin; first <= high; first += kBlockQ, ring.advance()) {
        const int32_t token = block.sequence.q_start + first;
        Base::bring(shared, barriers, ring, 0, params.q, token, h, block.b);
        Base::bring(shared, barriers, ring, 1, params.dout, params.dout_token(token), h, block.b);
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
    float* const lse_log2 = reinterpret_cast<float*>(
        shared + Base::kStatisticsAt + (group * 4 + warp_index() % 4) * kStatisticsBytes);
    float* const delta = lse_log2 + kBlockQ;
    float* const less_delta = delta + kBlockQ;
    const bool has_many = keys.dm_of != DmOf::kNothing && keys.num_runs > 2;
    char* const k_tile = shared + Base::own_at(0) + group * kTileBytes;
    char* const v_tile = shared + Base::own_at(1) + group * kTileBytes;
    const uint32_t k = shared_address(k_tile), v = shared_address(v_tile);

    float dk[1][kHeadDim / 8][4], dv[1][kHeadDim / 8][4];
    clear(dk);
    clear(dv);
    float p[1][kBlockQ / 8][4], ds[1][kBlockQ / 8][4];
    uint32_t left_p[4][4], left_ds[4][4];
    const float scale = call.scale * kLog2e;
    Ring<kStages> ring;

    wait(&barriers.full_own, 0);
    for (int32_t h = part.first_head; h < part.stop_head; ++h) {
      const MarginalGradient dm(backward, block.sequence, block.b, h);
      const int64_t statistics =
          (block.b * call.num_heads + h) * call.seqlen_q + block.sequence.q_start;
      for (int32_t first = begin; first <= high; first += kBlockQ, ring.advance()) {
        if (first < own_begin || first > range.high) {
          Base::pass_over(barriers, ring);
          continue;
        }
        char* const q_tile = Base::tile(shared, ring, 0);
        char* const dout_tile = Base::tile(shared, ring, 1);
        const uint32_t q = shared_address(q_tile), dout = shared_address(dout_tile);
        const int32_t num_queries = block.sequence.length_q - first;
        // Loaded before products start, and read after that.
        float own_lse[kLaneQueries], own_delta[kLaneQueries], own_dm[kLaneQueries][2];
        RAL_UNROLL for (int i = 0; i < kLaneQueries; ++i) {
          const int32_t row = i * kWarpSize + lane_index();
          const bool there = row < num_queries;
          const int64_t at = statistics + first + row;
          own_lse[i] = there ? load_global(backward.lse_log2 + at) : 0.0f;
          own_delta[i] = there ? load_global(backward.delta + at) : 0.0f;
          own_dm[i][0] = own_dm[i][1] = 0.0f;
        }
        if (keys.dm_of != DmOf::kNothing && !has_many) {
          RAL_UNROLL for (int i = 0; i < kLaneQueries; ++i) {
            const int32_t query = first + i * kWarpSize + lane_index();
            own_dm[i][0] = dm.at(query, keys.first_span);
            if (keys.num_runs == 2) own_dm[i][1] = dm.at(query, keys.last_span);
          }
        }
        Base::wait_for(barriers, ring, 0);
        // TMA does not zero queries of the next sequence.
        if (call.cu_seqlens_q != nullptr && num_queries < kBlockQ) {
          Base::wait_for(barriers, ring, 1);
          clear_rows<kPanels>(q_tile, ~uint64_t(0) << num_queries);
          clear_rows<kPanels>(dout_tile, ~uint64_t(0) << num_queries);
          publish_to_async();
          sync_group(1 + group);
        }
        start_all_scores<T, kHeadDim>(p[0], k, q);

        sync_warp();  // all lanes have read the previous statistics
        RAL_UNROLL for (int i = 0; i < kLaneQueries; ++i) {
          const int at = i * kWarpSize + lane_index();
          store_shared(lse_log2 + at, own_lse[i]);
          if (has_many)
            store_shared(delta + at, own_delta[i]);
          else
            store_shared(less_delta + at, own_dm[i][0] - own_delta[i]);
          if (!has_many && keys.num_runs == 2)
            store_shared(less_delta + kRunStride + at, own_dm[i][1] - own_delta[i]);
        }
        if (has_many) {
          sync_warp();
          // A lane has run lane % 16: dm of ascending spans are neighbours in memory.
          constexpr int kAtOnce = 16;
          for (int begin = 0; begin < kBlockQ; begin += 2 * kAtOnce) {
            const int at = begin + lane_index() / 16;
            float of_run[kAtOnce];
            RAL_UNROLL for (int i = 0; i < kAtOnce; ++i)
              of_run[i] = dm.at(first + at + 2 * i, keys.span_of_run);
            RAL_UNROLL for (int i = 0; i < kAtOnce; ++i)
              store_shared(less_delta + lane_index() % 16 * kRunStride + at + 2 * i,
                           of_run[i] - load_shared(delta + at + 2 * i));
          }
        }
        sync_warp();
        keys.begin(ds, less_delta, kRunStride);
        Base::wait_for(barriers, ring, 1);
        start_all_scores<T, kHeadDim, true>(ds[0], v, dout);  // (9)

        wait_for_products<1>();
        pin(p[0]);
        keys.weigh(p, lse_log2, scale, block.visibility, first);
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
        Base::give_up(barriers, ring, 1);
        wait_for_products<0>();
        pin(dk[0]);
        pin(left_ds);
        Base::give_up(barriers, ring, 0);
      }
    }
    sync_group(1 + group);
    const int64_t token = block.first_token + group * kGroupK;
    store_keys<kHeadDim>(backward, block, token, warp_key, num_keys, 0, dk, dv,
                         Tile<T, kHeadDim>{reinterpret_cast<T*>(k_tile)},
                         Tile<T, kHeadDim>{reinterpret_cast<T*>(v_tile)});
  }
};

}  // namespace cuda
}  // namespace ral
