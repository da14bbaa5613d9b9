// What the backward kernels of `attention` for Hopper share: their parameters, their roles.
#pragma once

#include "attention/bwd_scores.h"
#include "hopper/tiles.h"

namespace ral {
namespace cuda {

struct AttentionBwdSm90Params {
  // Boxes of 64 tokens. Without dout, `dout` is any map of queries, read beyond its tensor alone,
  // where the copy engine gives zeros.
  TensorMap q, k, v, dout;
  AttentionBwdParams backward;

  // Where a tile of dout begins that is wanted from `token` on.
  RAL_DEVICE int32_t dout_token(int32_t token) const {
    return backward.gradients.dout.data != nullptr ? token : int32_t(backward.call.seqlen_q);
  }
};

// As attention_bwd_dq and attention_bwd_dkdv of attention/bwd.h.
int attention_bwd_dq_sm90(const AttentionBwdSm90Params& params, void* stream);
int attention_bwd_dkdv_sm90(const AttentionBwdSm90Params& params, void* stream);

// A block of threads: kConsumers warpgroups with a tile of keys (dk, dv) or queries (dq) each, of
// which they have two tensors in shared memory, and one warpgroup before them, the producer, that
// has the copy engine bring tiles of two tensors of the other side through a ring of kStages pairs
// of buffers. The producer has few registers, the consumers many.
//
// Why nothing is read too early or overwritten too early, in both kernels:
//  1. Full: the producer arrives at `full` with the bytes to come, and the copy engine completes
//     them, so a phase ends when all are there. Every consumer waits for every phase of every
//     buffer, in order, also where it has nothing to do for it: none is skipped, so that a parity
//     never stands for a phase two turns off. It waits for `full_own` before all else: no copy is
//     running when the block ends.
//  2. Empty: a lane of each consumer warp arrives when the warp's part of all products that read
//     the buffer is done (wait_for_products returns once it is), 4 kConsumers arrivals in all. The
//     producer waits for them before it has the buffer filled again; reads by tensor cores and
//     writes by the copy engine are of one proxy, ordered by that barrier.
//  3. Deadlock: a consumer waits for both buffers of a pair and gives both up before it waits for
//     the next pair; the producer fills pairs in that order, and waits for none but the one
//     kStages before.
//  4. Registers: begin_products (wgmma.fence) stands between the last access to accumulators or
//     left factors and the products that start. While products run, nothing touches their
//     registers. Groups end in the order in which they began: with wait_for_products<1> all but
//     the newest are done. pin() keeps the compiler to it. No product runs from one pair to the
//     next.
//  5. Rows that are padding, or of another sequence, would reach a sum as 0 · NaN where they are
//     contracted over. Each consumer that uses the tile overwrites them with zeros by ordinary
//     stores, publishes these to the async proxy and meets its other warps before its products
//     read them. Several consumers may do so: they write the same zeros, and all before they give
//     the buffer up. The copy that fills it next comes behind the same fence and the arrival at
//     `empty`. Where such rows are rows of scores, or their columns outside of a sum, the weights
//     are set to 0, and so is what is made from them, whatever came.
//  6. Results pass through the consumer's own tiles in shared memory: its four warps meet after
//     their last products, each having waited for its own, before the first store.
//  7. What lanes exchange by ordinary accesses (statistics of queries) is a warp's own: sync_warp
//     stands on both sides of the stores.
template <int kHeadDim, int kConsumerWarpgroups>
struct AttentionBwdSm90 {
  static constexpr int kConsumers = kConsumerWarpgroups;
  static constexpr int kThreads = kGroupThreads * (kConsumers + 1);
  // An SM has 64 Ki registers: what the producer leaves goes to the consumers.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  static_assert(kGroupThreads * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536,
                "the registers of an SM");

  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kStages = 3;

  // The first of each pair is what scores are of (k or q), the second of dout and v.
  struct Barriers {
    Barrier full_own, full[2][kStages], empty[2][kStages];
  };
  // In this order; the tiles begin at multiples of 1024 bytes.
  RAL_ARITHMETIC static int own_at(int which) { return which * kConsumers * kTileBytes; }
  RAL_ARITHMETIC static int ring_at(int which) {
    return (2 * kConsumers + which * kStages) * kTileBytes;
  }
  static constexpr int kBarriersAt = (2 * kConsumers + 2 * kStages) * kTileBytes;
  static constexpr int kStatisticsAt = kBarriersAt + int(sizeof(Barriers) + 15) / 16 * 16;

  // The block's shared memory from a multiple of 1024 bytes on.
  RAL_DEVICE static char* aligned(char* shared) {
    return shared + (-shared_address(shared) & (kSwizzledBytes - 1));
  }

  RAL_DEVICE static Barriers& begin(char* shared) {
    auto* barriers = reinterpret_cast<Barriers*>(shared + kBarriersAt);
    if (thread_index() == 0) {
      begin_barrier(&barriers->full_own, 1);
      for (int which = 0; which < 2; ++which)
        for (int stage = 0; stage < kStages; ++stage) {
          begin_barrier(&barriers->full[which][stage], 1);
          begin_barrier(&barriers->empty[which][stage], 4 * kConsumers);
        }
      publish_barriers();
    }
    sync_block();
    return *barriers;
  }

  // ---- Producer: a warp, in step; one lane of it speaks to the copy engine ----------------------

  // The consumers' own tiles, of tokens from `first` and `second` on.
  RAL_DEVICE static void bring_own(char* shared, Barriers& barriers, const TensorMap& first,
                                   const TensorMap& second, int32_t first_token,
                                   int32_t second_token, int64_t head, int64_t batch) {
    if (lane_index() != 0) return;
    arrive_expecting(&barriers.full_own, 2 * kConsumers * kTileBytes);
    for (int group = 0; group < kConsumers; ++group) {
      copy_tile<kPanels>(shared + own_at(0) + group * kTileBytes, first,
                         first_token + group * kPanelRows, int32_t(head), int32_t(batch),
                         &barriers.full_own);
      copy_tile<kPanels>(shared + own_at(1) + group * kTileBytes, second,
                         second_token + group * kPanelRows, int32_t(head), int32_t(batch),
                         &barriers.full_own);
    }
  }

  // The next of one side of the ring.
  RAL_DEVICE static void bring(char* shared, Barriers& barriers, const Ring<kStages>& ring,
                               int which, const TensorMap& map, int32_t token, int64_t head,
                               int64_t batch) {
    wait(&barriers.empty[which][ring.stage], ring.parity_before());
    if (lane_index() != 0) return;
    Barrier* full = &barriers.full[which][ring.stage];
    arrive_expecting(full, kTileBytes);
    copy_tile<kPanels>(shared + ring_at(which) + ring.stage * kTileBytes, map, token, int32_t(head),
                       int32_t(batch), full);
  }

  // ---- Consumers --------------------------------------------------------------------------------

  RAL_DEVICE static void wait_for(Barriers& barriers, const Ring<kStages>& ring, int which) {
    wait(&barriers.full[which][ring.stage], ring.parity());
  }
  RAL_DEVICE static void give_up(Barriers& barriers, const Ring<kStages>& ring, int which) {
    if (lane_index() == 0) arrive(&barriers.empty[which][ring.stage]);
  }
  RAL_DEVICE static void pass_over(Barriers& barriers, const Ring<kStages>& ring) {
    for (int which = 0; which < 2; ++which) wait_for(barriers, ring, which);
    for (int which = 0; which < 2; ++which) give_up(barriers, ring, which);
  }
  RAL_DEVICE static char* tile(char* shared, const Ring<kStages>& ring, int which) {
    return shared + ring_at(which) + ring.stage * kTileBytes;
  }
};

}  // namespace cuda
}  // namespace ral
