// What the backward kernels of `attention` for Hopper share: parameters, roles of warpgroups and
// the ring of stages. The list below argues that accesses to shared memory are in order.
#pragma once

#include "attention/bwd_scores.h"
#include "hopper/tiles.h"

namespace ral {
namespace cuda {

struct AttentionBwdSm90Params {
  // Boxes of 64 tokens. Without dout, `dout` is a map of the queries. It is then read only past the
  // end of its tensor, where TMA gives zeros.
  TensorMap q, k, v, dout;
  AttentionBwdParams backward;

  // The token from which TMA reads the dout tile of `token`.
  RAL_DEVICE int32_t dout_token(int32_t token) const {
    return backward.gradients.dout.data != nullptr ? token : int32_t(backward.call.seqlen_q);
  }
};

// Hopper versions of attention_bwd_dq and attention_bwd_dkdv of attention/bwd.h.
int attention_bwd_dq_sm90(const AttentionBwdSm90Params& params, void* stream);
int attention_bwd_dkdv_sm90(const AttentionBwdSm90Params& params, void* stream);

// A CTA has kConsumers consumer warpgroups, and kOwnTiles tiles of keys (dk, dv) or of queries
// (dq). It keeps these of two tensors in shared memory. Each consumer has a tile of its own, but
// for attention/bwd_dkdv_wide_sm90.h, where both share one. One producer warpgroup issues TMA
// copies of two tensors of the other side, through a ring of buffers for each. A pair is what both
// rings hold of the same rows. The producer keeps few registers and the consumers take many.
//
// Why no buffer is read or overwritten too early, in all kernels:
//  1. Full. The producer arrives at `full` with the expected bytes, and TMA completes them. So a
//     phase ends when all bytes have arrived. Every consumer waits for every phase of every buffer,
//     in order, even where it has nothing to do. It skips none, so a parity never stands for a
//     phase two turns away. It waits for `full_own` first: no copy is running when the CTA ends.
//  2. Empty. One lane of each consumer warp arrives when the warp's part of all products that read
//     the buffer is done: 4 kConsumers arrivals in all. wait_for_products returns once it is done.
//     The producer waits for these arrivals before it refills the buffer. Reads by wgmma and writes
//     by TMA belong to one proxy, and that mbarrier orders them.
//  3. Deadlock. A consumer waits for both buffers of a pair, and releases both before it waits for
//     the next pair. The producer fills pairs in that order. Before it fills a buffer it waits only
//     for the release of an earlier pair's. attention/bwd_dkdv_wide_sm90.h has its own argument.
//  4. Registers. begin_products (wgmma.fence) stands between the last access to accumulators or A
//     operands and the products that start. While products run, no thread touches their registers.
//     Groups end in the order in which they began: after wait_for_products<1> all but the newest
//     are done. pin() holds the compiler to this order.
//  5. Padding. Rows that are padding, or of another sequence, would enter a sum as 0 · NaN where a
//     product contracts over them. Each consumer that uses the tile zeroes them with ordinary
//     stores, publishes these to the async proxy and synchronises its warps. Its products read them
//     only then. Several consumers may do so: they write the same zeros, and all before they
//     release the buffer. The copy that refills it comes after the same fence and the arrival at
//     `empty`. Where such rows are rows or columns of scores, no product contracts over them. Their
//     weights are set to 0, and so is all that is made from these, whatever the scores were.
//  6. Results. They pass through the consumer's own tiles in shared memory. Its four warps
//     synchronise before the first store, each after waiting for its own last products.
//  7. Statistics. Lanes exchange statistics of queries, and dm of spans, by ordinary accesses
//     within a warp: a sync_warp stands on both sides of the stores.
template <int kHeadDim, int kConsumerWarpgroups, int kOwnTiles = kConsumerWarpgroups,
          int kFirstStages = 3, int kSecondStages = 3>
struct AttentionBwdSm90 {
  static constexpr int kConsumers = kConsumerWarpgroups;
  static constexpr int kThreads = kGroupThreads * (kConsumers + 1);
  // The producer's unused registers go to the consumers; an SM has 64 Ki.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  static_assert(kGroupThreads * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536,
                "the registers of an SM");

  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  using Rings = TwoRings<kFirstStages, kSecondStages>;

  // Index 0 is the operand of scores (q or k), index 1 that of gradients of weights (dout or v).
  struct Barriers {
    static constexpr int kMost = kFirstStages > kSecondStages ? kFirstStages : kSecondStages;
    Barrier full_own, full[2][kMost], empty[2][kMost];
  };
  // Offsets in shared memory, in this order. The tiles begin at multiples of 1024 bytes.
  RAL_ARITHMETIC static int own_at(int which) { return which * kOwnTiles * kTileBytes; }
  RAL_ARITHMETIC static int ring_at(int which) {
    return (2 * kOwnTiles + which * kFirstStages) * kTileBytes;
  }
  static constexpr int kBarriersAt = (2 * kOwnTiles + kFirstStages + kSecondStages) * kTileBytes;
  static constexpr int kStatisticsAt = kBarriersAt + int(sizeof(Barriers) + 15) / 16 * 16;

  // The CTA's shared memory from a multiple of 1024 bytes on.
  RAL_DEVICE static char* aligned(char* shared) {
    return shared + (-shared_address(shared) & (kSwizzledBytes - 1));
  }

  RAL_DEVICE static Barriers& set_up_barriers(char* shared) {
    auto* barriers = reinterpret_cast<Barriers*>(shared + kBarriersAt);
    if (thread_index() == 0) {
      begin_barrier(&barriers->full_own, 1);
      for (int which = 0; which < 2; ++which)
        for (int stage = 0; stage < Barriers::kMost; ++stage) {
          begin_barrier(&barriers->full[which][stage], 1);
          begin_barrier(&barriers->empty[which][stage], 4 * kConsumers);
        }
      publish_barriers();
    }
    sync_block();
    return *barriers;
  }

  // ---- Producer: one converged warp, whose lane 0 issues the copies -----------------------------

  // Copies the own tiles, from tokens `first_token` and `second_token` on.
  RAL_DEVICE static void bring_own(char* shared, Barriers& barriers, const TensorMap& first,
                                   const TensorMap& second, int32_t first_token,
                                   int32_t second_token, int64_t head, int64_t batch) {
    if (lane_index() != 0) return;
    arrive_expecting(&barriers.full_own, 2 * kOwnTiles * kTileBytes);
    for (int tile = 0; tile < kOwnTiles; ++tile) {
      copy_tile<kPanels>(shared + own_at(0) + tile * kTileBytes, first,
                         first_token + tile * kPanelRows, int32_t(head), int32_t(batch),
                         &barriers.full_own);
      copy_tile<kPanels>(shared + own_at(1) + tile * kTileBytes, second,
                         second_token + tile * kPanelRows, int32_t(head), int32_t(batch),
                         &barriers.full_own);
    }
  }

  // Waits for the release of one buffer of a pair, then refills it.
  RAL_DEVICE static void bring(char* shared, Barriers& barriers, const Rings& rings, int which,
                               const TensorMap& map, int32_t token, int64_t head, int64_t batch) {
    wait(&barriers.empty[which][rings.stage(which)], rings.parity_before(which));
    if (lane_index() != 0) return;
    Barrier* full = &barriers.full[which][rings.stage(which)];
    arrive_expecting(full, kTileBytes);
    copy_tile<kPanels>(tile(shared, rings, which), map, token, int32_t(head), int32_t(batch), full);
  }

  // ---- Consumers --------------------------------------------------------------------------------

  RAL_DEVICE static void wait_for(Barriers& barriers, const Rings& rings, int which) {
    wait(&barriers.full[which][rings.stage(which)], rings.parity(which));
  }
  RAL_DEVICE static void give_up(Barriers& barriers, const Rings& rings, int which) {
    if (lane_index() == 0) arrive(&barriers.empty[which][rings.stage(which)]);
  }
  RAL_DEVICE static void pass_over(Barriers& barriers, const Rings& rings) {
    for (int which = 0; which < 2; ++which) wait_for(barriers, rings, which);
    for (int which = 0; which < 2; ++which) give_up(barriers, rings, which);
  }
  RAL_DEVICE static char* tile(char* shared, const Rings& rings, int which) {
    return shared + ring_at(which) + rings.stage(which) * kTileBytes;
  }
};

}  // namespace cuda
}  // namespace ral
