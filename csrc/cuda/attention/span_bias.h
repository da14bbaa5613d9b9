// The gradient of span_bias (12), (16): sums of a warp's gradients of scores over spans.
#pragma once

#include "attention/bwd_scores.h"
#include "attention/marginals.h"

namespace ral {
namespace cuda {

// A warp's 16 queries while it walks over the keys, as Marginals: runs of a span are summed in
// registers. What comes back is added to what was stored, in the order of the keys. Weights are
// summed alike, for (16).
template <bool kGeneral>
struct SpanBiasGradient {
  static constexpr int kRows = 2;
  const AttentionBwdParams* params;
  int64_t offset;  // of the warp's first query in dspan_bias and span_weights
  int32_t num_rows;
  int32_t span;     // of the current run
  int32_t highest;  // largest span stored so far; a larger one need not be read back
  float run[kRows], run_of_weights[kRows];
  float excess;  // of a row's sum of ds over dlse; lane i of a quad has that of its row i

  // A sync_block lies between it and `add`.
  RAL_DEVICE void begin(const AttentionBwdParams& all, const QueriesWithGradient& block,
                        int warp_row) {
    params = &all;
    const ral_attention_params& call = params->call;
    num_rows = minimum(block.num_queries - warp_row, 8 * kRows);
    span = highest = -1;
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      run[i] = run_of_weights[i] = 0.0f;
    excess = 0.0f;
    if (!is_wanted()) return;
    const int64_t row =
        (block.b * call.num_heads + block.h) * call.seqlen_q + block.first_token + warp_row;
    offset = row * call.num_spans;
    const int32_t mine = row_in_warp(lane_index() % 2);
    if (params->gradients.dlse != nullptr && mine < num_rows)
      excess = -load_global(params->gradients.dlse + row + mine);
    for (int32_t r = 0; r < num_rows; ++r)
      for (int32_t s = lane_index(); s < call.num_spans; s += kWarpSize) {
        store_global(sums(r, s), 0.0f);
        store_global(weights(r, s), 0.0f);
      }
  }

  // p, ds: of a block's scores (5), (11).
  RAL_DEVICE void add(const float (&p)[1][kBlockK / 8][4], const float (&ds)[1][kBlockK / 8][4],
                      const KeyBlock& keys) {
    if (!is_wanted()) return;
    uint64_t starts = keys.starts;
    for (int first = 0; first < kBlockK;) {
      starts &= starts - 1;
      const int end = starts == 0 ? kBlockK : lowest_bit(starts);
      const int32_t next = keys.span_of(first);
      if (next != span) {
        flush();
        span = next;
      }
      add_columns(run, ds, first, end);
      add_columns(run_of_weights, p, first, end);
      first = end;
    }
  }

  // Closes the last run and corrects the rows (16). A weight of 0 has gradient 0, as in
  // gradient_of_score.
  RAL_DEVICE void end() {
    if (!is_wanted()) return;
    flush();
    sync_warp();
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      for (int r = 0; r < 8; ++r) {
        const float of_row = shuffle(excess, 4 * r + i);
        const int32_t row = 8 * i + r;
        if (row >= num_rows) continue;
        for (int32_t s = lane_index(); s < params->call.num_spans; s += kWarpSize) {
          const float weight = load_global(weights(row, s));
          if (weight != 0.0f)
            store_global(sums(row, s), load_global(sums(row, s)) - weight * of_row);
        }
      }
  }

 private:
  RAL_DEVICE bool is_wanted() const { return params->gradients.dspan_bias != nullptr; }

  // Of a row and a span.
  RAL_DEVICE float* sums(int32_t row, int32_t s) const {
    return params->gradients.dspan_bias + offset + row * params->call.num_spans + s;
  }
  RAL_DEVICE float* weights(int32_t row, int32_t s) const {
    return params->span_weights + offset + row * params->call.num_spans + s;
  }

  RAL_DEVICE void flush() {
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      float sum = quad_sum(run[i]), weight = quad_sum(run_of_weights[i]);
      const int32_t row = row_in_warp(i);
      if (lane_index() % 4 == i) excess += sum;
      if (span >= 0 && lane_index() % 4 == i && row < num_rows) {
        if (span <= highest) {
          sum += load_global(sums(row, span));
          weight += load_global(weights(row, span));
        }
        store_global(sums(row, span), sum);
        store_global(weights(row, span), weight);
      }
      run[i] = run_of_weights[i] = 0.0f;
    }
    highest = maximum(highest, span);
  }
};
template <>
struct SpanBiasGradient<false> {
  RAL_DEVICE void begin(const AttentionBwdParams&, const QueriesWithGradient&, int) {}
  template <typename S>
  RAL_DEVICE void add(const S&, const S&, const KeyBlock&) {}
  RAL_DEVICE void end() {}
};

}  // namespace cuda
}  // namespace ral
