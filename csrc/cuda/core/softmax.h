// Masks and online softmax of a warp's rows against a block of keys.
#pragma once

#include "core/keys.h"
#include "core/tiles.h"

namespace ral {
namespace cuda {

// What is subtracted from scores whose maximum is m. It is 0 where no key was seen, which avoids
// the NaN of inf - inf.
RAL_DEVICE float stabiliser(float m) {
  return m == minus_infinity() ? 0.0f : m;
}

// log2(2^x + 2^y)
RAL_DEVICE float add_in_log2(float x, float y) {
  const float high = maximum(x, y), low = x > y ? y : x;
  return high == minus_infinity() ? high : high + log2(1.0f + exp2(low - high));
}

// Writes `hidden` where a row does not see a key. first: the block's first key; warp_query: the
// warp's first row.
template <int kRowTiles>
RAL_DEVICE void hide(float (&s)[kRowTiles][kBlockK / 8][4], const Visibility& visibility,
                     uint64_t real, int32_t first, int32_t warp_query, float hidden) {
  const int mine = 2 * (lane_index() % 4);
  RAL_UNROLL for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int32_t query = warp_query + row_in_warp(i);
    const int32_t low = visibility.first_key(query) - first - mine;
    const int32_t high = visibility.last_key(query) - first - mine;
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * c + e;
        const bool visible = column >= low && column <= high && (real >> mine >> column & 1) != 0;
        if (!visible) s[i / 2][c][i % 2 * 2 + e] = hidden;
      }
  }
}

// Raises m to the maximum of the scores of the lane's i-th row, in base 2. Returns the factor that
// rescales what was relative to the old maximum.
template <int kRowTiles>
RAL_DEVICE float raise(const float (&s)[kRowTiles][kBlockK / 8][4], int i, float& m, float scale) {
  float highest[2] = {minus_infinity(), minus_infinity()};  // chains half as long
  RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
    for (int e = 0; e < 2; ++e) highest[e] = maximum(highest[e], s[i / 2][c][i % 2 * 2 + e]);
  const float before = m;
  m = maximum(before, quad_maximum(maximum(highest[0], highest[1])) * scale);
  return exp2(before - stabiliser(m));
}

// Turns the scores of the lane's i-th row into weights relative to 2^m. `sum` is the lane's part of
// their sum. Calls each(column, weight), where a column counts from the lane's first.
template <int kRowTiles, typename Each>
RAL_DEVICE void weigh_raised(float (&s)[kRowTiles][kBlockK / 8][4], int i, float m, float scale,
                             float& sum, const Each& each) {
  const float stable = stabiliser(m);
  sum = 0.0f;
  RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
    for (int e = 0; e < 2; ++e) {
      float& weight = s[i / 2][c][i % 2 * 2 + e];
      weight = exp2(weight * scale - stable);
      sum += weight;
      each(8 * c + e, weight);
    }
}

// Both. Returns the factor.
template <int kRowTiles>
RAL_DEVICE float weigh(float (&s)[kRowTiles][kBlockK / 8][4], int i, float& m, float scale,
                       float& sum) {
  const float alpha = raise(s, i, m, scale);
  weigh_raised(s, i, m, scale, sum, [](int, float) {});
  return alpha;
}

}  // namespace cuda
}  // namespace ral
