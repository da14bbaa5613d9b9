// policy_statistics_kernel for Hopper: the same sums over the same blocks in the same order.
#pragma once

#include "hopper/tiles.h"
#include "policy/statistics.h"

namespace ral {
namespace cuda {

struct PolicyStatisticsSm90Params {
  TensorMap q, k;
  PolicyStatisticsParams statistics;
};

// One CTA has kBlockQ rows of a head and walks over all keys that they see. Each of kConsumers
// consumer warpgroups owns 64 rows. One producer warpgroup issues TMA copies, first of the queries,
// then of blocks of 64 keys through a ring of kStages buffers. A consumer has two sets of
// accumulators: the scores of a block run while it sums those of the block before. ptxas serialises
// products that still run where a loop turns, or that stand behind a branch. So every product ends
// in its turn, and the walk takes an even number of blocks and one more. Rows see no key of what
// lies beyond the last block, whatever TMA finds there.
//
// Nothing is read or overwritten too early, as in attention/fwd_sm90.h:
//  1. Every consumer waits for every phase of `full`, in order.
//  2. One lane of each consumer warp arrives at `empty` when the warp's part of the product that
//     reads the buffer is done. The producer waits for these arrivals before it refills it.
//  3. Deadlock. A consumer that waits for a block holds no buffer.
//  4. Registers. One product runs at a time, and the sums read the accumulators of the other.
template <typename T, int kHeadDim>
struct policy_statistics_sm90_kernel {
  using Params = PolicyStatisticsSm90Params;
  static constexpr int kConsumers = 2, kRows = 2;
  static constexpr int kGroupQ = kPanelRows;
  static constexpr int kBlockQ = kGroupQ * kConsumers;
  static constexpr int kThreads = kGroupThreads * (kConsumers + 1);
  static constexpr int kMinBlocks = 1;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kTileBytes = kPanels * kPanelBytes;  // 64 rows of q or k
  static constexpr int kStages = 4;
  static_assert(kBlockK == kPanelRows, "a block of keys is a tile");

  struct Barriers {
    Barrier full_q, full[kStages], empty[kStages];
  };
  // Offsets in shared memory, after the queries at 0.
  static constexpr int kKeysAt = kConsumers * kTileBytes;
  static constexpr int kBarriersAt = kKeysAt + kStages * kTileBytes;
  static constexpr int kUsedBytes = kBarriersAt + int(sizeof(Barriers));
  static constexpr int kSharedBytes = kUsedBytes + kSwizzledBytes;  // room to align to 1024 bytes
  using Scores = float[1][kBlockK / 8][4];
  static const char* name() { return "policy_statistics_sm90_kernel"; }

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const RowsOfStatistics at(params.statistics, kBlockQ);
    if (at.num_rows <= 0) return;
    shared += -shared_address(shared) & (kSwizzledBytes - 1);
    auto* barriers = reinterpret_cast<Barriers*>(shared + kBarriersAt);
    if (thread_index() == 0) {
      begin_barrier(&barriers->full_q, 1);
      for (int stage = 0; stage < kStages; ++stage) {
        begin_barrier(&barriers->full[stage], 1);
        begin_barrier(&barriers->empty[stage], 4 * kConsumers);
      }
      publish_barriers();
    }
    sync_block();
    const KeysOfRows seen(visibility_of(at.sample, params.statistics.side), at.first_row,
                          at.num_rows);
    const int32_t begin = seen.low / kBlockK * kBlockK;
    const int32_t num_pairs = seen.low <= seen.high ? (seen.high - begin) / (2 * kBlockK) + 1 : 0;
    const int group = warp_index() / 4;
    if (group == 0) {
      give_registers<kProducerRegisters>();
      if (warp_index() == 0) produce(params, at, begin, 2 * num_pairs + 1, shared, *barriers);
    } else {
      take_registers<kConsumerRegisters>();
      consume(params.statistics, at, begin, num_pairs, shared, *barriers, group - 1);
    }
  }

 private:
  // One converged warp runs it; its lane 0 issues the copies.
  RAL_DEVICE static void produce(const Params& params, const RowsOfStatistics& at, int32_t begin,
                                 int32_t num_blocks, char* shared, Barriers& barriers) {
    const bool leads = lane_index() == 0;
    if (leads) {
      arrive_expecting(&barriers.full_q, kConsumers * kTileBytes);
      for (int group = 0; group < kConsumers; ++group)
        copy_tile<kPanels>(shared + group * kTileBytes, params.q, at.first_row + group * kGroupQ,
                           int32_t(at.h), int32_t(at.b), &barriers.full_q);
    }
    Ring<kStages> ring;
    for (int32_t n = 0; n < num_blocks; ++n, ring.advance()) {
      wait(&barriers.empty[ring.stage], ring.parity_before());
      if (!leads) continue;
      arrive_expecting(&barriers.full[ring.stage], kTileBytes);
      copy_tile<kPanels>(shared + kKeysAt + ring.stage * kTileBytes, params.k,
                         at.sample.first_key + begin + n * kBlockK, int32_t(at.kv_head),
                         int32_t(at.b), &barriers.full[ring.stage]);
    }
  }

  RAL_DEVICE static void consume(const PolicyStatisticsParams& params, const RowsOfStatistics& at,
                                 int32_t begin, int32_t num_pairs, char* shared, Barriers& barriers,
                                 int group) {
    const ral_policy_common& common = params.common;
    const Visibility visibility = visibility_of(at.sample, params.side);
    const int warp_row = group * kGroupQ + warp_index() % 4 * 16;
    const int32_t row = at.first_row + warp_row;
    // Keys that all rows of the warp see by position, and those that are some row's own.
    const int32_t full_low = visibility.first_key(row + 15), full_high = visibility.last_key(row);
    const int32_t own_low = common.exclude_self ? row + visibility.offset : INT32_MAX;
    const int32_t own_high = common.exclude_self ? own_low + 15 : INT32_MIN;
    const float scale = params.side.scale * kLog2e;
    const uint32_t q = shared_address(shared + group * kTileBytes);
    const uint32_t k = shared_address(shared + kKeysAt);
    RowStatistics rows[kRows];
    Scores even, odd;
    Ring<kStages> ring;

    const auto start = [&](Scores& s) {
      wait(&barriers.full[ring.stage], ring.parity());
      start_all_scores<T, kHeadDim>(s[0], q, k + ring.stage * kTileBytes);
    };
    const auto finish = [&](Scores& s) {
      wait_for_products<0>();
      pin(s[0]);
      if (lane_index() == 0) arrive(&barriers.empty[ring.stage]);
      ring.advance();
    };
    const auto take = [&](const Scores& s, int32_t first) {
      const KeyBits bits(common, at.sample, first);
      const bool full = bits.in_scope == ~uint64_t(0) && first >= full_low &&
                        first + kBlockK - 1 <= full_high &&
                        (first > own_high || first + kBlockK - 1 < own_low);
      RAL_UNROLL for (int i = 0; i < kRows; ++i) {
        if (full) {
          rows[i].template add<true>(s, i, scale, Mask{});
        } else {
          const Mask mask = Mask::of_row(common, visibility, bits, row + row_in_warp(i), first);
          rows[i].template add<false>(s, i, scale, mask);
        }
      }
    };

    wait(&barriers.full_q, 0);
    start(even);
    finish(even);
    for (int32_t pair = 0; pair < num_pairs; ++pair) {
      const int32_t first = begin + 2 * pair * kBlockK;
      start(odd);
      take(even, first);
      finish(odd);
      start(even);
      take(odd, first + kBlockK);
      finish(even);
    }
    store_statistics(params, at, warp_row, rows);
  }
};

}  // namespace cuda
}  // namespace ral
