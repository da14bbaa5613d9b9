// The gradient of span_bias (12), (16): sums of a warp's gradients of scores over spans.
#pragma once

#include "attention/bwd_scores.h"
#include "attention/marginals.h"

namespace ral {
namespace cuda {

// Sums over spans of a warp's 16 queries while it walks over the keys, as Marginals: runs of a span
// are summed in registers. What comes back is added to what was stored, in the order of the keys.
struct SpanSums {
  static constexpr int kRows = 2;
  int32_t span;     // of the current run
  int32_t highest;  // largest span stored so far; a larger one need not be read back
  float run[kRows];

  RAL_DEVICE SpanSums() : span(-1), highest(-1), run{} {}

  // x: of a block. row_of(r) is where the sums of the warp's row r are, or null. Calls
  // ended(i, sum) for each run of row_in_warp(i).
  template <typename RowOf, typename Ended>
  RAL_DEVICE void add(const float (&x)[1][kBlockK / 8][4], const KeyBlock& keys,
                      const RowOf& row_of, const Ended& ended) {
    uint64_t starts = keys.starts;
    for (int first = 0; first < kBlockK;) {
      starts &= starts - 1;
      const int end = starts == 0 ? kBlockK : lowest_bit(starts);
      const int32_t next = keys.span_of(first);
      if (next != span) {
        flush(row_of, ended);
        span = next;
      }
      add_columns(run, x, first, end);
      first = end;
    }
  }

  template <typename RowOf, typename Ended>
  RAL_DEVICE void flush(const RowOf& row_of, const Ended& ended) {
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      float sum = quad_sum(run[i]);
      ended(i, sum);
      float* const row = row_of(row_in_warp(i));
      if (span >= 0 && lane_index() % 4 == i && row != nullptr) {
        if (span <= highest) sum += load_global(row + span);
        store_global(row + span, sum);
      }
      run[i] = 0.0f;
    }
    highest = maximum(highest, span);
  }
};

// The rows of dspan_bias of a warp's 16 queries.
template <bool kGeneral>
struct SpanBiasGradient {
  static constexpr int kRows = SpanSums::kRows;
  const AttentionBwdParams& params;
  const QueriesWithGradient& block;
  const int warp_row;           // the warp's first query in the CTA
  SpanSums gradients, weights;  // of ds and of p
  float excess;  // of a row's sum of ds over dlse; lane i of a quad has that of its row i

  // A sync_block lies between it and the first sums.
  RAL_DEVICE SpanBiasGradient(const AttentionBwdParams& params, const QueriesWithGradient& block,
                              int warp_row)
      : params(params), block(block), warp_row(warp_row), excess(0.0f) {
    if (!is_wanted()) return;
    const int32_t mine = row_in_warp(lane_index() % 2);
    if (params.gradients.dlse != nullptr && mine < num_rows())
      excess = -load_global(params.gradients.dlse + first_row() + mine);
    for (int32_t r = 0; r < num_rows(); ++r)
      for (int32_t s = lane_index(); s < params.call.num_spans; s += kWarpSize) {
        store_global(sums_of(r) + s, 0.0f);
        store_global(weights_of(r) + s, 0.0f);
      }
  }

  // p: of a block's scores (5).
  RAL_DEVICE void add_weights(const float (&p)[1][kBlockK / 8][4], const KeyBlock& keys) {
    if (!is_wanted()) return;
    weights.add(p, keys, [&](int32_t r) { return weights_of(r); }, [](int, float) {});
  }

  // ds: of a block's scores (11).
  RAL_DEVICE void add(const float (&ds)[1][kBlockK / 8][4], const KeyBlock& keys) {
    if (!is_wanted()) return;
    gradients.add(
        ds, keys, [&](int32_t r) { return sums_of(r); }, [&](int i, float sum) { count(i, sum); });
  }

  // Closes the last runs and corrects the rows (16). A weight of 0 has gradient 0, as in
  // gradient_of_score.
  RAL_DEVICE void end() {
    if (!is_wanted()) return;
    weights.flush([&](int32_t r) { return weights_of(r); }, [](int, float) {});
    gradients.flush([&](int32_t r) { return sums_of(r); },
                    [&](int i, float sum) { count(i, sum); });
    sync_warp();
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      for (int r = 0; r < 8; ++r) {
        const float of_row = shuffle(excess, 4 * r + i);
        const int32_t row = 8 * i + r;
        if (row >= num_rows()) continue;
        float* const sums = sums_of(row);
        for (int32_t s = lane_index(); s < params.call.num_spans; s += kWarpSize) {
          const float weight = load_global(weights_of(row) + s);
          if (weight != 0.0f) store_global(sums + s, load_global(sums + s) - weight * of_row);
        }
      }
  }

 private:
  RAL_DEVICE bool is_wanted() const {
    return params.gradients.dspan_bias != nullptr && block.share == 0;
  }
  RAL_DEVICE int32_t num_rows() const { return minimum(block.num_queries - warp_row, 8 * kRows); }
  RAL_DEVICE void count(int i, float sum) {
    if (lane_index() % 4 == i) excess += sum;
  }

  // The warp's first query among all, formed where it is used, for want of registers.
  RAL_DEVICE int64_t first_row() const {
    const ral_attention_params& call = params.call;
    const int32_t token = opaque(int32_t(block.first_token) + warp_row);
    return (block.b * call.num_heads + block.h) * call.seqlen_q + token;
  }
  RAL_DEVICE float* sums_of(int32_t row) const { return row_of(params.gradients.dspan_bias, row); }
  RAL_DEVICE float* weights_of(int32_t row) const { return row_of(params.span_weights, row); }
  RAL_DEVICE float* row_of(float* all, int32_t row) const {
    return row < num_rows() ? all + (first_row() + row) * params.call.num_spans : nullptr;
  }
};
template <>
struct SpanBiasGradient<false> {
  RAL_DEVICE SpanBiasGradient(const AttentionBwdParams&, const QueriesWithGradient&, int) {}
  template <typename S>
  RAL_DEVICE void add_weights(const S&, const KeyBlock&) {}
  template <typename S>
  RAL_DEVICE void add(const S&, const KeyBlock&) {}
  RAL_DEVICE void end() {}
};

}  // namespace cuda
}  // namespace ral
