// Forward of the `attention` op on register tiles.
//
// It walks the keys in blocks of Compute::kForwardKeys. First it forms P^T for the whole block,
// tile by tile. Each tile is exponentiated while the next one's scores are formed. Then O^T += V^T
// P^T. With few queries it does not pack K and V, and forms O instead of its transpose.
#pragma once

#include "attention/fwd_blocks.h"
#include "attention/fwd_direct.h"

namespace ral {
namespace RAL_ISA {

template <class Compute, int V, int64_t kPanels, bool kPacks = true>
class AttentionForward : public ForwardBlocks<AttentionForward<Compute, V, kPanels, kPacks>,
                                              Compute, V, kPanels, 1, kPacks> {
  using Base = ForwardBlocks<AttentionForward, Compute, V, kPanels, 1, kPacks>;
  friend Base;
  using Base::kColumns;
  using Base::kGroupsPerBlock;
  using Base::kStepsPerGroup;
  using Base::kWidth;
  using Base::params_;
  using Base::problem_;
  using Base::qk_steps_;
  using typename Base::Block;
  using typename Base::State;
  // With vectors of four, interleaving takes 1.17x the time (float32, Zen 5, 2026-11).
  static constexpr bool kInterleaved = kPacks && kLanes >= 8;

 public:
  using Base::Base;

 private:
  void walk(const Sequence& s, int64_t kv_head, const Block& block,
            const ScoreTransform<V>& transform, GroupRange visible, State& state) const {
    if constexpr (!kPacks) return walk_directly(s, kv_head, block, transform, visible, state);
    const uint32_t* keys = this->keys_of(s, kv_head);
    const uint32_t* values = this->values_of(s, kv_head);
    Tile<V> tile;  // the latest one
    for (int64_t begin = visible.begin / kGroupsPerBlock * kGroupsPerBlock; begin < visible.end;
         begin += kGroupsPerBlock) {
      const int64_t end =
          begin + kGroupsPerBlock < visible.end ? begin + kGroupsPerBlock : visible.end;
      for (int64_t panel = 0; panel < kPanels; ++panel) {
        const GroupRange range =
            groups_of_keys(block.some_first[panel], block.some_last[panel], GroupRange{begin, end});
        if (range.begin == range.end) continue;
        // Empty already, unless a query is NaN: its padded keys leave NaN, which is not this
        // panel's.
        memset(state.part, 0, sizeof state.part);
        for (int64_t group = range.begin; group < range.end; ++group) {
          Vec top[V];
          multiply_scores(panel, group, range.begin, keys + group * kTileRows * qk_steps_, top,
                          tile, state);
          Vec factors[V];
          finish_scores(transform, block, panel, group, range.begin, top, tile, state, factors);
        }
        exponentiate_tile(tile, panel, range.end - 1, range.begin, true, state);
        this->fold_sums(panel, state);
        accumulate_out(s, block, panel, range, end == visible.end, values, state);
      }
    }
  }

  // The same for one panel of few queries. The rows of O lie in state.rows for some blocks of keys.
  // raise_stabiliser does not rescale them, so this does.
  void walk_directly(const Sequence& s, int64_t kv_head, const Block& block,
                     const ScoreTransform<V>& transform, GroupRange visible, State& state) const {
    static_assert(kPacks || (V == 1 && kPanels == 1), "one vector of queries");
    const Rows keys = problem_.key_rows(params_.k, s, kv_head);
    const Rows values = problem_.real_key_rows(params_.v, s, kv_head);
    const int64_t ld_q = round_up(params_.head_dim, kLanes);
    const int64_t ld_out = round_up(params_.head_dim_v, kLanes);
    memset(state.rows, 0, block.count * ld_out * sizeof(float));
    for (int64_t begin = visible.begin; begin < visible.end; begin += kGroupsPerBlock) {
      const int64_t end =
          begin + kGroupsPerBlock < visible.end ? begin + kGroupsPerBlock : visible.end;
      for (int64_t group = begin; group < end; ++group) {
        alignas(64) float scores[kTileRows][kLanes] = {};
        with_dtype(params_.dtype, [&](auto dtype) {
          multiply_keys<dtype>(keys, group * kTileRows, params_.head_dim,
                               reinterpret_cast<const float*>(state.queries), ld_q, block.count,
                               scores);
        });
        Tile<V> tile;
        for (int r = 0; r < kTileRows; ++r) tile.scores[r][0] = load(scores[r]) * params_.scale;
        Vec top[V] = {highest(tile.scores, 0)};
        Vec factors[V];
        if (finish_scores(transform, block, 0, group, begin, top, tile, state, factors)) {
          for (int64_t c = 0; c < block.count; ++c) {
            for (int64_t d = 0; d < ld_out; ++d) state.rows[c * ld_out + d] *= factors[0][c];
          }
        }
        exponentiate_tile(tile, 0, group, begin, group == end - 1, state);
      }
      this->fold_sums(0, state);
      const int64_t last = end * kTileRows < s.seqlen_k ? end * kTileRows : s.seqlen_k;
      with_dtype(params_.dtype, [&](auto dtype) {
        accumulate_values<dtype>(values, begin * kTileRows, last, params_.head_dim_v,
                                 reinterpret_cast<const float*>(state.probs), block.count,
                                 state.rows, ld_out);
      });
      if (++state.out_blocks[0] == kFoldedBlocks || end == visible.end) {
        move_rows(block, ld_out, state);
      }
    }
  }

  // Adds O to its transpose, and clears it.
  void move_rows(const Block& block, int64_t ld_out, State& state) const {
    for (int64_t c = 0; c < block.count; ++c) {
      for (int64_t d = 0; d < params_.head_dim_v; ++d) {
        float* out = state.out + d * kColumns + c;
        *out = state.rows[c * ld_out + d] + (state.out_rows[0] > 0 ? *out : 0.f);
      }
    }
    memset(state.rows, 0, block.count * ld_out * sizeof(float));
    state.out_rows[0] = params_.head_dim_v;
    state.out_blocks[0] = 0;
  }

  // Applies options to scores and makes room for them below the stabiliser. Returns whether it was
  // raised; `factors` is then what all sums were multiplied by.
  RAL_INLINE bool finish_scores(const ScoreTransform<V>& transform, const Block& block,
                                int64_t panel, int64_t group, int64_t first_group, Vec (&top)[V],
                                Tile<V>& tile, State& state, Vec (&factors)[V]) const {
    tile.factor = kLog2e;
    if (__builtin_expect(!transform.is_plain(block, panel, group), 0)) {
      transform.apply(tile.scores, block, panel, group, 1.f, state.bias, kColumns, nullptr);
      bool coarse = false;
      for (int v = 0; v < V; ++v) {
        top[v] = highest(tile.scores, v);
        const Vec finite = select(top[v] == -__builtin_inff(), Vec{}, top[v]);
        coarse |= any_greater(max(finite, -finite), broadcast(kCoarseScore * kLn2));
      }
      if (coarse) {  // rounded here, for want of fractions
        for (int r = 0; r < kTileRows; ++r) {
          for (int v = 0; v < V; ++v) tile.scores[r][v] = tile.scores[r][v] * kLog2e;
        }
        tile.factor = 1.f;
      }
    }
    const float* stabiliser = state.stabiliser + panel * kWidth;
    bool exceeded = false;
    RAL_UNROLL for (int v = 0; v < V; ++v) {
      float* highest_so_far = state.top + panel * kWidth + v * kLanes;
      store(highest_so_far, max(load(highest_so_far), top[v]));
      top[v] = top[v] * kLog2e;
      exceeded |= any_greater(top[v], load(stabiliser + v * kLanes) + kSlack);
    }
    if (__builtin_expect(exceeded, 0)) {
      this->raise_stabiliser(top, panel, group - first_group, state, factors);
    }
    state.started[panel] = true;
    return exceeded;
  }

  static RAL_INLINE Vec highest(const Vec (&x)[kTileRows][V], int v) {
    return max(max(max(x[0][v], x[1][v]), max(x[2][v], x[3][v])), max(x[4][v], x[5][v]));
  }

  // K Q^T of one tile, and its maxima. Meanwhile it exponentiates the previous tile, one vector
  // after each share of the products. Otherwise maxima and exponentials separate one tile's last
  // product from the next tile's first. The multipliers then idled for a tenth of the product's
  // time (float32, Zen 5, 2026-11).
  RAL_NOINLINE void multiply_scores(int64_t panel, int64_t group, int64_t first_group,
                                    const uint32_t* a, Vec (&top)[V], Tile<V>& tile,
                                    State& state) const {
    const uint32_t* b = state.queries + panel * this->padded_qk_steps_ * kWidth;
    const bool pending = group > first_group;
    Vec p[kTileRows][V];
    clear(p);
    if constexpr (kInterleaved) {
      constexpr int64_t kShares = kStepsPerGroup * V;
      int64_t share = qk_steps_ / kShares + 1;
      int64_t larger = qk_steps_ % kShares;  // this many shares have one step more
      for (int64_t step = 0; step < kStepsPerGroup; ++step) {
        float* target[Compute::kPair] = {};
        if (pending) find_sums(panel, group - 1, step, false, state, target);
        for (int64_t v = 0; v < V; ++v) {
          if (larger-- == 0) --share;
          multiply_tile<Compute, AOperand::kPacked, kTileRows, V>(p, a, 0, b, kWidth, share);
          a += share * kTileRows;
          b += share * kWidth;
          if (pending) {
            exponentiate(tile, panel, group - 1 - first_group, step, v, target, state);
          }
        }
      }
    } else {
      if (pending) exponentiate_tile(tile, panel, group - 1, first_group, false, state);
      multiply_tile<Compute, AOperand::kPacked, kTileRows, V>(p, a, 0, b, kWidth, qk_steps_);
    }
    // Rounded before they come to base 2, so that the backward can form the same scores.
    RAL_UNROLL for (int r = 0; r < kTileRows; ++r) {
      RAL_UNROLL for (int v = 0; v < V; ++v) {
        p[r][v] = p[r][v] * params_.scale;
        tile.scores[r][v] = p[r][v];
      }
    }
    RAL_UNROLL for (int v = 0; v < V; ++v)
      top[v] = highest(p, v);
  }

  RAL_NOINLINE void exponentiate_tile(const Tile<V>& tile, int64_t panel, int64_t group,
                                      int64_t first_group, bool last, State& state) const {
    for (int64_t step = 0; step < kStepsPerGroup; ++step) {
      float* target[Compute::kPair];
      find_sums(panel, group, step, last, state, target);
      for (int64_t v = 0; v < V; ++v) {
        exponentiate(tile, panel, group - first_group, step, v, target, state);
      }
    }
  }

  // P^T of kPair keys of a tile and one vector of queries. It is stored as the B operand of O^T +=
  // V^T P^T, and added to the sums.
  RAL_INLINE void exponentiate(const Tile<V>& tile, int64_t panel, int64_t row_group, int64_t step,
                               int64_t v, float* const (&target)[Compute::kPair],
                               State& state) const {
    const int64_t column = panel * kWidth + v * kLanes;
    const Vec m = load(state.stabiliser + column);
    float* all = state.sums + column;
    Vec part = load(state.part + v * kLanes);
    Vec p[Compute::kPair];
    RAL_UNROLL for (int i = 0; i < Compute::kPair; ++i) {
      p[i] = exp2_bounded(tile.scores[step * Compute::kPair + i][v] * tile.factor - m);
      part += p[i];
      if (target[i]) {
        float* sum = target[i] + v * kLanes;
        store(all, load(all) + part);
        if (sum != all) store(sum, load(sum) + part);
        part = Vec{};
      }
    }
    store(state.part + v * kLanes, part);
    Compute::store_pair(p, state.probs + (row_group * kStepsPerGroup + step) * kColumns + column,
                        state.rounded_sum + column);
  }

  // The sums to which `part` is added after each key of `step`. Null if the next key belongs to the
  // same sum, in this tile or, unless it is the `last`, in the next.
  RAL_INLINE void find_sums(int64_t panel, int64_t group, int64_t step, bool last,
                            const State& state, float* (&target)[Compute::kPair]) const {
    float* sums = state.sums + panel * kWidth;
    RAL_UNROLL for (int i = 0; i < Compute::kPair; ++i) {
      const int64_t r = step * Compute::kPair + i;
      const bool is_last_key = r == kTileRows - 1;
      int32_t span = last && is_last_key ? -1 : Problem::kContinues;
      if (state.run_ends) {
        span = state.run_ends[group * kTileRows + r];
        const bool goes_on = is_last_key && !last;
        if (goes_on && state.span_ids[(group + 1) * kTileRows] == span) span = Problem::kContinues;
      }
      target[i] = span == Problem::kContinues ? nullptr : sums + (span + 1) * kColumns;
    }
  }

  // O^T += V^T P^T for the keys of `range`. With `last` it also prefetches the outputs.
  void accumulate_out(const Sequence& s, const Block& block, int64_t panel, GroupRange range,
                      bool last, const uint32_t* values, State& state) const {
    const int64_t v_groups = this->v_groups_;
    const FeatureRows::Place place = this->value_layout(s).find(range.begin * kStepsPerGroup);
    for (int64_t g = 0; g < v_groups; ++g) {
      const int64_t d = g * kTileRows;
      if (last) {
        const int64_t first = panel * kWidth;
        this->prefetch_outputs(s, block, state.run_ends != nullptr, first + g * kWidth / v_groups,
                               first + (g + 1) * kWidth / v_groups);
      }
      const Product product{values + place.offset + g * place.group_stride, 0,
                            state.probs + panel * kWidth, kColumns,
                            (range.end - range.begin) * kStepsPerGroup};
      accumulate_rows<Compute, AOperand::kPacked, V>(
          params_.head_dim_v - d < kTileRows ? params_.head_dim_v - d : kTileRows,
          state.out + d * kColumns + panel * kWidth, kColumns, state.out_rows[panel] > 0, product);
    }
    state.out_rows[panel] = params_.head_dim_v;
    if (++state.out_blocks[panel] == kFoldedBlocks && !last) this->fold_out(panel, state);
  }
};

}  // namespace RAL_ISA
}  // namespace ral
