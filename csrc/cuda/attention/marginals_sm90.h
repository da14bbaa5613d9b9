// Span sums of a warp's 16 rows in the forward for Hopper: the same bits as Marginals<1> gives, in
// fewer instructions, with more registers and shared memory.
#pragma once

#include "attention/marginals.h"
#include "hopper/noted_keys.h"

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

  // Call it before the block's weights are formed. m is the rows' maximum so far.
  RAL_DEVICE void enter(const KeyNote& block, const float (&m)[kRows]) {
    if (!block.has_borders()) return;
    if (block.begins()) close(block.first_span);
    if (ballot(queued >= kQueued - 8) != 0) write_queued(m);
  }

  // Weighs the scores of a block with one border, as weigh() does. The run that is open gets the
  // keys before the border; `after` is the lane's part of the keys after it.
  RAL_DEVICE void weigh_two(Weights& s, const KeyNote& block, float scale, float (&m)[kRows],
                            float (&sum)[kRows], float (&alpha)[kRows], float (&after)[kRows]) {
    const int border = block.border() - 2 * (lane_index() % 4);  // from the lane's first key
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
                          const KeyNote& block) {
    RAL_UNROLL for (int i = 0; i < kRows; ++i)
      run[i] = run[i] * alpha[i] + (block.borders() == KeyNote::kNone ? sum[i] : 0.0f);
  }

  // Call it when a maximum has risen, before a run is closed, with the maxima before.
  RAL_DEVICE void empty_queue(const float (&m)[kRows]) {
    if (ballot(queued != 0) != 0) write_queued(m);
  }

  // Adds a block with borders after weigh_two() or add_one(). p: its weights, relative to the rows'
  // maxima m; after: of weigh_two().
  RAL_DEVICE void add(const Weights& p, const KeyNote& block, const NotedKeys* keys,
                      const float (&after)[kRows], const float (&m)[kRows]) {
    if (block.borders() == KeyNote::kOne) {
      close(load_shared(&keys->spans[block.border()]));
      RAL_UNROLL for (int i = 0; i < kRows; ++i)
        run[i] = after[i];
    } else if (block.borders() == KeyNote::kMany) {
      add_spans(p, keys, m);
    } else {
      write_each(p, block, m);
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
      do {  // eight runs; a lane has four
        int32_t at[4], of[4];
        float total[4];
        RAL_UNROLL for (int n = 0; n < 4; ++n) {
          at[n] = first + 2 * n + half;
          of[n] = shuffle(queued_spans, at[n]);
          total[n] = total_of(minimum(at[n], queued - 1));
        }
        RAL_UNROLL for (int n = 0; n < 4; ++n)
          if (at[n] < queued && own != nullptr) store_global(own + of[n], total[n]);
        first += 8;
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
  RAL_DEVICE void add_spans(const Weights& p, const NotedKeys* keys, const float (&m)[kRows]) {
    const uint64_t starts = load_shared(&keys->starts) & ~uint64_t(1);
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) {
      uint32_t borders = uint32_t(starts >> 8 * c) & 0xff;
      int begin = 0;
      // Laid out for few taken branches: tiles without borders fall through.
      while (__builtin_expect(borders != 0, 0)) {
        if (__builtin_expect(begin == 0 && ballot(queued >= kQueued - 8) != 0, 0)) write_queued(m);
        const int border = lowest_bit(borders);
        add_keys(p, c, begin, border);
        close(load_shared(&keys->spans[8 * c + border]));
        begin = border;
        borders &= borders - 1;
      }
      add_keys(p, c, begin, 8);
    }
  }

  // Adds a block of spans of one key, which follow one another and are all new: each weight is a
  // sum. No run is open.
  RAL_DEVICE void write_each(const Weights& p, const KeyNote& block, const float (&m)[kRows]) {
    span = -1;  // nothing of these spans is left to write
    highest = block.first_span + kBlockK - 1;
    const int32_t first = block.first_span + 2 * (lane_index() % 4);
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      float* const row = row_of(i);
      if (row == nullptr) continue;
      const float stable = stabiliser(m[i]);
      RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 2; ++e)
          store_global(row + first + 8 * c + e, stable + log2(p[0][c][2 * i + e]));
    }
  }
};

}  // namespace cuda
}  // namespace ral
