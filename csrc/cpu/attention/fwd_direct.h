// Products of the `attention` forward with K and V in place, for so few queries that packing would
// take longer than the products. Vectors hold features, not queries.
#pragma once

#include <type_traits>

#include "attention/block.h"

namespace ral {
namespace RAL_ISA {

// Calls fn(dtype).
template <class Fn>
RAL_INLINE void with_dtype(int32_t dtype, const Fn& fn) {
  switch (dtype) {
    case RAL_FLOAT32:
      return fn(std::integral_constant<int32_t, RAL_FLOAT32>());
    case RAL_BFLOAT16:
      return fn(std::integral_constant<int32_t, RAL_BFLOAT16>());
    default:
      return fn(std::integral_constant<int32_t, RAL_FLOAT16>());
  }
}

// The first `count` numbers of a row as float32, then 0; all of them if count >= kLanes.
template <int32_t kDtype>
RAL_INLINE Vec load_row_part(const char* from, int64_t count) {
  if constexpr (kDtype == RAL_FLOAT32) {
    return load_first(reinterpret_cast<const float*>(from), count);
  } else {
    if (kDtype == RAL_BFLOAT16 && __builtin_expect(count >= kLanes, 1)) {
      typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
      Halves halves;
      memcpy(&halves, from, sizeof halves);
      return bits_to_float(__builtin_convertvector(halves, IntVec) << 16);
    }
    alignas(64) float x[kLanes] = {};
    convert_to_float(kDtype, from, count < kLanes ? count : kLanes, x);
    return load(x);
  }
}

// Rows are prefetched this many tiles of keys ahead. That takes 0.75x to 0.9x the time without
// (8,192 keys, Emerald Rapids, 2026-11).
constexpr int64_t kTilesAhead = 3;

// sums[i] = sum of the lanes of x[i], for eight vectors.
RAL_INLINE void sum_lanes(Vec (&x)[8], float (&sums)[8]) {
  alignas(64) float lanes[2 * kLanes];
  if constexpr (kLanes >= 8) {
    // Each step adds neighbours and packs two vectors into one.
    RAL_UNROLL for (int i = 0; i < 8; i += 2) {
      exchange<1>(x[i], x[i + 1]);
      x[i] += x[i + 1];
    }
    RAL_UNROLL for (int i = 0; i < 8; i += 4) {
      exchange<2>(x[i], x[i + 2]);
      x[i] += x[i + 2];
    }
    exchange<4>(x[0], x[4]);
    store(lanes, x[0] + x[4]);
    RAL_UNROLL for (int i = 0; i < 8; ++i) {
      sums[i] = kLanes == 16 ? lanes[i] + lanes[8 + i] : lanes[i];
    }
  } else {
    for (int i = 0; i < 8; ++i) {
      store(lanes, x[i]);
      sums[i] = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    }
  }
}

// Takes queries together that share loads, as many as the registers allow. Calls fn(1, 2 or 4,
// first query).
template <class Fn>
RAL_INLINE void for_some_queries(int64_t num_queries, const Fn& fn) {
  int64_t query = 0;
  if constexpr (kLanes == 16) {
    for (; query + 4 <= num_queries; query += 4) fn(std::integral_constant<int, 4>(), query);
  }
  for (; query + 2 <= num_queries; query += 2) fn(std::integral_constant<int, 2>(), query);
  for (; query < num_queries; ++query) fn(std::integral_constant<int, 1>(), query);
}

// scores[r][query] = k_r . q for kKeys keys and eight queries, which share the loads of a key.
template <int32_t kDtype, int kKeys>
RAL_INLINE void multiply_keys_by_eight(const char* const* row, int64_t ahead, int64_t features,
                                       const float* q, int64_t ld, float (*scores)[kLanes]) {
  Vec sums[kKeys][8] = {};
  for (int64_t d = 0; d < features; d += kLanes) {
    Vec x[kKeys];
    RAL_UNROLL for (int r = 0; r < kKeys; ++r) {
      const char* from = row[r] + d * element_size(kDtype);
      __builtin_prefetch(from + ahead);
      x[r] = load_row_part<kDtype>(from, features - d);
    }
    RAL_UNROLL for (int i = 0; i < 8; ++i) {
      const Vec y = load(q + i * ld + d);
      RAL_UNROLL for (int r = 0; r < kKeys; ++r)
        sums[r][i] += x[r] * y;
    }
  }
  RAL_UNROLL for (int r = 0; r < kKeys; ++r) {
    float total[8];
    sum_lanes(sums[r], total);
    memcpy(scores[r], total, sizeof total);
  }
}

// scores[r][query] = k_r . q for kTileRows keys from `first` on and up to eight queries. Past the
// last key its scores are repeated. Rows of q are `ld` apart, and 0 from `features` to a multiple
// of kLanes. Rows of 0 follow them up to a multiple of kLanes / 2.
template <int32_t kDtype>
RAL_NOINLINE void multiply_keys(const Rows& keys, int64_t first, int64_t features, const float* q,
                                int64_t ld, int64_t num_queries,
                                float (&scores)[kTileRows][kLanes]) {
  const char* row[kTileRows];
  for (int r = 0; r < kTileRows; ++r) {
    row[r] = keys.row(first + r < keys.count ? first + r : keys.count - 1);
  }
  const int64_t ahead = kTilesAhead * kTileRows * keys.stride_bytes;
  if constexpr (kLanes == 16) {
    if (num_queries > 4) {
      static_assert(kTileRows % 3 == 0, "three at a time");
      for (int r = 0; r < kTileRows; r += 3) {
        multiply_keys_by_eight<kDtype, 3>(row + r, ahead, features, q, ld, scores + r);
      }
      return;
    }
  }
  for_some_queries(num_queries, [&](auto count, int64_t query) {
    static_assert(kTileRows <= 8, "sum_lanes takes eight");
    constexpr int kQueries = decltype(count)::value;
    Vec sums[kQueries][8] = {};
    for (int64_t d = 0; d < features; d += kLanes) {
      RAL_UNROLL for (int r = 0; r < kTileRows; ++r) {
        const char* from = row[r] + d * element_size(kDtype);
        if (query == 0) __builtin_prefetch(from + ahead);
        const Vec x = load_row_part<kDtype>(from, features - d);
        RAL_UNROLL for (int i = 0; i < kQueries; ++i) {
          sums[i][r] += x * load(q + (query + i) * ld + d);
        }
      }
    }
    RAL_UNROLL for (int i = 0; i < kQueries; ++i) {
      float total[8];
      sum_lanes(sums[i], total);
      for (int r = 0; r < kTileRows; ++r) scores[r][query + i] = total[r];
    }
  });
}

// out += sum of weight * v over keys [first, last), for kQueries queries and kVectors vectors of
// features.
template <int32_t kDtype, int kQueries, int kVectors>
RAL_INLINE void accumulate_part(const Rows& values, int64_t first, int64_t last, int64_t d,
                                int64_t features, const float* weights, float* out, int64_t ld,
                                bool prefetches) {
  const int64_t ahead = kTilesAhead * kTileRows * values.stride_bytes;
  Vec sums[kQueries][kVectors] = {};
  for (int64_t key = first; key < last; ++key, weights += kLanes) {
    uint32_t bits[kQueries], seen = 0;
    memcpy(bits, weights, sizeof bits);
    RAL_UNROLL for (int i = 0; i < kQueries; ++i)
      seen |= bits[i];
    const char* row = values.row(key);
    if (!row || !seen) continue;  // its value may be NaN
    const char* from = row + d * element_size(kDtype);
    RAL_UNROLL for (int v = 0; v < kVectors; ++v) {
      const char* part = from + v * kLanes * element_size(kDtype);
      if (prefetches) __builtin_prefetch(part + ahead);
      const Vec x = load_row_part<kDtype>(part, features - d - v * kLanes);
      RAL_UNROLL for (int i = 0; i < kQueries; ++i)
        sums[i][v] += weights[i] * x;
    }
  }
  RAL_UNROLL for (int i = 0; i < kQueries; ++i) {
    RAL_UNROLL for (int v = 0; v < kVectors; ++v)
      store(out + i * ld + d + v * kLanes, load(out + i * ld + d + v * kLanes) + sums[i][v]);
  }
}

// The same for all features, kVectors at a time while there are as many.
template <int32_t kDtype, int kQueries, int kVectors>
RAL_INLINE void accumulate_features(const Rows& values, int64_t first, int64_t last,
                                    int64_t features, const float* weights, float* out, int64_t ld,
                                    bool prefetches, int64_t d = 0) {
  for (; d + kVectors * kLanes <= features; d += kVectors * kLanes) {
    accumulate_part<kDtype, kQueries, kVectors>(values, first, last, d, features, weights, out, ld,
                                                prefetches);
  }
  if constexpr (kVectors > 1) {
    constexpr int kFewer = kVectors == 3 ? 2 : 1;
    accumulate_features<kDtype, kQueries, kFewer>(values, first, last, features, weights, out, ld,
                                                  prefetches, d);
  } else if (d < features) {
    accumulate_part<kDtype, kQueries, 1>(values, first, last, d, features, weights, out, ld,
                                         prefetches);
  }
}

// out[query] += sum over the keys [first, last) of weights[key - first][query] * v_key. Rows of
// `weights` are kLanes apart, rows of out `ld`, a multiple of kLanes.
template <int32_t kDtype>
RAL_NOINLINE void accumulate_values(const Rows& values, int64_t first, int64_t last,
                                    int64_t features, const float* weights, int64_t num_queries,
                                    float* out, int64_t ld) {
  const auto add = [&](auto queries, auto vectors, int64_t query) {
    accumulate_features<kDtype, decltype(queries)::value, decltype(vectors)::value>(
        values, first, last, features, weights + query, out + query * ld, ld, query == 0);
  };
  if constexpr (kLanes == 16) {
    constexpr std::integral_constant<int, 3> three{};
    switch (num_queries) {
      case 5:
        return add(std::integral_constant<int, 5>(), three, 0);
      case 6:
        return add(std::integral_constant<int, 6>(), three, 0);
      case 7:
        return add(std::integral_constant<int, 7>(), three, 0);
      case 8:
        return add(std::integral_constant<int, 8>(), three, 0);
    }
  }
  for_some_queries(num_queries, [&](auto count, int64_t query) {
    constexpr int kVectors = decltype(count)::value == 1 ? 8 : 4;
    add(count, std::integral_constant<int, kVectors>(), query);
  });
}

}  // namespace RAL_ISA
}  // namespace ral
