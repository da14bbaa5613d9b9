// Span sums of a warp's 16 rows in the forward for Hopper: the same bits as Marginals<1> gives, in
// fewer instructions and with more registers.
#pragma once

#include "attention/marginals.h"

namespace ral {
namespace cuda {

// What a block of keys adds is summed without a look at each key. A run that has ended is kept, and
// written where the kernel waits for products.
struct MarginalsSm90 : Marginals<1> {
  using Base = Marginals<1>;
  using Weights = float[1][kBlockK / 8][4];
  float* own;           // the row that the lane writes, or null
  int32_t closed_span;  // of a run that has ended and is to be written; -1 = none
  float closed[kRows];

  // What add() needs to know of a block. A border is a key whose span is not that of the key before
  // it, in the block.
  struct Borders {
    enum { kNone, kOne, kMany, kEachKeyOfNewSpans } are;
    int32_t first;  // if it is one
    int32_t next;   // the span that begins there
  };

  RAL_DEVICE void begin(MarginalRows* at, const MarginalRows& where, int32_t spans) {
    Base::begin(at, where, spans);
    closed_span = -1;
    const int32_t row = row_in_warp(lane_index() % 4);
    const bool writes = lane_index() % 4 < kRows && row >= where.first && row < where.stop;
    own = writes ? where.data + int64_t(row) * num_spans : nullptr;
  }

  // Call it before the block's weights are formed. m is the rows' maximum so far.
  RAL_DEVICE Borders enter(const KeyBlock& keys, const float (&m)[kRows]) {
    if (num_spans == 0) return {Borders::kNone, 0, -1};
    const int32_t first_span = keys.span_of(0);
    const bool begins = first_span != span;
    for (;;) {
      write_closed(m);
      if (span == first_span) break;
      close(first_span);
    }
    const uint32_t low = uint32_t(keys.starts) & ~1u, high = uint32_t(keys.starts >> 32);
    const uint32_t word = low != 0 ? low : high;
    if (word == 0) return {Borders::kNone, 0, -1};
    if ((word & (word - 1)) == 0 && (low == 0 || high == 0)) {
      const int32_t first = lowest_bit(word) + (low != 0 ? 0 : 32);
      return {Borders::kOne, first, keys.span_of(first)};
    }
    const bool each = begins && ~keys.starts == 0 && are_new_and_ascend(keys);
    return {each ? Borders::kEachKeyOfNewSpans : Borders::kMany, 0, -1};
  }

  // Adds a block of keys after enter(). p: its weights, relative to the rows' maxima m; sum: the
  // lane's parts of its row sums; alpha rescales from the maxima before.
  RAL_DEVICE void add(const Weights& p, const KeyBlock& keys, const Borders& borders,
                      const float (&sum)[kRows], const float (&alpha)[kRows],
                      const float (&m)[kRows]) {
    const bool is_one_span = borders.are == Borders::kNone;
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      run[i] = run[i] * alpha[i] + (is_one_span ? sum[i] : 0.0f);
    if (is_one_span) return;
    if (borders.are == Borders::kOne)
      add_two(p, borders.first >> 3, borders.first & 7, borders.next);
    else if (borders.are == Borders::kMany)
      add_spans(p, keys, m);
    else
      write_each(p, keys, m);
  }

  // Writes the run that has ended. m: the rows' maxima.
  RAL_DEVICE void write_closed(const float (&m)[kRows]) {
    if (closed_span < 0) return;
    float total = stabiliser(own_row(m)) + log2(own_quad_sum(closed));
    if (closed_span <= highest) {
      sync_warp();  // write_each may have written it in another lane
      if (own != nullptr) total = add_in_log2(total, load_global(own + closed_span));
    }
    if (own != nullptr) store_global(own + closed_span, total);
    highest = maximum(highest, closed_span);
    closed_span = -1;
  }

  // Closes the last run and turns sums into shares. lse_log2: of the lane's rows.
  RAL_DEVICE void end(const float (&lse_log2)[kRows], const float (&m)[kRows]) {
    write_closed(m);
    close(-1);
    write_closed(m);
    Base::end(lse_log2, m);
  }

 private:
  // Of the lane's two rows, the one that it writes, if lane % 4 is 0 or 1.
  RAL_DEVICE static float own_row(const float (&rows)[kRows]) {
    return (lane_index() & 1) != 0 ? rows[1] : rows[0];
  }
  // quad_sum of that row. Lanes exchange rows, so that each adds up one row alone.
  RAL_DEVICE static float own_quad_sum(const float (&rows)[kRows]) {
    const bool odd = (lane_index() & 1) != 0;
    const float pair = (odd ? rows[1] : rows[0]) + shuffle_xor(odd ? rows[0] : rows[1], 1);
    return pair + shuffle_xor(pair, 2);
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

  // The lane's sums of keys [begin, end) of column tile c, in every row.
  RAL_DEVICE static void add_keys(float (&sum)[kRows], const Weights& p, int c, int begin,
                                  int end) {
    const int mine = 2 * (lane_index() % 4);
    RAL_UNROLL for (int e = 0; e < 2; ++e) RAL_UNROLL
      for (int i = 0; i < kRows; ++i)
        if (mine + e >= begin && mine + e < end) sum[i] += p[0][c][2 * i + e];
  }

  // Adds a block with one border, `border` keys after the start of tile c. kFirst to kLast: the
  // tiles that c may be: a tree of branches, whose leaves only add.
  template <int kFirst = 0, int kLast = kBlockK / 8 - 1>
  RAL_DEVICE void add_two(const Weights& p, int c, int border, int32_t next) {
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

  // Adds a block with several borders.
  RAL_DEVICE void add_spans(const Weights& p, const KeyBlock& keys, const float (&m)[kRows]) {
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) {
      uint32_t borders = uint32_t((keys.starts & ~uint64_t(1)) >> 8 * c) & 0xff;
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
  RAL_DEVICE bool are_new_and_ascend(const KeyBlock& keys) const {
    const int lane = lane_index();
    const int32_t before_low = shuffle_up(keys.low, 1), last_low = keys.span_of(31);
    const int32_t within_high = shuffle_up(keys.high, 1);
    const bool ascends = keys.low > (lane == 0 ? highest : before_low) &&
                         keys.high > (lane == 0 ? last_low : within_high);
    return ballot(!ascends) == 0;
  }

  // Adds a block of spans of one key, which are all new: each weight is a sum. No run is open.
  RAL_DEVICE void write_each(const Weights& p, const KeyBlock& keys, const float (&m)[kRows]) {
    span = -1;  // nothing of these spans is left to write
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
            store_global(row + key_span, stabiliser(m[i]) + log2(p[0][c][2 * i + e]));
        }
    }
  }
};

}  // namespace cuda
}  // namespace ral
