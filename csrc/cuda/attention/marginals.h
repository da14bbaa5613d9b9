// Span sums of a warp's weights, taken from the registers that hold a block's weights.
#pragma once

#include "core/keys.h"
#include "core/softmax.h"
#include "core/tiles.h"

namespace ral {
namespace cuda {

// Where a warp's marginals go.
struct MarginalRows {
  float* data;          // [.., num_spans], from the warp's first row on
  int32_t first, stop;  // rows of the warp that have marginals; none unless first < stop
};

// The marginals of a warp's rows while it walks over the keys.
//
// A lane sums its own columns while the span stays the same: this is a run. When the span changes,
// the lanes of a row add up their runs, and one of them keeps the sum. It goes to global memory as
// log2 of its value at the row's stabiliser, so no later maximum has to rescale it. At the end it
// becomes a share of the row.
template <int kRowTiles>
struct Marginals {
  static constexpr int kRows = 2 * kRowTiles;  // per lane
  int32_t num_spans;                           // 0 = marginals are not wanted
  float* own;                                  // the row that the lane writes, or null
  int32_t span;                                // of the current run
  int32_t highest;  // largest span written so far; a larger one need not be read back
  float run[kRows];
  int32_t closed_span;  // of a run that has ended and is to be written; -1 = none
  float closed[kRows];

  RAL_DEVICE void begin(const MarginalRows& where, int32_t spans) {
    num_spans = spans;
    span = highest = closed_span = -1;
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      run[i] = 0.0f;
    const int32_t row = row_in_warp(lane_index() % 4);
    const bool writes = lane_index() % 4 < kRows && row >= where.first && row < where.stop;
    own = writes ? where.data + int64_t(row) * num_spans : nullptr;
    for (int32_t r = where.first; r < where.stop; ++r)
      for (int32_t s = lane_index(); s < num_spans; s += kWarpSize)
        store_global(where.data + int64_t(r) * num_spans + s, minus_infinity());
    sync_warp();
  }

  // What add() needs to know of a block's borders. A border is a key whose span is not that of the
  // key before it. They depend on no weight, so they are found while the scores' product runs.
  struct Borders {
    int32_t first;  // kBlockK = none
    int32_t next;   // the span that begins there
    bool many;
  };
  RAL_DEVICE Borders find_borders(const KeyBlock& keys) const {
    if (num_spans == 0) return {kBlockK, -1, false};
    const int32_t next = keys.span_of(0);
    const uint32_t low = uint32_t(keys.starts) & (next == span ? ~1u : ~0u);
    const uint32_t high = uint32_t(keys.starts >> 32);
    const uint32_t word = low != 0 ? low : high;
    if (word == 0) return {kBlockK, -1, false};
    const int32_t first = lowest_bit(word) + (low != 0 ? 0 : 32);
    return {first, keys.span_of(first), (word & (word - 1)) != 0 || (low != 0 && high != 0)};
  }

  // Adds a block of keys. p: its weights, relative to the rows' maxima m; sum: the lane's parts of
  // its row sums; alpha rescales from the maxima before. Call write_closed(m) before m changes.
  RAL_DEVICE void add(const float (&p)[kRowTiles][kBlockK / 8][4], const KeyBlock& keys,
                      const Borders& borders, const float (&sum)[kRows],
                      const float (&alpha)[kRows], const float (&m)[kRows]) {
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      run[i] *= alpha[i];
    if (keys.is_one_span()) {
      if (borders.first == 0) close(borders.next);
      RAL_UNROLL for (int i = 0; i < kRows; ++i)
        run[i] += sum[i];
    } else if (!borders.many) {
      add_two(p, borders.first >> 3, borders.first & 7, borders.next);
    } else if (~keys.starts == 0 && is_new_and_ascends(keys)) {
      write_each(p, keys, m);
    } else {
      add_spans(p, keys, keys.starts & ~uint64_t(borders.first == 0 ? 0 : 1), m);
    }
  }

  // Writes the run that has ended. m: the rows' maxima.
  RAL_DEVICE void write_closed(const float (&m)[kRows]) {
    if (closed_span < 0) return;
    float total = stabiliser(of_own_row(m)) + log2(quad_sum_of_own(closed));
    if (closed_span <= highest) {
      sync_warp();  // write_each may have written it in another lane
      if (own != nullptr) total = add_in_log2(total, load_global(own + closed_span));
    }
    if (own != nullptr) store_global(own + closed_span, total);
    highest = maximum(highest, closed_span);
    closed_span = -1;
  }

  // Closes the last run and turns sums into shares. lse_log2: of the lane's rows.
  RAL_DEVICE void end(const MarginalRows& where, const float (&lse_log2)[kRows],
                      const float (&m)[kRows]) {
    close(-1);
    write_closed(m);
    sync_warp();
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
  // The lane's sums of keys [begin, end) of column tile c, in every row.
  RAL_DEVICE static void add_keys(float (&sum)[kRows], const float (&p)[kRowTiles][kBlockK / 8][4],
                                  int c, int begin, int end) {
    const int mine = 2 * (lane_index() % 4);
    RAL_UNROLL for (int e = 0; e < 2; ++e) RAL_UNROLL
      for (int i = 0; i < kRows; ++i)
        if (mine + e >= begin && mine + e < end) sum[i] += p[i / 2][c][i % 2 * 2 + e];
  }

  // Adds a block with one border, `border` keys after the start of tile c. kFirst to kLast: the
  // tiles that c may be: a tree of branches, whose leaves only add.
  template <int kFirst = 0, int kLast = kBlockK / 8 - 1>
  RAL_DEVICE void add_two(const float (&p)[kRowTiles][kBlockK / 8][4], int c, int border,
                          int32_t next) {
    if constexpr (kFirst < kLast) {
      constexpr int kMiddle = (kFirst + kLast) / 2;
      if (c <= kMiddle)
        add_two<kFirst, kMiddle>(p, c, border, next);
      else
        add_two<kMiddle + 1, kLast>(p, c, border, next);
    } else {
      float after[kRows];
      RAL_UNROLL for (int i = 0; i < kRows; ++i)
        after[i] = 0.0f;
      RAL_UNROLL for (int tile = 0; tile < kBlockK / 8; ++tile) {
        if (tile <= kFirst) add_keys(run, p, tile, 0, tile == kFirst ? border : 8);
        if (tile >= kFirst) add_keys(after, p, tile, tile == kFirst ? border : 0, 8);
      }
      close(next);
      RAL_UNROLL for (int i = 0; i < kRows; ++i)
        run[i] = after[i];
    }
  }

  // Adds a block with any borders: each is the first key of a span.
  RAL_DEVICE void add_spans(const float (&p)[kRowTiles][kBlockK / 8][4], const KeyBlock& keys,
                            uint64_t all, const float (&m)[kRows]) {
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) {
      uint32_t borders = uint32_t(all >> 8 * c) & 0xff;
      int begin = 0;
      if (borders == 0) {
        add_keys(run, p, c, 0, 8);
        continue;
      }
      do {
        const int border = lowest_bit(borders);
        add_keys(run, p, c, begin, border);
        write_closed(m);
        close(keys.span_of(8 * c + border));
        begin = border;
        borders &= borders - 1;
      } while (borders != 0);
      add_keys(run, p, c, begin, 8);
    }
  }

  // Whether the spans of a block's keys ascend, and none was written before.
  RAL_DEVICE bool is_new_and_ascends(const KeyBlock& keys) const {
    const int lane = lane_index();
    const int32_t before_low = shuffle_up(keys.low, 1), last_low = keys.span_of(31);
    const int32_t within_high = shuffle_up(keys.high, 1);
    const bool ascends = keys.low > (lane == 0 ? maximum(highest, span) : before_low) &&
                         keys.high > (lane == 0 ? last_low : within_high);
    return ballot(!ascends) == 0;
  }

  // Adds a block of spans of one key, which are all new: each weight is a sum.
  RAL_DEVICE void write_each(const float (&p)[kRowTiles][kBlockK / 8][4], const KeyBlock& keys,
                             const float (&m)[kRows]) {
    close(-1);  // nothing of these spans is left to write
    write_closed(m);
    highest = keys.span_of(kBlockK - 1);
    const uint64_t address = reinterpret_cast<uint64_t>(own);
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const int owner = (lane_index() & ~3) + i;
      float* row =
          reinterpret_cast<float*>(uint64_t(shuffle(uint32_t(address), owner)) |
                                   uint64_t(shuffle(uint32_t(address >> 32), owner)) << 32);
      RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int32_t key_span = keys.span_of_column(c, e);
          if (row != nullptr)
            store_global(row + key_span, stabiliser(m[i]) + log2(p[i / 2][c][i % 2 * 2 + e]));
        }
    }
  }

  // Ends the run, and begins one of span `next`. The closed one is to be written.
  RAL_DEVICE void close(int32_t next) {
    closed_span = span;
    span = next;
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      closed[i] = run[i];
      run[i] = 0.0f;
    }
  }
};

}  // namespace cuda
}  // namespace ral
