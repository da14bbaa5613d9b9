// Span sums of a warp's weights, taken from the registers that hold a block's weights.
#pragma once

#include "core/keys.h"
#include "core/softmax.h"
#include "core/tiles.h"

namespace ral {
namespace cuda {

// Where a warp's marginals go. It lies in shared memory because registers are scarce and it is read
// rarely.
struct alignas(16) MarginalRows {
  float* data;          // [.., num_spans], from the warp's first row on
  int32_t first, stop;  // rows of the warp that have marginals
};

// Adds columns [begin, end) of a block of numbers to the lane's part of each row's sum.
template <int kRowTiles>
RAL_DEVICE void add_columns(float (&sums)[2 * kRowTiles],
                            const float (&x)[kRowTiles][kBlockK / 8][4], int begin, int end) {
  const int mine = 2 * (lane_index() % 4);
  RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int column = 8 * c + e + mine;
      if (column < begin || column >= end) continue;
      RAL_UNROLL for (int i = 0; i < 2 * kRowTiles; ++i)
        sums[i] += x[i / 2][c][i % 2 * 2 + e];
    }
}

// The marginals of a warp's rows while it walks over the keys.
//
// A lane sums its own columns while the span stays the same: this is a run. When the span changes,
// the lanes of a row add up their runs. The sum goes to global memory as log2 of its value at the
// row's stabiliser, so no later maximum has to rescale it. At the end it becomes a share of the
// row.
template <int kRowTiles>
struct Marginals {
  static constexpr int kRows = 2 * kRowTiles;  // per lane
  const MarginalRows* rows;                    // in shared memory; the warp owns it
  int32_t num_spans;                           // 0 = marginals are not wanted
  int32_t span;                                // of the current run
  int32_t highest;  // largest span written so far; a larger one need not be read back
  float run[kRows];

  // `at`: 16 bytes of shared memory that the warp owns.
  RAL_DEVICE void begin(MarginalRows* at, const MarginalRows& where, int32_t spans) {
    rows = at;
    num_spans = spans;
    span = highest = -1;
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      run[i] = 0.0f;
    if (lane_index() == 0) store_shared(at, where);
    for (int32_t row = where.first; row < where.stop; ++row)
      for (int32_t s = lane_index(); s < num_spans; s += kWarpSize)
        store_global(where.data + int64_t(row) * num_spans + s, minus_infinity());
    sync_warp();
  }

  // Call it before the block's weights are formed. m is the rows' maximum so far.
  RAL_DEVICE void enter(const KeyBlock& keys, const float (&m)[kRows]) {
    const int32_t next = keys.span_of(0);
    if (next == span) return;
    flush(m);
    span = next;
  }

  // The row's stabiliser has grown, and alpha rescales the run. sum: the lane's part of the row sum
  // of the block's weights. It is all there is to add if the block is in one span.
  RAL_DEVICE void scale_and_add(int i, float alpha, float sum, const KeyBlock& keys) {
    run[i] = run[i] * alpha + (keys.is_one_span() ? sum : 0.0f);
  }

  // Call it after scale_and_add if the block is in several spans. p: the block's weights; m: the
  // rows' maximum, with the block.
  RAL_DEVICE void add_spans(const float (&p)[kRowTiles][kBlockK / 8][4], const KeyBlock& keys,
                            const float (&m)[kRows]) {
    uint64_t starts = keys.starts;
    for (int begin = 0; begin < kBlockK;) {
      starts &= starts - 1;
      const int end = starts == 0 ? kBlockK : lowest_bit(starts);
      const int32_t next = keys.span_of(begin);
      if (next != span) {
        flush(m);
        span = next;
      }
      add_columns(run, p, begin, end);
      begin = end;
    }
  }

  // Closes the last run and turns sums into shares. lse_log2: of the lane's rows.
  RAL_DEVICE void end(const float (&lse_log2)[kRows], const float (&m)[kRows]) {
    flush(m);
    sync_warp();
    const MarginalRows where = load_shared(rows);
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      for (int r = 0; r < 8; ++r) {
        const float lse = shuffle(lse_log2[i], 4 * r);
        const int32_t row = 8 * i + r;
        if (row < where.first || row >= where.stop) continue;
        float* share = where.data + int64_t(row) * num_spans;
        for (int32_t s = lane_index(); s < num_spans; s += kWarpSize)
          store_global(share + s, exp2(load_global(share + s) - stabiliser(lse)));
      }
  }

 private:
  RAL_DEVICE void flush(const float (&m)[kRows]) {
    if (span >= 0) {
      const MarginalRows where = load_shared(rows);
      RAL_UNROLL for (int i = 0; i < kRows; ++i) {
        const float sum = quad_sum(run[i]);
        const int32_t row = row_in_warp(i);
        if (lane_index() % 4 == i % 4 && row >= where.first && row < where.stop && sum > 0.0f) {
          float* address = where.data + int64_t(row) * num_spans + span;
          float total = stabiliser(m[i]) + log2(sum);
          if (span <= highest) total = add_in_log2(total, load_global(address));
          store_global(address, total);
        }
      }
      highest = maximum(highest, span);
    }
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      run[i] = 0.0f;
  }
};

}  // namespace cuda
}  // namespace ral
