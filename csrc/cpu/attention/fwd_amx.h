// Forward of the `attention` op on AMX tiles.
//
// A tile is exponentiated while the next tile's scores are multiplied, and while O^T += V^T P^T is
// formed for the previous block of keys. So P^T of two blocks is kept. That hides latencies, 7 % of
// the time, and no more: products take one of the two ports of 512-bit arithmetic. Four products
// alone take 62 cycles and 128 FMAs 58; together they take 120 to 134 (Emerald Rapids, 2026-11).
#pragma once

#include "attention/fwd_blocks.h"
#include "core/amx.h"

namespace ral {
namespace RAL_ISA {

template <int64_t kPanels>
class AmxForward : public ForwardBlocks<AmxForward<kPanels>, AmxCompute, 2, kPanels, 2> {
  using Base = ForwardBlocks<AmxForward, AmxCompute, 2, kPanels, 2>;
  friend Base;
  using Base::kColumns;
  using Base::kGroupsPerBlock;
  using Base::kStepsPerGroup;
  using Base::kWidth;
  using Base::params_;
  using typename Base::Block;
  using typename Base::State;
  static_assert(kWidth == 2 * kAmxRows, "two tiles of queries");

 public:
  using Base::Base;

 private:
  // A block of keys: what each panel sees of it, and P^T from the first group seen on.
  struct Keys {
    GroupRange range[kPanels];
    uint32_t* probs = nullptr;
  };

  // Scores that are being exponentiated, kFew keys at a time.
  struct Pending {
    alignas(64) Vec part[2];  // row sums since the span last changed
    const Tile<2>* tile;
    const float* stabiliser;  // this and the next three point to the panel's columns
    float* rounded_sum;
    float* sums;
    uint32_t* probs;          // of the next keys
    const int32_t* run_ends;  // of the tile, or null
    uint32_t ends;  // bit 0: a run ends with the next key; bit 1: with the one after; and so on
    int64_t key = kTileRows;  // the next key
  };
  static constexpr int64_t kFew = 4;

  // The products V^T P^T of a block of keys, in order.
  struct Values {
    Keys keys;
    int64_t panel = kPanels, feature_group = 0;  // of the next product
  };

  // The walk of one column block.
  struct Walk {
    const Sequence& s;
    const Block& block;
    const ScoreTransform<2>& transform;
    const uint32_t* keys;
    const uint32_t* values;
    State& state;
    Pending pending{};
    Values before{};  // of the previous block of keys
  };

  void walk(const Sequence& s, int64_t kv_head, const Block& block,
            const ScoreTransform<2>& transform, GroupRange visible, State& state) const {
    Walk w{s, block, transform, this->keys_of(s, kv_head), this->values_of(s, kv_head), state};
    uint32_t* const probs = state.probs;
    constexpr int64_t kKept = kGroupsPerBlock * kStepsPerGroup * kColumns;
    Tile<2> tiles[2];
    int64_t count = 0;  // tiles so far
    for (int64_t begin = visible.begin / kGroupsPerBlock * kGroupsPerBlock; begin < visible.end;
         begin += kGroupsPerBlock) {
      const int64_t end =
          begin + kGroupsPerBlock < visible.end ? begin + kGroupsPerBlock : visible.end;
      Keys now;
      int64_t expected = 0;
      for (int64_t panel = 0; panel < kPanels; ++panel) {
        now.range[panel] =
            groups_of_keys(block.some_first[panel], block.some_last[panel], GroupRange{begin, end});
        expected += now.range[panel].end - now.range[panel].begin;
      }
      if (expected == 0) continue;
      now.probs = w.before.keys.probs == probs ? probs + kKept : probs;
      const int64_t share = (kPanels * this->v_groups_ + expected - 1) / expected;
      for (int64_t group = begin; group < end; ++group) {
        for (int64_t panel = 0; panel < kPanels; ++panel) {
          const GroupRange& range = now.range[panel];
          if (group < range.begin || group >= range.end) continue;
          Tile<2>& tile = tiles[count++ % 2];
          multiply_scores(w, panel, group, tile);
          // The rest of the previous block must become P^T before it is multiplied with V.
          if (state.probs != now.probs) exponentiate_rest(w);
          for (int64_t i = 0; i < share; ++i) multiply_values(w, false);
          exponentiate_rest(w);
          state.probs = now.probs;
          settle_scores(w, panel, group, group - range.begin, tile);
          begin_exponentials(w, panel, group, group - range.begin, tile);
        }
      }
      while (multiply_values(w, false)) {
      }
      w.before = Values{now, 0, 0};
    }
    exponentiate_rest(w);
    while (multiply_values(w, true)) {
    }
  }

  // K Q^T of one tile.
  RAL_INLINE void multiply_scores(Walk& w, int64_t panel, int64_t group, Tile<2>& tile) const {
    const int64_t steps = this->qk_steps_;
    amx_zero_sums();
    amx_accumulate(
        packed_product(w.keys + group * kTileRows * steps, w.state.queries + panel * steps * kWidth,
                       kWidth, steps / kAmxRows),
        [&] { exponentiate_some(w); });
    amx_store_sums(reinterpret_cast<float*>(tile.scores), kWidth);
  }

  // Forms the next product of V^T P^T; false if there is none. With `last` it also prefetches the
  // outputs.
  RAL_INLINE bool multiply_values(Walk& w, bool last) const {
    Values& before = w.before;
    while (before.panel < kPanels &&
           before.keys.range[before.panel].begin == before.keys.range[before.panel].end) {
      ++before.panel;
    }
    if (before.panel >= kPanels) return false;
    const int64_t panel = before.panel;
    const GroupRange range = before.keys.range[panel];
    const int64_t d = before.feature_group * kTileRows;
    const int64_t first = panel * kWidth;
    const FeatureRows::Place place = this->value_layout(w.s).find(range.begin * kStepsPerGroup);
    if (last) {
      this->prefetch_outputs(w.s, w.block, w.state.run_ends != nullptr,
                             first + before.feature_group * kWidth / this->v_groups_,
                             first + (before.feature_group + 1) * kWidth / this->v_groups_);
    }
    amx_accumulate_to(
        w.state.out + d * kColumns + first, kColumns, w.state.out_rows[panel] > d,
        packed_product(w.values + place.offset + before.feature_group * place.group_stride,
                       before.keys.probs + first, kColumns, range.end - range.begin),
        [&] { exponentiate_some(w); });
    if (w.state.out_rows[panel] < d + kTileRows) w.state.out_rows[panel] = d + kTileRows;
    if (++before.feature_group == this->v_groups_) {
      before.feature_group = 0;
      ++before.panel;
    }
    return true;
  }

  // Brings one tile's scores to base 2, and makes room for them below the stabiliser.
  RAL_INLINE void settle_scores(Walk& w, int64_t panel, int64_t group, int64_t groups_done,
                                Tile<2>& tile) const {
    tile.factor = params_.scale * kLog2e;
    if (__builtin_expect(!w.transform.is_plain(w.block, panel, group), 0)) {
      w.transform.apply(tile.scores, w.block, panel, group, params_.scale, w.state.bias, kColumns,
                        nullptr);
      // Rounded here because of rows of finfo.min: see AttentionForward.
      for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < 2; ++v) tile.scores[r][v] = tile.scores[r][v] * kLog2e;
      }
      tile.factor = 1.f;
    }
    Vec top[2] = {tile.scores[0][0], tile.scores[0][1]};
    Vec other[2] = {tile.scores[1][0], tile.scores[1][1]};
    RAL_UNROLL for (int r = 2; r < kTileRows; r += 2) {
      RAL_UNROLL for (int v = 0; v < 2; ++v) {
        top[v] = max(top[v], tile.scores[r][v]);
        other[v] = max(other[v], tile.scores[r + 1][v]);
      }
    }
    const float* stabiliser = w.state.stabiliser + panel * kWidth;
    bool exceeded = false;
    RAL_UNROLL for (int v = 0; v < 2; ++v) {
      top[v] = max(top[v], other[v]) * tile.factor;
      exceeded |= any_greater(top[v], load(stabiliser + v * kLanes) + kSlack);
    }
    if (__builtin_expect(exceeded, 0)) raise(w, top, panel, groups_done);
    w.state.started[panel] = true;
  }

  RAL_NOINLINE void raise(Walk& w, const Vec (&top)[2], int64_t panel, int64_t groups_done) const {
    Vec factors[2];
    this->raise_stabiliser(top, panel, groups_done, w.state, factors);
    // P^T of the previous block, as far as it has not been multiplied with V.
    const Values& before = w.before;
    if (before.panel > panel) return;
    const GroupRange range = before.keys.range[panel];
    for (int64_t step = 0; step < (range.end - range.begin) * kStepsPerGroup; ++step) {
      for (int v = 0; v < 2; ++v) {
        AmxCompute::rescale(before.keys.probs + step * kColumns + panel * kWidth + v * kLanes,
                            factors[v]);
      }
    }
  }

  RAL_INLINE void begin_exponentials(Walk& w, int64_t panel, int64_t group, int64_t groups_done,
                                     const Tile<2>& tile) const {
    const int64_t column = panel * kWidth;
    Pending& x = w.pending;
    x.part[0] = x.part[1] = Vec{};
    x.tile = &tile;
    x.stabiliser = w.state.stabiliser + column;
    x.rounded_sum = w.state.rounded_sum + column;
    x.sums = w.state.sums + column;
    x.probs = w.state.probs + groups_done * kStepsPerGroup * kColumns + column;
    x.run_ends = w.state.run_ends ? w.state.run_ends + group * kTileRows : nullptr;
    x.ends = 1u << (kTileRows - 1);
    if (x.run_ends) {
      const IntVec low = load(x.run_ends) != Problem::kContinues;
      const IntVec high = load(x.run_ends + kLanes) != Problem::kContinues;
      x.ends = _mm512_movepi32_mask((__m512i)low) |
               static_cast<uint32_t>(_mm512_movepi32_mask((__m512i)high)) << kLanes;
    }
    x.key = 0;
  }

  RAL_INLINE void exponentiate_some(Walk& w) const {
    if (w.pending.key < kTileRows) exponentiate_few(w.pending);
  }
  RAL_INLINE void exponentiate_rest(Walk& w) const {
    while (w.pending.key < kTileRows) exponentiate_few(w.pending);
  }

  // P^T of the next keys. It is stored as the B operand of O^T += V^T P^T, and added to the sums.
  // Not inlined: among the tiles' addresses the compiler would run out of registers.
  static RAL_NOINLINE void exponentiate_few(Pending& x) {
    const Vec factor = broadcast(x.tile->factor);
    const Vec(&scores)[kTileRows][2] = x.tile->scores;
    const int64_t key = x.key;
    const bool run_ends = x.ends & ((1u << kFew) - 1);
    RAL_UNROLL for (int v = 0; v < 2; ++v) {
      const Vec m = load(x.stabiliser + v * kLanes);
      Vec p[kFew];
      RAL_UNROLL for (int i = 0; i < kFew; ++i) {
        p[i] = exp2_bounded(scores[key + i][v] * factor - m);
      }
      if (__builtin_expect(run_ends, 0)) {
        add_runs(x, v, p);
      } else {
        x.part[v] += (p[0] + p[1]) + (p[2] + p[3]);
      }
      RAL_UNROLL for (int i = 0; i < kFew; i += 2) {
        const Vec pair[2] = {p[i], p[i + 1]};
        AmxCompute::store_pair(pair, x.probs + i / 2 * kColumns + v * kLanes,
                               x.rounded_sum + v * kLanes);
      }
    }
    x.probs += kFew / 2 * kColumns;
    x.ends >>= kFew;
    x.key += kFew;
  }

  // Adds up the runs that end among the keys.
  static RAL_INLINE void add_runs(Pending& x, int v, const Vec (&p)[kFew]) {
    Vec part = x.part[v];
    for (int i = 0; i < kFew; ++i) {
      part += p[i];
      if (x.ends >> i & 1) {
        const int64_t row = x.run_ends ? x.run_ends[x.key + i] + 1 : 0;
        float* all = x.sums + v * kLanes;
        float* sum = all + row * kColumns;
        store(all, load(all) + part);
        if (sum != all) store(sum, load(sum) + part);
        part = Vec{};
      }
    }
    x.part[v] = part;
  }
};

}  // namespace RAL_ISA
}  // namespace ral
