// The gradient of span_bias (12): sums of a warp's gradients of scores over spans.
#pragma once

#include "attention/bwd_scores.h"
#include "attention/marginals.h"

namespace ral {
namespace cuda {

// A warp's 16 queries while it walks over the keys, as Marginals: runs of a span are summed in
// registers. What comes back is added to what was stored, in the order of the keys.
template <bool kGeneral>
struct SpanBiasGradient {
  static constexpr int kRows = 2;
  float* rows;  // [.., num_spans], from the warp's first query on; null: not wanted
  int32_t num_rows, num_spans;
  int32_t span;     // of the current run
  int32_t highest;  // largest span stored so far; a larger one need not be read back
  float run[kRows];

  // A sync_block lies between it and `add`.
  RAL_DEVICE void begin(const AttentionBwdParams& params, const QueriesWithGradient& block,
                        int warp_row) {
    const ral_attention_params& call = params.call;
    rows = params.gradients.dspan_bias;
    num_spans = int32_t(call.num_spans);
    num_rows = minimum(block.num_queries - warp_row, 8 * kRows);
    span = highest = -1;
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      run[i] = 0.0f;
    if (rows == nullptr) return;
    const int64_t row =
        (block.b * call.num_heads + block.h) * call.seqlen_q + block.first_token + warp_row;
    rows += row * num_spans;
    for (int32_t r = 0; r < num_rows; ++r)
      for (int32_t s = lane_index(); s < num_spans; s += kWarpSize)
        store_global(rows + int64_t(r) * num_spans + s, 0.0f);
  }

  // ds: of a block's scores (11).
  RAL_DEVICE void add(const float (&ds)[1][kBlockK / 8][4], const KeyBlock& keys) {
    if (rows == nullptr) return;
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
      first = end;
    }
  }

  // Closes the last run.
  RAL_DEVICE void end() {
    if (rows != nullptr) flush();
  }

 private:
  RAL_DEVICE void flush() {
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      float sum = quad_sum(run[i]);
      const int32_t row = row_in_warp(i);
      if (span >= 0 && lane_index() % 4 == i && row < num_rows) {
        float* address = rows + int64_t(row) * num_spans + span;
        if (span <= highest) sum += load_global(address);
        store_global(address, sum);
      }
      run[i] = 0.0f;
    }
    highest = maximum(highest, span);
  }
};
template <>
struct SpanBiasGradient<false> {
  RAL_DEVICE void begin(const AttentionBwdParams&, const QueriesWithGradient&, int) {}
  RAL_DEVICE void add(const float (&)[1][kBlockK / 8][4], const KeyBlock&) {}
  RAL_DEVICE void end() {}
};

}  // namespace cuda
}  // namespace ral
