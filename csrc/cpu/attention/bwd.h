// Backward of the `attention` op on register tiles.
#pragma once

#include "attention/bwd_keys.h"
#include "attention/fwd_direct.h"

namespace ral {
namespace RAL_ISA {

template <class Compute, int V, int64_t kPanels>
class AttentionBackward
    : public BackwardKeys<AttentionBackward<Compute, V, kPanels>, Compute, V, kPanels> {
  using Base = BackwardKeys<AttentionBackward, Compute, V, kPanels>;
  friend Base;
  using Base::has_dout_;
  using Base::kBiasColumns;
  using Base::kColumns;
  using Base::kColumnSteps;
  using Base::kNoGradient;
  using Base::kStepsPerGroup;
  using Base::kWidth;
  using Base::params_;
  using Base::problem_;
  using Base::qk_steps_;
  using Base::rows_tile;
  using Base::scratch_layout_;
  using Base::v_steps_;
  using typename Base::View;

 public:
  using Base::Base;

 private:
  // Whether the forward formed its scores without packing. With rounded weights it does not matter.
  const bool is_direct_ = !Compute::kRoundsWeights && has_few_queries(params_);

  // P^T and dS^T for the key groups of `seen`.
  RAL_INLINE void differentiate(const ScoreTransform<V>& transform, const Sequence& s,
                                const View& v, int64_t kv_head, GroupRange seen,
                                uint32_t* scratch) const {
    if (is_direct_) unpack_few_queries(v, scratch);
    for (int64_t panel = 0; panel < kPanels; ++panel) {  // outside: a panel of Q and dO stays in L1
      for (int64_t group = seen.begin; group < seen.end; ++group) {
        const GroupRange panel_seen = groups_of_keys(
            v.block.some_first[panel], v.block.some_last[panel], GroupRange{group, group + 1});
        if (panel_seen.begin == panel_seen.end) {
          clear_tile(group - seen.begin, panel, scratch);
        } else {
          differentiate_tile(transform, s, v, kv_head, panel, group, group - seen.begin, scratch);
        }
      }
    }
  }

  void clear_tile(int64_t row_group, int64_t panel, uint32_t* scratch) const {
    Vec zero[kTileRows][V];
    clear(zero);
    store_ds(zero, row_group, panel, scratch);
    if (has_dout_)
      Compute::store_rows(zero, rows_tile(scratch_layout_.p_rows, row_group, panel, scratch),
                          kColumnSteps);
  }

  RAL_INLINE void store_ds(const Vec (&ds)[kTileRows][V], int64_t row_group, int64_t panel,
                           uint32_t* scratch) const {
    Compute::store_rows_and_pairs(
        ds, rows_tile(scratch_layout_.ds_rows, row_group, panel, scratch), kColumnSteps,
        scratch + scratch_layout_.ds_pairs + row_group * kStepsPerGroup * kColumns + panel * kWidth,
        kColumns);
  }

  // P^T and dS^T of one tile, equations (5), (9) and (11).
  RAL_INLINE void differentiate_tile(const ScoreTransform<V>& transform, const Sequence& s,
                                     const View& view, int64_t kv_head, int64_t panel,
                                     int64_t group, int64_t row_group, uint32_t* scratch) const {
    const int64_t index = problem_.groups_before(s, kv_head) + group;
    const int64_t column = panel * kWidth;
    if (view.dmarginals) this->prefetch_dmarginals(s, view, group, column);
    alignas(64) float probs[kTileRows][kWidth];
    Vec slope[kTileRows * V];
    {
      Vec p[kTileRows][V];
      clear(p);
      const uint32_t* q = view.q_columns + panel * round_up(qk_steps_, kLanes) * kWidth;
      if (__builtin_expect(is_direct_, 0)) {
        multiply_directly(s, kv_head, group, view.block.count, scratch, p);
      } else {
        multiply_tile<Compute, AOperand::kPacked, kTileRows, V>(
            p, this->key_rows_ + index * kTileRows * qk_steps_, 0, q, kWidth, qk_steps_);
      }
      float factor = params_.scale;
      if (__builtin_expect(!transform.is_plain(view.block, panel, group), 0)) {
        transform.apply(p, view.block, panel, group, params_.scale, view.bias, kColumns, slope);
        factor = 1.f;
        // If every score is about finfo.min, lse is too coarse to subtract. min() keeps P at 1 or
        // below.
        for (int v = 0; v < V; ++v) {
          for (int r = 0; r < kTileRows; ++r)
            p[r][v] = min(p[r][v], load(view.lse + column + v * kLanes));
        }
      }
      RAL_UNROLL for (int v = 0; v < V; ++v) {
        const Vec lse = load(view.lse + column + v * kLanes);
        RAL_UNROLL for (int r = 0; r < kTileRows; ++r) {
          // Rounded as in the forward: a weight of 1 is then exp2(0).
          p[r][v] = exp2((rounded(p[r][v] * factor) - lse) * kLog2e);
          store(probs[r] + v * kLanes, p[r][v]);
        }
      }
      if (has_dout_) {
        Compute::store_rows(p, rows_tile(scratch_layout_.p_rows, row_group, panel, scratch),
                            kColumnSteps);
      }
    }
    Vec ds[kTileRows][V];
    clear(ds);
    if (has_dout_) {
      multiply_tile<Compute, AOperand::kPacked, kTileRows, V>(
          ds, this->value_rows_ + index * kTileRows * v_steps_, 0,
          view.dout_columns + panel * round_up(v_steps_, kLanes) * kWidth, kWidth, v_steps_);
    }
    const int32_t span = view.dmarginals || view.dbias ? problem_.group_spans(s)[group] : -1;
    if (__builtin_expect(span != Problem::kMixed, 1)) {
      const float* dm =
          view.dmarginals && span >= 0 ? view.dmarginals + span * kColumns + column : nullptr;
      RAL_UNROLL for (int v = 0; v < V; ++v) {
        Vec shift = -load(view.delta + column + v * kLanes);
        if (dm) shift += load(dm + v * kLanes);
        RAL_UNROLL for (int r = 0; r < kTileRows; ++r)
          ds[r][v] = load(probs[r] + v * kLanes) * (ds[r][v] + shift);
      }
      if (view.dbias) {
        float* dbias = dbias_of(span, column, scratch);
        const auto add = [](float* sum, const auto& of_row) {
          store(sum, load(sum) + (((of_row(0) + of_row(1)) + (of_row(2) + of_row(3))) +
                                  (of_row(4) + of_row(5))));
        };
        for (int v = 0; v < V; ++v) {
          add(dbias + v * kLanes, [&](int r) { return ds[r][v]; });
          add(dbias + kColumns + v * kLanes, [&](int r) { return load(probs[r] + v * kLanes); });
        }
      }
    } else {
      const int32_t* ids = problem_.span_ids(s) + group * kTileRows;
      RAL_UNROLL for (int r = 0; r < kTileRows; ++r) {
        const int32_t key_span = group * kTileRows + r < s.seqlen_k ? ids[r] : -1;
        const float* dm = view.dmarginals && key_span >= 0
                              ? view.dmarginals + key_span * kColumns + column
                              : kNoGradient;
        RAL_UNROLL for (int v = 0; v < V; ++v) {
          const Vec shift = load(dm + v * kLanes) - load(view.delta + column + v * kLanes);
          ds[r][v] = load(probs[r] + v * kLanes) * (ds[r][v] + shift);
        }
      }
      if (view.dbias)
        add_mixed_bias(ids, s.seqlen_k - group * kTileRows, column, ds, probs, scratch);
    }
    if (params_.softcap > 0) {
      for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < V; ++v) ds[r][v] = ds[r][v] * slope[r * V + v];
      }
    }
    store_ds(ds, row_group, panel, scratch);
  }

  // Rows of queries, as multiply_keys takes them.
  void unpack_few_queries(const View& view, uint32_t* scratch) const {
    const int64_t ld = round_up(params_.head_dim, kLanes);
    float* rows = reinterpret_cast<float*>(scratch + scratch_layout_.few_queries);
    const float* columns = reinterpret_cast<const float*>(view.q_columns);
    for (int64_t i = 0; i < kFewQueries; ++i) {
      for (int64_t d = 0; d < ld; ++d) rows[i * ld + d] = columns[d * kWidth + i];
    }
  }

  // K Q^T of one tile, with the bits that the forward without packing gave it.
  RAL_NOINLINE void multiply_directly(const Sequence& s, int64_t kv_head, int64_t group,
                                      int64_t count, uint32_t* scratch,
                                      Vec (&products)[kTileRows][V]) const {
    static_assert(kWidth >= kFewQueries, "all are in the first panel");
    constexpr int64_t kQueries = kLanes < kFewQueries ? kLanes : kFewQueries;
    const Rows keys = problem_.key_rows(params_.k, s, kv_head);
    const Rows real = problem_.real_key_rows(params_.k, s, kv_head);
    const int64_t ld = round_up(params_.head_dim, kLanes);
    const float* rows = reinterpret_cast<const float*>(scratch + scratch_layout_.few_queries);
    for (int64_t first = 0; first < count; first += kQueries) {
      alignas(64) float scores[kTileRows][kLanes] = {};
      with_dtype(params_.dtype, [&](auto dtype) {
        multiply_keys<dtype>(keys, group * kTileRows, params_.head_dim, rows + first * ld, ld,
                             count - first < kQueries ? count - first : kQueries, scores);
      });
      for (int r = 0; r < kTileRows; ++r) {
        const bool is_read = real.row(group * kTileRows + r) != nullptr;
        products[r][first / kLanes] = is_read ? load(scores[r]) : Vec{};
      }
    }
  }

  float* dbias_of(int32_t span, int64_t column, uint32_t* scratch) const {
    return reinterpret_cast<float*>(scratch + scratch_layout_.dbias) +
           this->queries_.bias_row(span) * kBiasColumns + column;
  }

  // Span sums of dS^T and P^T on a tile with a span boundary.
  RAL_NOINLINE void add_mixed_bias(const int32_t* ids, int64_t num_keys, int64_t column,
                                   const Vec (&ds)[kTileRows][V],
                                   const float (&probs)[kTileRows][kWidth],
                                   uint32_t* scratch) const {
    for (int r = 0; r < kTileRows && r < num_keys; ++r) {
      float* sums = dbias_of(ids[r], column, scratch);
      for (int64_t v = 0; v < kWidth; v += kLanes) {
        store(sums + v, load(sums + v) + ds[r][v / kLanes]);
        store(sums + kColumns + v, load(sums + kColumns + v) + load(probs[r] + v));
      }
    }
  }

  // dV += P^T dO, or dK += dS^T Q, for the key groups of `seen`.
  void accumulate_keys(GroupRange seen, int64_t first_group, const uint32_t* b, const uint32_t* a,
                       int64_t features, int64_t padded, float* gradient) const {
    for (int64_t feature = 0; feature < features; feature += kPanel) {
      for (int64_t group = seen.begin; group < seen.end; ++group) {
        const Product product{a + (group - seen.begin) * kTileRows * kColumnSteps, kColumnSteps,
                              b + feature * kColumnSteps, kPanel, kColumnSteps};
        accumulate_panel<Compute, AOperand::kRowMajor>(
            kTileRows, features - feature,
            gradient + (group - first_group) * kTileRows * padded + feature, padded, true, product);
      }
    }
  }

  // dQ^T += K^T dS^T.
  RAL_INLINE void accumulate_queries(const Sequence& s, const View& v, int64_t kv_head,
                                     GroupRange seen, bool add, uint32_t* scratch) const {
    const FeatureRows::Place place = this->key_layout(s).find(seen.begin * kStepsPerGroup);
    const uint32_t* keys = this->key_columns_of(s, kv_head);
    for (int64_t panel = 0; panel < kPanels; ++panel) {
      for (int64_t g = 0; g < this->k_feature_groups_; ++g) {
        const int64_t d = g * kTileRows;
        const Product product{keys + place.offset + g * place.group_stride, 0,
                              scratch + scratch_layout_.ds_pairs + panel * kWidth, kColumns,
                              (seen.end - seen.begin) * kStepsPerGroup};
        const int64_t rows = params_.head_dim - d < kTileRows ? params_.head_dim - d : kTileRows;
        accumulate_rows<Compute, AOperand::kPacked, V>(rows, v.dq + d * kColumns + panel * kWidth,
                                                       kColumns, add, product);
      }
    }
  }
};

}  // namespace RAL_ISA
}  // namespace ral
