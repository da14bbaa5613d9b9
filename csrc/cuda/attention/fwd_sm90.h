// Forward of `attention` for Hopper: equations (1) to (7) of ral_kernels/ops/attention/README.md.
#pragma once

#include "attention/fwd_rows.h"
#include "attention/marginals_sm90.h"
#include "hopper/tiles.h"

namespace ral {
namespace cuda {

struct AttentionFwdSm90Params {
  TensorMap q, k, v;
  AttentionFwdParams forward;
};

// One CTA has kBlockQ queries of a head and walks over all keys that they see. Each of kConsumers
// consumer warpgroups owns 64 queries. One warp of the producer warpgroup issues TMA copies, first
// of the queries. Blocks of 64 keys of K and of V follow, each through a ring of kStages buffers.
// Another of its warps notes what consumers need to know of a block's keys. The producer keeps few
// registers and the consumers take many. A consumer starts the scores of a block, then the product
// of the previous block's weights with their V. It forms weights while that product runs.
//
// Why no buffer is read or overwritten too early:
//  1. Full. The producer arrives at `full` with the expected bytes, and TMA completes them. So a
//     phase ends when all bytes have arrived, that of K once its note is written too. Every
//     consumer waits for every phase of every buffer, in order. It skips none, so a parity never
//     stands for a phase two turns away.
//  2. Empty. One lane of each consumer warp arrives when the warp's part of the products that read
//     the buffer is done: 4 kConsumers arrivals in all. wait_for_products returns once it is done.
//     The producer waits for these arrivals before it refills the buffer. Reads by wgmma and writes
//     by TMA belong to one proxy, and that mbarrier orders them.
//  3. Deadlock. A consumer waits for K0 K1 V0 K2 V1 .. in this order. It releases K(n) once it has
//     V(n - 1), and V(n) once it has K(n + 1). The producer fills K0 V0 K1 V1 .. . Before K(n) or
//     V(n) it waits for the release of the one kStages >= 2 before. All that this release takes has
//     been filled by then.
//  4. Registers. begin_products (wgmma.fence) stands between the last access to accumulators or A
//     operands and the products that start. Products of one group on the same accumulators run in
//     order. While products run, no thread touches their registers. `s` rests until
//     wait_for_products<1>, which leaves only the newest group running, that of `out` and `p`.
//     Those two rest until wait_for_products<0>. pin() holds the compiler to this order.
//  5. Padding. Rows of V that are padding, or of another sequence, would enter the product as 0 ·
//     NaN. Each consumer zeroes them with ordinary stores, publishes these to the async proxy and
//     synchronises its warps. Its product reads them only then. Two consumers may both do so: they
//     write the same zeros, and both before they release the buffer. The copy that refills it comes
//     after the same fence and the arrival at `empty`.
//  6. Notes. A consumer reads the note of block n once it has K(n), and last before it starts the
//     product with V(n). So a note may be overwritten once V(n) has been given up. The warp that
//     writes it waits for that.
//  7. Output. It passes through the consumer's own queries in shared memory, in another layout. Its
//     four warps synchronise before the first store, each after its last products, and after it has
//     read its queries into registers.
template <typename T, int kHeadDim>
struct attention_fwd_sm90_kernel {
  using Params = AttentionFwdSm90Params;
  static constexpr int kConsumers = kHeadDim == 64 ? 3 : 2;
  static constexpr int kGroupQ = kPanelRows;
  static constexpr int kBlockQ = kGroupQ * kConsumers;
  static constexpr int kThreads = kGroupThreads * (kConsumers + 1);
  static constexpr int kMinBlocks = 1;
  // The producer's unused registers go to the consumers; an SM has 64 Ki.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  static_assert(kGroupThreads * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536,
                "the registers of an SM");

  // Of other head dims they would not fit. Of 64, 2^x bounds the kernel, not shared memory.
  static constexpr bool kQueriesInRegisters = kHeadDim == 128;

  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kTileBytes = kPanels * kPanelBytes;  // 64 rows of q, k or v
  static constexpr int kStages = kHeadDim == 256 ? 2 : 4;
  static_assert(kBlockK == kPanelRows, "a block of keys is a tile");

  struct Barriers {
    Barrier full_q, full_k[kStages], empty_k[kStages], full_v[kStages], empty_v[kStages];
  };
  // Offsets in shared memory, after the queries at 0. Queries, keys and values begin at multiples
  // of 1024 bytes.
  static constexpr int kKeysAt = kConsumers * kTileBytes;
  static constexpr int kValuesAt = kKeysAt + kStages * kTileBytes;
  static constexpr int kMarginalsAt = kValuesAt + kStages * kTileBytes;
  static constexpr int kNotesAt =
      kMarginalsAt + 4 * kConsumers * int(sizeof(MarginalsSm90::Shared));
  static constexpr int kBarriersAt = kNotesAt + kStages * int(sizeof(NotedKeys));
  static constexpr int kUsedBytes = kBarriersAt + int(sizeof(Barriers));
  static constexpr int kSharedBytes = kUsedBytes + kSwizzledBytes;  // room to align to 1024 bytes

  static const char* name() { return "attention_fwd_sm90_kernel"; }
  using Scores = float[1][kBlockK / 8][4];

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const QueriesOfBlock block = queries_of_block(params.forward, kBlockQ);
    if (block.num_queries <= 0) return;
    shared += -shared_address(shared) & (kSwizzledBytes - 1);
    auto* barriers = reinterpret_cast<Barriers*>(shared + kBarriersAt);
    if (thread_index() == 0) {
      begin_barrier(&barriers->full_q, 1);
      for (int stage = 0; stage < kStages; ++stage) {
        begin_barrier(&barriers->full_k[stage], 2);
        begin_barrier(&barriers->full_v[stage], 1);
        begin_barrier(&barriers->empty_k[stage], 4 * kConsumers);
        begin_barrier(&barriers->empty_v[stage], 4 * kConsumers);
      }
      publish_barriers();
    }
    sync_block();
    const int32_t low = block.visibility.first_key(block.first_query);
    const int32_t high = block.visibility.last_key(block.first_query + block.num_queries - 1);
    const int32_t begin = low / kBlockK * kBlockK;
    const int32_t num_blocks = low <= high ? (high - begin) / kBlockK + 1 : 0;
    const int group = warp_index() / 4;
    if (group == 0) {
      give_registers<kProducerRegisters>();
      if (warp_index() == 0) produce(params, block, begin, num_blocks, shared, *barriers);
      if (warp_index() == 1) note_keys(block, begin, num_blocks, shared, *barriers);
    } else {
      take_registers<kConsumerRegisters>();
      consume(params, block, begin, num_blocks, shared, *barriers, group - 1);
    }
  }

 private:
  // One converged warp runs it; its lane 0 issues the copies.
  RAL_DEVICE static void produce(const Params& params, const QueriesOfBlock& block, int32_t begin,
                                 int32_t num_blocks, char* shared, Barriers& barriers) {
    const bool leads = lane_index() == 0;
    if (leads) {
      arrive_expecting(&barriers.full_q, kConsumers * kTileBytes);
      for (int group = 0; group < kConsumers; ++group)
        copy_tile<kPanels>(shared + group * kTileBytes, params.q,
                           int32_t(block.first_token) + group * kGroupQ, int32_t(block.h),
                           int32_t(block.b), &barriers.full_q);
    }
    Ring<kStages> ring;
    for (int32_t n = 0; n < num_blocks; ++n, ring.advance()) {
      const int32_t token = block.sequence.k_start + begin + n * kBlockK;
      const auto refill = [&](int at, const TensorMap& map, Barrier* full, Barrier* empty) {
        wait(&empty[ring.stage], ring.parity_before());
        if (!leads) return;
        arrive_expecting(&full[ring.stage], kTileBytes);
        copy_tile<kPanels>(shared + at + ring.stage * kTileBytes, map, token,
                           int32_t(block.kv_head), int32_t(block.b), &full[ring.stage]);
      };
      refill(kKeysAt, params.k, barriers.full_k, barriers.empty_k);
      refill(kValuesAt, params.v, barriers.full_v, barriers.empty_v);
    }
  }

  RAL_DEVICE static NotedKeys* notes(char* shared) {
    return reinterpret_cast<NotedKeys*>(shared + kNotesAt);
  }

  // One converged warp runs it.
  RAL_DEVICE static void note_keys(const QueriesOfBlock& block, int32_t begin, int32_t num_blocks,
                                   char* shared, Barriers& barriers) {
    Ring<kStages> ring;
    KeyNotes keys;
    for (int32_t n = 0; n < num_blocks; ++n, ring.advance()) {
      const int32_t first = begin + n * kBlockK, length = block.visibility.length_k;
      const LoadedKeys loaded = load_keys<true>(block.ids, block.padding, first, length);
      const bool has_next = block.ids != nullptr && first + kBlockK < length;
      const int32_t next_span = has_next ? load_global(block.ids + first + kBlockK) : -1;
      wait(&barriers.empty_v[ring.stage], ring.parity_before());
      keys.write(notes(shared) + ring.stage, loaded, next_span);
      sync_warp();
      if (lane_index() == 0) arrive(&barriers.full_k[ring.stage]);
    }
  }

  RAL_DEVICE static void consume(const Params& params, const QueriesOfBlock& block, int32_t begin,
                                 int32_t num_blocks, char* shared, Barriers& barriers, int group) {
    const ral_attention_params& call = params.forward.call;
    const int warp_row = warp_index() % 4 * 16;  // the warp's first row in its warpgroup
    const int64_t first_token = block.first_token + group * kGroupQ;
    const int32_t num_queries = block.num_queries - group * kGroupQ;  // none if negative
    const int32_t warp_query = block.first_query + group * kGroupQ + warp_row;
    auto* of_warp = reinterpret_cast<MarginalsSm90::Shared*>(shared + kMarginalsAt);
    of_warp += group * 4 + warp_index() % 4;
    auto marginals = begin_marginals<MarginalsSm90>(params.forward, block, first_token, num_queries,
                                                    warp_row, &of_warp->rows);
    marginals.shared = of_warp;
    float out[1][kHeadDim / 8][4];
    clear(out);
    float m[2] = {minus_infinity(), minus_infinity()};
    float normaliser[2] = {0.0f, 0.0f};  // the lane's part
    const float scale = call.scale * kLog2e;
    // Range of keys that all rows of the warp see, before padding.
    const int32_t full_low = block.visibility.first_key(warp_query + 15);
    const int32_t full_high = block.visibility.last_key(warp_query);
    // TMA does not zero padding, nor keys of other sequences.
    const bool is_ragged = block.padding != nullptr || call.cu_seqlens_q != nullptr;

    char* q_tile = shared + group * kTileBytes;
    const uint32_t k = shared_address(shared + kKeysAt), v = shared_address(shared + kValuesAt);
    uint32_t q[kQueriesInRegisters ? kHeadDim / 16 : 1][4];
    Scores s;
    uint32_t p[kBlockK / 16][4];  // rounded weights, as A operands
    float before[2], after[2];    // before: the rows' maxima without the block
    KeyNote note;                 // of the block whose scores started last
    const NotedKeys* keys;        // all that was noted of it
    Ring<kStages> ring_k, ring_v;

    const auto start_q_k = [&] {
      wait(&barriers.full_k[ring_k.stage], ring_k.parity());
      keys = notes(shared) + ring_k.stage;
      const KeyNote noted = load_shared(&keys->note);
      const uint32_t tile = k + ring_k.stage * kTileBytes;
      if constexpr (kQueriesInRegisters)
        start_all_scores<T>(s[0], q, tile);
      else
        start_all_scores<T, kHeadDim>(s[0], shared_address(q_tile), tile);
      // The shuffles tell the compiler that all lanes have the same note.
      note = {shuffle(noted.bits, 0), shuffle(noted.first_span, 0)};
      if (marginals.num_spans == 0) note = note.without_spans();
    };
    const auto start_p_v = [&] {
      wait(&barriers.full_v[ring_v.stage], ring_v.parity());
      if (is_ragged) {
        const uint64_t unreal = ~load_shared(&notes(shared)[ring_v.stage].real);
        if (unreal != 0) {
          clear_rows<kPanels>(shared + kValuesAt + ring_v.stage * kTileBytes, unreal);
          publish_to_async();
          sync_group(1 + group);
        }
      }
      start_all_products<T>(out[0], p, v + ring_v.stage * kTileBytes);
    };
    const auto give_up = [&](Barrier* empty, Ring<kStages>& ring) {
      if (lane_index() == 0) arrive(&empty[ring.stage]);
      ring.advance();
    };
    // Turns scores into weights. alpha rescales what was relative to the old maxima.
    const auto weigh_all = [&](int32_t first) {
      const bool all_visible = first >= full_low && first + kBlockK - 1 <= full_high;
      if (!all_visible || note.hides())
        hide(s, block.visibility, load_shared(&keys->real), first, warp_query, minus_infinity());
      float sum[2], alpha[2];
      RAL_UNROLL for (int i = 0; i < 2; ++i)
        before[i] = m[i];
      if (note.borders() == KeyNote::kOne) {
        marginals.weigh_two(s, note, scale, m, sum, alpha, after);
      } else {
        RAL_UNROLL for (int i = 0; i < 2; ++i)
          alpha[i] = weigh(s, i, m[i], scale, sum[i]);
        if (marginals.num_spans != 0) marginals.add_one(sum, alpha, note);
      }
      RAL_UNROLL for (int i = 0; i < 2; ++i)
        normaliser[i] = normaliser[i] * alpha[i] + sum[i];
    };
    const auto add_spans = [&] {
      if (note.borders() != KeyNote::kNone) marginals.add(s, note, keys, after, m);
    };

    wait(&barriers.full_q, 0);
    if constexpr (kQueriesInRegisters) load_left<T>(q, q_tile, warp_row);
    if (num_blocks > 0) {
      start_q_k();
      marginals.enter(note, m);
      wait_for_products<0>();
      pin(s[0]);
      give_up(barriers.empty_k, ring_k);
      weigh_all(begin);  // alpha is not needed: `out` is 0
      add_spans();
      round_left<T>(p, s[0]);
    }
    for (int32_t n = 1; n < num_blocks; ++n) {
      const int32_t first = begin + n * kBlockK;
      start_q_k();
      start_p_v();
      marginals.enter(note, m);
      wait_for_products<1>();
      pin(s[0]);
      give_up(barriers.empty_k, ring_k);
      weigh_all(first);
      // Most maxima are found early, and then no row rescales.
      const bool rises = ballot(m[0] != before[0] || m[1] != before[1]) != 0;
      wait_for_products<0>();
      pin(out[0]);
      pin(p);
      sync_warp();  // all lanes have read the note of these values
      give_up(barriers.empty_v, ring_v);
      if (rises) {
        if (marginals.num_spans != 0) marginals.empty_queue(before);
        const float alpha[2] = {exp2(before[0] - stabiliser(m[0])),
                                exp2(before[1] - stabiliser(m[1]))};
        RAL_UNROLL for (int c = 0; c < kHeadDim / 8; ++c) RAL_UNROLL
          for (int e = 0; e < 4; ++e) out[0][c][e] *= alpha[e / 2];
      }
      add_spans();
      round_left<T>(p, s[0]);
    }
    if (num_blocks > 0) {
      start_p_v();
      wait_for_products<0>();
      pin(out[0]);
    }
    marginals.rows = &of_warp->rows;  // no register holds it through the loop
    sync_group(1 + group);
    const Tile<T, kHeadDim> stage{reinterpret_cast<T*>(q_tile)};
    finish<1, true>(params.forward, block, first_token, num_queries, warp_row, stage, out, m,
                    normaliser, marginals);
  }
};

}  // namespace cuda
}  // namespace ral
