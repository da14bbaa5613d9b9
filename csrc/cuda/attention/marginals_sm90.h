// Span sums of a warp's 16 rows in the forward for Hopper: the same bits as Marginals<1> gives, in
// fewer instructions, with more registers and shared memory.
#pragma once

#include "attention/marginals.h"

namespace ral {
namespace cuda {

// A run that has ended waits in a queue in shared memory, each lane's part of it. It is written
// with others, when the queue fills or a maximum rises: then lanes share out the rows and the runs,
// and the latency of a write is paid once for several. All runs in the queue are relative to the
// rows' maxima of the moment.
struct MarginalsSm90 : Marginals<1> {
  using Base = Marginals<1>;
  using Weights = float[1][kBlockK / 8][4];
  static constexpr int kQueued = 16;  // runs
  struct Shared {
    MarginalRows rows;
    float parts[kQueued][kRows][kWarpSize];
  };
  Shared* shared;        // the warp owns it; set after begin(), or nvcc knows no address space
  int32_t queued;        // runs that have ended and are to be written
  int32_t again;         // not 0: one of them is not the first of its span
  int32_t queued_spans;  // lane i: that of run i

  // What add() needs to know of a block. A border is a key whose span is not that of the key before
  // it, in the block.
  struct Borders {
    enum { kNone, kOne, kMany, kEachKeyOfNewSpans } are;
    int32_t first;  // if it is one
  };

  // Call it before the block's weights are formed. m is the rows' maximum so far.
  RAL_DEVICE Borders enter(const KeyBlock& keys, const float (&m)[kRows]) {
    if (num_spans == 0) return {Borders::kNone, 0};
    const int32_t first_span = keys.span_of(0);
    const bool begins = ballot(first_span != span) != 0;
    if (begins) close(first_span);
    if (ballot(queued >= kQueued - 8) != 0) write_queued(m);
    const uint32_t low = uint32_t(keys.starts) & ~1u, high = uint32_t(keys.starts >> 32);
    const uint32_t word = low != 0 ? low : high;
    if (word == 0) return {Borders::kNone, 0};
    if ((word & (word - 1)) == 0 && (low == 0 || high == 0)) {
      const int32_t first = lowest_bit(word) + (low != 0 ? 0 : 32);
      return {Borders::kOne, first};
    }
    const bool each = begins && ~keys.starts == 0 && are_new_and_ascend(keys);
    return {each ? Borders::kEachKeyOfNewSpans : Borders::kMany, 0};
  }

  // Weighs the scores of a block with one border, as weigh() does. The run that is open gets the
  // keys before the border; `after` is the lane's part of the keys after it.
  RAL_DEVICE void weigh_two(Weights& s, const Borders& borders, float scale, float (&m)[kRows],
                            float (&sum)[kRows], float (&alpha)[kRows], float (&after)[kRows]) {
    const int border = borders.first - 2 * (lane_index() % 4);  // from the lane's first key
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      alpha[i] = raise(s, i, m[i], scale);
      run[i] *= alpha[i];
      after[i] = 0.0f;
      const int stop = opaque(border);  // or nvcc keeps 16 comparisons, and has 7 predicates
      weigh_raised(s, i, m[i], scale, sum[i], [&](int column, float weight) {
        if (column < stop)
          run[i] += weight;
        else
          after[i] += weight;
      });
    }
  }

  // Rescales the open run from the maxima before, by alpha, and adds a block without borders. sum:
  // the lane's parts of its row sums.
  RAL_DEVICE void add_one(const float (&sum)[kRows], const float (&alpha)[kRows],
                          const Borders& borders) {
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      run[i] = run[i] * alpha[i] + (borders.are == Borders::kNone ? sum[i] : 0.0f);
  }

  // Call it when a maximum has risen, before a run is closed, with the maxima before.
  RAL_DEVICE void empty_queue(const float (&m)[kRows]) {
    if (ballot(queued != 0) != 0) write_queued(m);
  }

  // Adds a block with borders after weigh_two() or add_one(). p: its weights, relative to the rows'
  // maxima m; after: of weigh_two().
  RAL_DEVICE void add(const Weights& p, const KeyBlock& keys, const Borders& borders,
                      const float (&after)[kRows], const float (&m)[kRows]) {
    if (borders.are == Borders::kOne) {
      close(keys.span_of(borders.first));
      RAL_UNROLL for (int i = 0; i < kRows; ++i)
        run[i] = after[i];
    } else if (borders.are == Borders::kMany) {
      add_spans(p, keys, m);
    } else {
      write_each(p, keys, m);
    }
  }

  // Closes the last run and turns sums into shares. lse_log2: of the lane's rows.
  RAL_DEVICE void end(const float (&lse_log2)[kRows], const float (&m)[kRows]) {
    close(-1);
    empty_queue(m);
    Base::end(lse_log2, m);
  }

 private:
  // Ends the run, and begins one of span `next`. The maxima stay until the queue is empty.
  RAL_DEVICE void close(int32_t next) {
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      store_shared(&shared->parts[queued][i][lane_index()], run[i]);
      run[i] = 0.0f;
    }
    if (lane_index() == queued) queued_spans = span;
    if (span >= 0) {
      again = span <= highest ? 1 : again;
      ++queued;
    }
    highest = maximum(highest, span);
    span = next;
  }

  // Where the lane's i-th row goes, or null.
  RAL_DEVICE float* row_of(int i) const {
    const MarginalRows where = load_shared(&shared->rows);
    const int32_t row = row_in_warp(i);
    return row >= where.first && row < where.stop ? where.data + int64_t(row) * num_spans : nullptr;
  }

  // Writes the runs in the queue. m: the maxima that they are relative to.
  RAL_DEVICE void write_queued(const float (&m)[kRows]) {
    // Opaque, or nvcc keeps numbers of it through the main loop, and spills.
    const int lane = opaque(lane_index()), i = lane % kRows, half = lane / kRows % 2;
    const float stable = stabiliser(i == 0 ? m[0] : m[1]);
    float* const own = row_of(i);
    // All lanes have stored their parts.
    sync_warp();
    const auto total_of = [&](int32_t at) {  // in the order of quad_sum
      const Float4 parts =
          load_shared(reinterpret_cast<const Float4*>(&shared->parts[at][i][lane & ~3]));
      return stable + log2((parts.x[0] + parts.x[1]) + (parts.x[2] + parts.x[3]));
    };
    int32_t first = 0;
    if (ballot(again != 0) == 0) {
      do {  // four runs; a lane has two
        int32_t at[2], of[2];
        float total[2];
        RAL_UNROLL for (int n = 0; n < 2; ++n) {
          at[n] = first + 2 * n + half;
          of[n] = shuffle(queued_spans, at[n]);
          total[n] = total_of(minimum(at[n], queued - 1));
        }
        RAL_UNROLL for (int n = 0; n < 2; ++n)
          if (at[n] < queued && own != nullptr) store_global(own + of[n], total[n]);
        first += 4;
      } while (ballot(first < queued) != 0);
    } else {  // what is not in global memory yet is -inf there
      do {
        const int32_t of = shuffle(queued_spans, first);
        if (half == 0 && own != nullptr)
          store_global(own + of, add_in_log2(total_of(first), load_global(own + of)));
        sync_warp();
        ++first;
      } while (ballot(first < queued) != 0);
      again = 0;
    }
    queued = 0;
    sync_warp();
  }

  // The lane's sums of keys [begin, end) of column tile c, in every row.
  RAL_DEVICE void add_keys(const Weights& p, int c, int begin, int end) {
    const int mine = 2 * (lane_index() % 4);
    RAL_UNROLL for (int e = 0; e < 2; ++e) RAL_UNROLL
      for (int i = 0; i < kRows; ++i)
        if (mine + e >= begin && mine + e < end) run[i] += p[0][c][2 * i + e];
  }

  // Adds a block with several borders.
  RAL_DEVICE void add_spans(const Weights& p, const KeyBlock& keys, const float (&m)[kRows]) {
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) {
      uint32_t borders = uint32_t((keys.starts & ~uint64_t(1)) >> 8 * c) & 0xff;
      int begin = 0;
      if (borders == 0) {
        add_keys(p, c, 0, 8);
        continue;
      }
      if (ballot(queued >= kQueued - 8) != 0) write_queued(m);
      do {
        const int border = lowest_bit(borders);
        add_keys(p, c, begin, border);
        close(keys.span_of(8 * c + border));
        begin = border;
        borders &= borders - 1;
      } while (borders != 0);
      add_keys(p, c, begin, 8);
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
    float* const rows_of_lane[kRows] = {row_of(0), row_of(1)};
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int32_t key_span = keys.span_of_column(c, e);
        RAL_UNROLL for (int i = 0; i < kRows; ++i)
          if (rows_of_lane[i] != nullptr)
            store_global(rows_of_lane[i] + key_span, stabiliser(m[i]) + log2(p[0][c][2 * i + e]));
      }
  }
};

}  // namespace cuda
}  // namespace ral
