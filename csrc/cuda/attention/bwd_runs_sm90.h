// What the kernels for dk and dv for Hopper do around their products, for a warp's 16 keys and a
// tile of queries: the gradient of marginals, dm, by runs of keys.
#pragma once

#include "attention/bwd_sm90.h"

namespace ral {
namespace cuda {

// What a tile of queries adds to the warp's rows besides products, in shared memory of the warp.
struct TileStatistics {
  static constexpr int kQueries = kPanelRows;
  // Rows of runs are 8 banks apart.
  static constexpr int kRunStride = kQueries + 8;
  float lse_log2[kQueries], delta[kQueries];
  float less_delta[WarpKeys::kKeys * kRunStride];  // dm - delta of each run of keys
};

// One number of each query of a tile. A lane has queries `lane` and `lane` + 32.
struct OfQueries {
  static constexpr int kOfLane = TileStatistics::kQueries / kWarpSize;
  float values[kOfLane];

  // From `first` on. Nothing waits for what this loads.
  RAL_DEVICE void load(const float* of_all, int64_t first, int32_t num_queries) {
    RAL_UNROLL for (int i = 0; i < kOfLane; ++i) {
      const int32_t row = i * kWarpSize + lane_index();
      values[i] = row < num_queries ? load_global(of_all + (first + row)) : 0.0f;
    }
  }
  RAL_DEVICE void store(float* to) const {
    RAL_UNROLL for (int i = 0; i < kOfLane; ++i)
      store_shared(to + i * kWarpSize + lane_index(), values[i]);
  }
};

// A warp's keys and their runs. A run is a row of keys of one span.
struct WarpRuns : WarpKeys {
  int32_t run[kRows];   // of the lane's keys; runs count from the warp's first key
  int32_t num_runs;     // 1 without dm
  int32_t span_of_run;  // of run `lane % kKeys`; -1 = there is none
  int32_t last_span;    // of the warp's last key
  bool has_many;        // more than two runs, with dm

  RAL_DEVICE WarpRuns(const KeysOfBlock& block, int32_t first_key, int warp_key)
      : WarpKeys(block, first_key, warp_key),
        num_runs(1),
        span_of_run(-1),
        last_span(keys.span_of(warp_key + kKeys - 1)) {
    for (int key = 0; key < kKeys; ++key) {
      const int32_t of_key = keys.span_of(warp_key + key);
      if (key > 0 && (keys.starts >> (warp_key + key) & 1) != 0) ++num_runs;
      if (lane_index() % kKeys == num_runs - 1) span_of_run = of_key;
      RAL_UNROLL for (int i = 0; i < kRows; ++i)
        if (row_in_warp(i) == key) run[i] = num_runs - 1;
    }
    has_many = dm_of != DmOf::kNothing && num_runs > 2;
  }

  // dm of the first run and of the second, if there are one or two.
  struct OwnDm {
    float values[OfQueries::kOfLane][2];
  };
  RAL_DEVICE OwnDm load_dm(const MarginalGradient& dm, int32_t first_query) const {
    OwnDm own{};
    if (dm_of == DmOf::kNothing || has_many) return own;
    RAL_UNROLL for (int i = 0; i < OfQueries::kOfLane; ++i) {
      const int32_t query = first_query + i * kWarpSize + lane_index();
      own.values[i][0] = dm.at(query, first_span);
      if (num_runs == 2) own.values[i][1] = dm.at(query, last_span);
    }
    return own;
  }

  // Writes less_delta, which the warp has read of the tile before. The lanes meet on both sides.
  RAL_DEVICE void store_less_delta(TileStatistics* at, const OfQueries& delta, const OwnDm& own,
                                   const MarginalGradient& dm, int32_t first_query) const {
    RAL_UNROLL for (int i = 0; i < OfQueries::kOfLane; ++i) {
      const int row = i * kWarpSize + lane_index();
      if (has_many)
        store_shared(at->delta + row, delta.values[i]);
      else
        store_shared(at->less_delta + row, own.values[i][0] - delta.values[i]);
      if (!has_many && num_runs == 2)
        store_shared(at->less_delta + TileStatistics::kRunStride + row,
                     own.values[i][1] - delta.values[i]);
    }
    if (!has_many) return;
    sync_warp();
    // A lane has run lane % 16 and 16 neighbouring queries: dm of ascending spans are neighbours in
    // memory.
    constexpr int kAtOnce = 16, kHalf = kWarpSize / 2;
    const int half = lane_index() / kHalf * kAtOnce;
    for (int begin = 0; begin < TileStatistics::kQueries; begin += 2 * kAtOnce) {
      const int row = begin + half;
      const uint32_t there = span_of_run < 0 ? 0 : dm.has(first_query + row, kAtOnce);
      const float* const from = dm.rows + (first_query + row) * dm.num_spans + span_of_run;
      // A span's number has 32 bits. nvcc would multiply 64-bit numbers for each query.
      const int64_t stride = opaque(int32_t(dm.num_spans));
      float of_run[kAtOnce];
      RAL_UNROLL for (int i = 0; i < kAtOnce; ++i)
        of_run[i] = (there >> i & 1) != 0 ? load_global(from + i * stride) : 0.0f;
      float* const to = at->less_delta + lane_index() % kHalf * TileStatistics::kRunStride + row;
      RAL_UNROLL for (int i = 0; i < kAtOnce; i += 4) {
        const Float4 less = load_shared(reinterpret_cast<const Float4*>(at->delta + row + i));
        store_shared(reinterpret_cast<Float4*>(to + i),
                     Float4{{of_run[i] - less.x[0], of_run[i + 1] - less.x[1],
                             of_run[i + 2] - less.x[2], of_run[i + 3] - less.x[3]}});
      }
    }
  }

  // Starts ds with what (9) and (11) add to its product, dm - delta.
  template <int kTiles>
  RAL_DEVICE void begin(float (&ds)[1][kTiles][4], const TileStatistics* at) const {
    RAL_UNROLL for (int i = 0; i < kRows; ++i) {
      const float* of_key = at->less_delta + run[i] * TileStatistics::kRunStride + mine();
      RAL_UNROLL for (int c = 0; c < kTiles; ++c) {
        const Float2 both = load_shared(reinterpret_cast<const Float2*>(of_key + 8 * c));
        ds[0][c][2 * i] = both.x;
        ds[0][c][2 * i + 1] = both.y;
      }
    }
  }
};

}  // namespace cuda
}  // namespace ral
