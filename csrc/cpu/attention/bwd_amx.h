// Backward of the `attention` op on AMX tiles.
//
// Unlike in the forward, forming P^T and dS^T of a tile while the next one's products run gains
// nothing (Emerald Rapids, 2026-11).
#pragma once

#include "attention/bwd_keys.h"
#include "core/amx.h"

namespace ral {
namespace RAL_ISA {

template <int64_t kPanels>
class AmxBackward : public BackwardKeys<AmxBackward<kPanels>, AmxCompute, 2, kPanels> {
  using Base = BackwardKeys<AmxBackward, AmxCompute, 2, kPanels>;
  friend Base;
  using Base::has_dout_;
  using Base::kBiasColumns;
  using Base::kColumns;
  using Base::kColumnSteps;
  using Base::kStepsPerGroup;
  using Base::kWidth;
  using Base::params_;
  using Base::problem_;
  using Base::rows_tile;
  using Base::scratch_layout_;
  using typename Base::View;
  static_assert(kWidth == 2 * kAmxRows && kColumnSteps % kAmxRows == 0, "whole tiles");

 public:
  using Base::Base;

 private:
  // One tile: its products, and where its P^T and dS^T go.
  struct Products {
    Vec scores[kTileRows][2];  // before `factor`
    Vec dp[kTileRows][2];
    Vec slope[kTileRows * 2];  // of the soft cap
    float factor;
    bool capped;       // whether softcap is on
    const float* lse;  // this and the next three point to the panel's columns
    const float* delta;
    const float* dmarginals;  // or null
    float* dbias;             // or null
    const int32_t* span_ids;  // of the tile; null if no span matters
    int64_t keys;             // of the tile, without padding
    int64_t no_span;          // row of dbias for keys in no span
    uint32_t* p_rows;         // or null
    uint32_t* ds_rows;
    uint32_t* ds_pairs;
  };

  // P^T and dS^T for the key groups of `seen`.
  void differentiate(const ScoreTransform<2>& transform, const Sequence& s, const View& view,
                     int64_t kv_head, GroupRange seen, uint32_t* scratch) const {
    Products tile;
    for (int64_t panel = 0; panel < kPanels; ++panel) {
      for (int64_t group = seen.begin; group < seen.end; ++group) {
        const GroupRange panel_seen =
            groups_of_keys(view.block.some_first[panel], view.block.some_last[panel],
                           GroupRange{group, group + 1});
        if (panel_seen.begin == panel_seen.end) {
          clear_tile(group - seen.begin, panel, scratch);
          continue;
        }
        multiply(view, problem_.groups_before(s, kv_head) + group, panel, tile);
        settle_scores(transform, view, panel, group, tile);
        set_targets(s, view, panel, group, group - seen.begin, scratch, tile);
        differentiate_tile(tile);
      }
    }
  }

  // K Q^T and V dO^T of one tile.
  RAL_INLINE void multiply(const View& view, int64_t index, int64_t panel, Products& tile) const {
    const auto product = [&](const uint32_t* keys, const uint32_t* columns, int64_t steps,
                             Vec(&sums)[kTileRows][2]) {
      amx_accumulate_to(reinterpret_cast<float*>(sums), kWidth, false,
                        packed_product(keys + index * kTileRows * steps,
                                       columns + panel * steps * kWidth, kWidth, steps / kAmxRows),
                        [] {});
    };
    product(this->key_rows_, view.q_columns, this->qk_steps_, tile.scores);
    if (has_dout_) {
      product(this->value_rows_, view.dout_columns, this->v_steps_, tile.dp);
    } else {
      memset(tile.dp, 0, sizeof tile.dp);
    }
  }

  RAL_INLINE void settle_scores(const ScoreTransform<2>& transform, const View& view, int64_t panel,
                                int64_t group, Products& tile) const {
    tile.factor = params_.scale;
    if (__builtin_expect(transform.is_plain(view.block, panel, group), 1)) return;
    transform.apply(tile.scores, view.block, panel, group, params_.scale, view.bias, kColumns,
                    tile.slope);
    tile.factor = 1.f;
    // If every score is about finfo.min, lse is too coarse to subtract. min() keeps P at 1 or
    // below.
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < 2; ++v) {
        tile.scores[r][v] = min(tile.scores[r][v], load(view.lse + panel * kWidth + v * kLanes));
      }
    }
  }

  RAL_INLINE void set_targets(const Sequence& s, const View& view, int64_t panel, int64_t group,
                              int64_t row_group, uint32_t* scratch, Products& tile) const {
    const int64_t column = panel * kWidth;
    float* dbias = reinterpret_cast<float*>(scratch + scratch_layout_.dbias);
    tile.capped = params_.softcap > 0;
    tile.lse = view.lse + column;
    tile.delta = view.delta + column;
    tile.dmarginals = view.dmarginals ? view.dmarginals + column : nullptr;
    tile.dbias = view.dbias ? dbias + column : nullptr;
    const bool spans = view.dmarginals || view.dbias;
    tile.span_ids = spans ? problem_.span_ids(s) + group * kTileRows : nullptr;
    tile.keys = s.seqlen_k - group * kTileRows;
    tile.no_span = this->queries_.bias_row(-1);
    tile.p_rows =
        has_dout_ ? rows_tile(scratch_layout_.p_rows, row_group, panel, scratch) : nullptr;
    tile.ds_rows = rows_tile(scratch_layout_.ds_rows, row_group, panel, scratch);
    tile.ds_pairs =
        scratch + scratch_layout_.ds_pairs + row_group * kStepsPerGroup * kColumns + column;
  }

  // P^T and dS^T, equations (5), (9) and (11). Not inlined: among the tiles' addresses the
  // compiler would run out of registers.
  static RAL_NOINLINE void differentiate_tile(const Products& x) {
    const Vec factor = broadcast(x.factor);
    const Vec lse[2] = {load(x.lse), load(x.lse + kLanes)};
    const Vec delta[2] = {load(x.delta), load(x.delta + kLanes)};
    Vec shift[2] = {-delta[0], -delta[1]};  // what is added to dP
    int32_t shift_span = -1;
    for (int64_t key = 0; key < kTileRows; key += 2) {
      Vec p[2][2], ds[2][2];
      RAL_UNROLL for (int i = 0; i < 2; ++i) {
        const int64_t r = key + i;
        const int32_t span = x.span_ids && r < x.keys ? x.span_ids[r] : -1;
        if (x.dmarginals && span != shift_span) {
          shift_span = span;
          RAL_UNROLL for (int v = 0; v < 2; ++v) {
            shift[v] = -delta[v];
            if (span >= 0) shift[v] += load(x.dmarginals + span * kColumns + v * kLanes);
          }
        }
        RAL_UNROLL for (int v = 0; v < 2; ++v) {
          p[i][v] = exp2_bounded((x.scores[r][v] * factor - lse[v]) * kLog2e);
          ds[i][v] = p[i][v] * (x.dp[r][v] + shift[v]);
        }
        if (x.dbias && r < x.keys) {
          float* sums = x.dbias + (span >= 0 ? span : x.no_span) * kBiasColumns;
          for (int v = 0; v < 2; ++v, sums += kLanes) {
            store(sums, load(sums) + ds[i][v]);
            store(sums + kColumns, load(sums + kColumns) + p[i][v]);
          }
        }
        if (x.capped) {
          ds[i][0] = ds[i][0] * x.slope[r * 2];
          ds[i][1] = ds[i][1] * x.slope[r * 2 + 1];
        }
      }
      if (x.p_rows) AmxCompute::store_rows(p, x.p_rows + key * kColumnSteps, kColumnSteps);
      AmxCompute::store_rows_and_pairs(ds, x.ds_rows + key * kColumnSteps, kColumnSteps,
                                       x.ds_pairs + key / 2 * kColumns, kColumns);
    }
  }

  void clear_tile(int64_t row_group, int64_t panel, uint32_t* scratch) const {
    uint32_t* p_rows = rows_tile(scratch_layout_.p_rows, row_group, panel, scratch);
    uint32_t* ds_rows = rows_tile(scratch_layout_.ds_rows, row_group, panel, scratch);
    for (int64_t r = 0; r < kTileRows; ++r) {
      memset(p_rows + r * kColumnSteps, 0, kAmxRows * sizeof(uint32_t));
      memset(ds_rows + r * kColumnSteps, 0, kAmxRows * sizeof(uint32_t));
    }
    uint32_t* pairs =
        scratch + scratch_layout_.ds_pairs + row_group * kStepsPerGroup * kColumns + panel * kWidth;
    for (int64_t step = 0; step < kStepsPerGroup; ++step) {
      memset(pairs + step * kColumns, 0, kWidth * sizeof(uint32_t));
    }
  }

  // dV += P^T dO, or dK += dS^T Q, for the key groups of `seen`.
  void accumulate_keys(GroupRange seen, int64_t first_group, const uint32_t* b, const uint32_t* a,
                       int64_t features, int64_t padded, float* gradient) const {
    for (int64_t feature = 0; feature < features; feature += kWidth) {
      const uint32_t* columns = b + feature / kPanel * kColumnSteps * kPanel + feature % kPanel;
      for (int64_t group = seen.begin; group < seen.end; ++group) {
        const AmxProduct product{a + (group - seen.begin) * kTileRows * kColumnSteps,
                                 kColumnSteps,
                                 kAmxRows * kColumnSteps,
                                 kAmxRows,
                                 columns,
                                 kPanel,
                                 kColumnSteps / kAmxRows};
        amx_accumulate_to(gradient + (group - first_group) * kTileRows * padded + feature, padded,
                          true, product, [] {});
      }
    }
  }

  // dQ^T += K^T dS^T.
  void accumulate_queries(const Sequence& s, const View& view, int64_t kv_head, GroupRange seen,
                          bool add, uint32_t* scratch) const {
    const FeatureRows::Place place = this->key_layout(s).find(seen.begin * kStepsPerGroup);
    const uint32_t* keys = this->key_columns_of(s, kv_head);
    for (int64_t panel = 0; panel < kPanels; ++panel) {
      for (int64_t g = 0; g < this->k_feature_groups_; ++g) {
        amx_accumulate_to(view.dq + g * kTileRows * kColumns + panel * kWidth, kColumns, add,
                          packed_product(keys + place.offset + g * place.group_stride,
                                         scratch + scratch_layout_.ds_pairs + panel * kWidth,
                                         kColumns, seen.end - seen.begin),
                          [] {});
      }
    }
  }
};

}  // namespace RAL_ISA
}  // namespace ral
