// Streams over the keys that one token block sees, one chunk of key groups at a time. They form
// normalisers, head-averaged weights, and sums of these. The forward and the backward of the policy
// and of its divergence share them.
#pragma once

#include "policy/divergence_terms.h"
#include "policy/side.h"

namespace ral {
namespace RAL_ISA {

// 48 keys, or 128 on AMX: whole vectors for transposes, and weights stay in L2.
constexpr int64_t kChunkGroups = kTileRows > 16 ? 4 : 8;
constexpr int64_t kChunkKeys = kChunkGroups * kTileRows;

// One side of a token block, ready for its products. Every stream forms a weight as exp2(score *
// log2 e - stabiliser) * inverse. A float32 lse would round it once more, by as much as lse is
// large.
struct SideBlock {
  const uint32_t* keys;     // packed rows of the sample
  const uint32_t* queries;  // [total_panels][padded_steps][kWidth]
  const float* bias;        // [padded_spans][total_panels][kWidth], or null
  const float* stabiliser;  // [total_panels][kWidth], in powers of two; 0 where no key is seen
  const float* inverse;     // likewise, head's weight / sum of the weights; 0 where no key is seen
};

// Weights of all heads on all keys, as the stream for the normalisers leaves them. They are not
// normalised, and relative to the row's stabiliser at that chunk.
struct WeightCache {
  float* weights;      // [chunks][total_panels][kChunkKeys][kWidth]; null = nothing is kept
  float* stabilisers;  // [chunks][total_panels][kWidth]

  template <class Side>
  float* chunk(const Side& side, int64_t i) const {
    return weights + i * side.total_panels * kChunkKeys * Side::kWidth;
  }
};

// Which keys of a group are valid, for the lanes of a token block.
class GroupValidity {
 public:
  GroupValidity(const ral_policy_common& common, const TokenBlock& block)
      : common_(common), block_(block), validity_(common) {}

  void move_to(int64_t group) {
    key_ = group * kTileRows;
    scope_ = 0;
    for (int r = 0; r < kTileRows; ++r) {
      if (validity_.in_scope(block_.batch, key_ + r)) scope_ |= uint64_t{1} << r;
    }
    const int64_t first = common_.query_start + block_.first_row;
    has_self_ = common_.exclude_self && first < key_ + kTileRows && first + block_.count > key_;
  }
  bool all() const { return scope_ == (uint64_t{1} << kTileRows) - 1 && !has_self_; }
  bool none() const { return scope_ == 0; }
  // All ones in the lanes of sub-block `sub` for which key `r` of the group is valid.
  RAL_INLINE IntVec lanes(int r, int64_t sub) const {
    if (!(scope_ >> r & 1)) return IntVec{};
    return load(block_.self_key + sub * kLanes) != static_cast<int32_t>(key_ + r);
  }

 private:
  const ral_policy_common& common_;
  const TokenBlock& block_;
  const KeyValidity validity_;
  int64_t key_ = 0;
  uint64_t scope_ = 0;  // bit r: key r is in the scope
  bool has_self_ = false;
};

inline GroupRange visible_groups(const TokenBlock& block, GroupRange within) {
  return groups_of_keys(block.some_first, block.some_last, within);
}

// A sum over many keys: `to` += x. What rounding takes goes to `lost`, because one chunk after the
// other would round a sum over 32k keys 700 times. settle() adds both.
RAL_INLINE void add_to_sum(float* to, float* lost, Vec x) {
  const Vec before = load(to), after = before + x, added = after - before;
  store(to, after);
  store(lost, load(lost) + ((before - (after - added)) + (x - added)));
}
// sums: [2][size], the sums and what they lost. An infinite sum has lost NaN and stays as it is.
inline void settle(float* sums, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const float whole = sums[i] + sums[size + i];
    if (whole == whole) sums[i] = whole;
    sums[size + i] = 0.f;
  }
}

// Views successive rows of V vectors as a tile.
template <int V>
RAL_INLINE Vec (&tile_at(float* rows))
    [kTileRows][V] { return *reinterpret_cast<Vec(*)[kTileRows][V]>(rows); }

// Raw products of one panel with the keys of a chunk, tile[key][kWidth]. `factor` turns each
// group's products into scores in powers of two. `top` [kWidth] rises to the largest of these
// scores.
//
// It is a function of its own, with its maxima in memory. What the caller keeps in registers across
// the products would push out their accumulators: sum_weights took 1.25x the time (Zen 5, GCC 12).
template <class Compute, int V>
RAL_NOINLINE void score_chunk(const PolicySide<Compute, V>& side, const TokenBlock& block,
                              const SideBlock& in, int64_t panel, GroupRange chunk, float* tile,
                              float* factor, float* top) {
  constexpr int64_t kWidth = V * kLanes;
  for (int64_t group = chunk.begin; group < chunk.end; ++group) {
    float* to = tile + (group - chunk.begin) * kTileRows * kWidth;
    // A cache of weights is too large to be near, so it is prefetched while the products are
    // formed.
    if constexpr (!Compute::kTilesInMemory) {
      RAL_UNROLL for (int i = 0; i < kTileRows * V; ++i)
        __builtin_prefetch(to + i * kLanes, 1);
    }
    Vec registers[kTileRows][V];
    Vec(&x)[kTileRows][V] = Compute::kTilesInMemory ? tile_at<V>(to) : registers;
    const float f = side.score_group(block, in.keys, in.queries, in.bias, panel, group, x, nullptr);
    factor[group - chunk.begin] = f;
    Vec largest[V];
    RAL_UNROLL for (int v = 0; v < V; ++v)
      largest[v] = max(x[0][v], x[1][v]);
    RAL_UNROLL for (int r = 2; r < kTileRows; r += 2) {
      RAL_UNROLL for (int v = 0; v < V; ++v)
        largest[v] = max(largest[v], max(x[r][v], x[r + 1][v]));
    }
    RAL_UNROLL for (int v = 0; v < V; ++v) {
      store(top + v * kLanes, max(load(top + v * kLanes), largest[v] * f));
      if constexpr (!Compute::kTilesInMemory) {
        RAL_UNROLL for (int r = 0; r < kTileRows; ++r)
          store(to + r * kWidth + v * kLanes, x[r][v]);
      }
    }
  }
}

// Row sums of exp(score), split into valid and other keys, by an online softmax over whole chunks.
// stabiliser: [total_panels][kWidth]; valid, other: sums of as many; all written.
template <class Compute, int V>
void sum_weights(const PolicySide<Compute, V>& side, const TokenBlock& block, const SideBlock& in,
                 float* stabiliser, float* valid, float* other, const WeightCache& cache) {
  constexpr int64_t kWidth = V * kLanes;
  alignas(64) float scores[kChunkKeys * kWidth];  // of one panel
  const int64_t columns = side.columns_size();
  for (int64_t i = 0; i < columns; ++i) stabiliser[i] = kEmptyRow;
  memset(valid, 0, 2 * columns * sizeof(float));
  memset(other, 0, 2 * columns * sizeof(float));
  GroupValidity validity(side.common, block);
  const GroupRange visible = visible_groups(block, GroupRange{0, side.groups});
  for (int64_t i = visible.begin / kChunkGroups; i * kChunkGroups < visible.end; ++i) {
    const int64_t begin = i * kChunkGroups;
    const int64_t end = begin + kChunkGroups < side.groups ? begin + kChunkGroups : side.groups;
    for (int64_t panel = 0; panel < side.total_panels; ++panel) {
      float* tile = cache.weights ? cache.chunk(side, i) + panel * kChunkKeys * kWidth : scores;
      float factor[kChunkGroups];
      alignas(64) float top[kWidth];
      memcpy(top, stabiliser + panel * kWidth, sizeof top);
      score_chunk(side, block, in, panel, GroupRange{begin, end}, tile, factor, top);
      Vec m[V], sum[V], left_out[V];
      RAL_UNROLL for (int v = 0; v < V; ++v) {
        const int64_t c = panel * kWidth + v * kLanes;
        m[v] = load(top + v * kLanes);
        const Vec rescale = exp2(load(stabiliser + c) - m[v]);
        store(stabiliser + c, m[v]);
        if (cache.weights) store(cache.stabilisers + i * columns + c, m[v]);
        for (int64_t at = c; at < 2 * columns; at += columns) {
          store(valid + at, load(valid + at) * rescale);
          store(other + at, load(other + at) * rescale);
        }
        sum[v] = left_out[v] = Vec{};
      }
      for (int64_t group = begin; group < end; ++group) {
        validity.move_to(group);
        const bool all = validity.all();
        const float f = factor[group - begin];
        for (int first = 0; first < kTileRows; first += kFewRows) {
          float* from = tile + ((group - begin) * kTileRows + first) * kWidth;
          RAL_UNROLL for (int v = 0; v < V; ++v) {
            Vec p[kFewRows], total{};
            RAL_UNROLL for (int r = 0; r < kFewRows; ++r) {
              p[r] = exp2_bounded(load(from + r * kWidth + v * kLanes) * f - m[v]);
              total += p[r];
            }
            if (cache.weights) {
              RAL_UNROLL for (int r = 0; r < kFewRows; ++r)
                store(from + r * kWidth + v * kLanes, p[r]);
            }
            if (__builtin_expect(all, 1)) {
              sum[v] += total;
              continue;
            }
            Vec inside{}, outside{};
            const int64_t sub = (panel % side.panels * V + v) % side.sub_blocks;
            for (int r = 0; r < kFewRows; ++r) {
              const IntVec counts = validity.lanes(first + r, sub);
              inside += select(counts, p[r], Vec{});
              outside += select(counts, Vec{}, p[r]);
            }
            // A NaN must reach the sums on whichever side of the selection it falls.
            sum[v] += select(total == total, inside, total);
            left_out[v] += outside;
          }
        }
      }
      RAL_UNROLL for (int v = 0; v < V; ++v) {
        const int64_t c = panel * kWidth + v * kLanes;
        add_to_sum(valid + c, valid + columns + c, sum[v]);
        add_to_sum(other + c, other + columns + c, left_out[v]);
      }
    }
  }
}

// The normaliser of every column and the valid share z of every row. In place over what sum_weights
// left: `other` becomes the inverse of the sum, `valid` the valid share W_h, both times the head's
// weight.
template <class Compute, int V>
void finish_sums(const PolicySide<Compute, V>& side, const TokenBlock& block, float* stabiliser,
                 float* valid, float* other, float* z) {
  constexpr int64_t kWidth = V * kLanes;
  settle(valid, side.columns_size());
  settle(other, side.columns_size());
  for (int64_t i = 0; i < side.rows; ++i) z[i] = 0.f;
  for (int64_t i = 0; i < side.total_panels * kWidth; ++i) {
    const int64_t panel = i / kWidth;
    const int64_t vector = panel % side.panels * V + i % kWidth / kLanes;
    float sum = valid[i] + other[i];
    const bool empty = sum == 0.f || vector >= side.vectors;
    // A quotient, which no compiler joins with z's sum to an FMA: a weight of 1 changes no bit.
    sum /= side.head_weight(block, i);
    valid[i] = empty ? 0.f : valid[i] / sum;
    other[i] = empty ? 0.f : 1.f / sum;
    if (empty) stabiliser[i] = 0.f;
    z[vector % side.sub_blocks * kLanes + i % kLanes] += valid[i];
  }
  const float heads = static_cast<float>(side.side.num_heads);
  for (int64_t i = 0; i < side.rows; ++i) z[i] /= heads;
}

// Adds a panel's weights on one key to the sums over heads, [rows].
template <int V>
class HeadSums {
 public:
  template <class Side>
  HeadSums(const Side& side, int64_t panel) : one_sub_block_(side.sub_blocks == 1) {
    for (int v = 0; v < V; ++v) {
      row_[v] = (panel % side.panels * V + v) % side.sub_blocks * kLanes;
    }
  }
  RAL_INLINE void add(const Vec (&p)[V], float* total) const {
    if (one_sub_block_) {
      Vec sum = p[0];
      RAL_UNROLL for (int v = 1; v < V; ++v)
        sum += p[v];
      store(total, load(total) + sum);
    } else {
      RAL_UNROLL for (int v = 0; v < V; ++v)
        store(total + row_[v], load(total + row_[v]) + p[v]);
    }
  }

 private:
  int64_t row_[V];  // per vector
  const bool one_sub_block_;
};

// Sum over heads of the weights on the keys of one chunk: mean[key][rows], unscaled. `weights`
// receives all heads' weights, [total_panels][kChunkKeys][kWidth]. `slope` receives d score / d
// (scaled product) if softcap is on. Either may be null.
template <class Compute, int V>
void chunk_weights(const PolicySide<Compute, V>& side, const TokenBlock& block, const SideBlock& in,
                   GroupRange chunk, float* mean, float* weights, float* slope) {
  constexpr int64_t kWidth = V * kLanes;
  memset(mean, 0, kChunkKeys * side.rows * sizeof(float));
  for (int64_t panel = 0; panel < side.total_panels; ++panel) {
    const HeadSums<V> heads(side, panel);
    for (int64_t group = chunk.begin; group < chunk.end; ++group) {
      const int64_t first_key = (group - chunk.begin) * kTileRows;
      float* to = weights ? weights + (panel * kChunkKeys + first_key) * kWidth : nullptr;
      Vec local[kTileRows][V], tile_slope[kTileRows * V];
      Vec(&p)[kTileRows][V] = Compute::kTilesInMemory && weights ? tile_at<V>(to) : local;
      const float factor =
          side.score_group(block, in.keys, in.queries, in.bias, panel, group, p, tile_slope);
      RAL_UNROLL for (int v = 0; v < V; ++v) {
        const Vec m = load(in.stabiliser + panel * kWidth + v * kLanes);
        const Vec inverse = load(in.inverse + panel * kWidth + v * kLanes);
        RAL_UNROLL for (int r = 0; r < kTileRows; ++r)
          p[r][v] = rounded(exp2_bounded(p[r][v] * factor - m) * inverse);
      }
      if (weights && !Compute::kTilesInMemory) {
        RAL_UNROLL for (int r = 0; r < kTileRows; ++r) {
          RAL_UNROLL for (int v = 0; v < V; ++v)
            store(to + r * kWidth + v * kLanes, p[r][v]);
        }
      }
      if (slope && side.side.softcap > 0) {
        memcpy(slope + (panel * kChunkKeys + first_key) * kWidth, tile_slope, sizeof tile_slope);
      }
      RAL_UNROLL for (int r = 0; r < kTileRows; ++r) {
        heads.add(p[r], mean + (first_key + r) * side.rows);
      }
    }
  }
}

// chunk_weights of chunk `i`, from what sum_weights kept. With `keeps` the cache holds the
// normalised weights afterwards.
template <class Compute, int V>
void recall_weights(const PolicySide<Compute, V>& side, const TokenBlock& block,
                    const SideBlock& in, GroupRange chunk, int64_t i, const WeightCache& cache,
                    bool keeps, float* mean) {
  constexpr int64_t kWidth = V * kLanes;
  float* weights = cache.chunk(side, i);
  memset(mean, 0, kChunkKeys * side.rows * sizeof(float));
  const GroupRange seen = visible_groups(block, chunk);
  if (seen.begin == seen.end) {
    if (keeps) memset(weights, 0, side.total_panels * kChunkKeys * kWidth * sizeof(float));
    return;
  }
  const int64_t keys = (chunk.end - chunk.begin) * kTileRows;
  for (int64_t panel = 0; panel < side.total_panels; ++panel) {
    const HeadSums<V> heads(side, panel);
    Vec factor[V];
    RAL_UNROLL for (int v = 0; v < V; ++v) {
      const int64_t c = panel * kWidth + v * kLanes;
      factor[v] =
          exp2(load(cache.stabilisers + i * side.columns_size() + c) - load(in.stabiliser + c)) *
          load(in.inverse + c);
    }
    for (int64_t key = 0; key < keys; ++key) {
      float* from = weights + (panel * kChunkKeys + key) * kWidth;
      Vec p[V];
      RAL_UNROLL for (int v = 0; v < V; ++v)
        p[v] = rounded(load(from + v * kLanes) * factor[v]);
      if (keeps) {
        RAL_UNROLL for (int v = 0; v < V; ++v)
          store(from + v * kLanes, p[v]);
      }
      heads.add(p, mean + key * side.rows);
    }
  }
}

// Turns the mean into the policy: divides it by its sum, and writes 0 on keys that do not count.
inline void renormalise(const TokenBlock& block, const ral_policy_common& common, GroupRange chunk,
                        int64_t rows, const float* inverse, float* mean) {
  GroupValidity validity(common, block);
  for (int64_t group = chunk.begin; group < chunk.end; ++group) {
    validity.move_to(group);
    for (int r = 0; r < kTileRows; ++r) {
      float* row = mean + ((group - chunk.begin) * kTileRows + r) * rows;
      for (int64_t i = 0; i < rows; i += kLanes) {
        const Vec p = load(row + i) * load(inverse + i);
        store(row + i, select(validity.lanes(r, i / kLanes), p, Vec{}));
      }
    }
  }
}

// Writes 0 on keys that a row does not see or that do not count.
inline void keep_valid(const TokenBlock& block, const ral_policy_common& common, GroupRange chunk,
                       int64_t rows, float* x) {
  GroupValidity validity(common, block);
  const int64_t first = chunk.begin * kTileRows, count = (chunk.end - chunk.begin) * kTileRows;
  for (int64_t key = 0; key < count; ++key) {
    const int r = static_cast<int>(key % kTileRows);
    if (r == 0) validity.move_to(chunk.begin + key / kTileRows);
    const int32_t k = static_cast<int32_t>(first + key);
    for (int64_t i = 0; i < rows; i += kLanes) {
      const IntVec seen = (load(block.first_key + i) <= k) & (load(block.last_key + i) >= k);
      float* to = x + key * rows + i;
      store(to, select(seen & validity.lanes(r, i / kLanes), load(to), Vec{}));
    }
  }
}

// u[c] += sum over the chunk's keys of weights * l. w[c] += sum of the weights on valid keys. Both
// are sums to settle. l is 0 on keys that do not count. w may be null.
template <class Compute, int V>
void add_moments(const PolicySide<Compute, V>& side, const TokenBlock& block, GroupRange chunk,
                 const float* weights, const float* l, float* u, float* w) {
  constexpr int64_t kWidth = V * kLanes;
  GroupValidity validity(side.common, block);
  const int64_t keys = (chunk.end - chunk.begin) * kTileRows, columns = side.columns_size();
  for (int64_t panel = 0; panel < side.total_panels; ++panel) {
    for (int v = 0; v < V; ++v) {
      const int64_t sub = (panel % side.panels * V + v) % side.sub_blocks;
      const float* from = weights + panel * kChunkKeys * kWidth + v * kLanes;
      Vec moment{}, share{};
      for (int64_t key = 0; key < keys; ++key) {
        moment += load(from + key * kWidth) * load(l + key * side.rows + sub * kLanes);
      }
      float* to = u + panel * kWidth + v * kLanes;
      add_to_sum(to, to + columns, moment);
      if (!w) continue;
      for (int64_t key = 0; key < keys; ++key) {
        const int r = static_cast<int>(key % kTileRows);
        if (r == 0) validity.move_to(chunk.begin + key / kTileRows);
        share += select(validity.lanes(r, sub), load(from + key * kWidth), Vec{});
      }
      float* share_to = w + panel * kWidth + v * kLanes;
      add_to_sum(share_to, share_to + columns, share);
    }
  }
}

// Reads p and r of a chunk, writes l in place of r, and adds the divergence's terms to the sums
// `value`, which may be null.
// Rows of infinite divergence keep their infinity in `value`.
inline void divergence_terms(int32_t kind, int64_t count, int64_t rows, const float* p, float* r,
                             float* value) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    Vec sum{};
    for (int64_t key = 0; key < count; ++key) {
      const int64_t at = key * rows + i;
      const DivergenceTerm term = divergence_term(kind, load(p + at), load(r + at));
      sum += term.value;
      store(r + at, term.gradient);
    }
    if (value) add_to_sum(value + i, value + rows + i, sum);
  }
}

// Settles the sums, and the rows that have no gradient. Where one side has no valid key (inverse 0)
// there is nothing to compare. Where the divergence is infinite, a moment of +inf tells the
// backward.
template <class Side>
void finish_divergence(const Side& side, const float* inverse, const float* reference_inverse,
                       float* total, float* moment) {
  settle(total, side.rows);
  settle(moment, side.columns_size());
  for (int64_t i = 0; i < side.rows; ++i) {
    if (inverse[i] == 0.f || reference_inverse[i] == 0.f) total[i] = 0.f;
  }
  for (int64_t c = 0; c < side.columns_size(); ++c) {
    const float row_total = total[side.row_of_column(c)];
    if (row_total == __builtin_inff()) moment[c] = row_total;
  }
}

}  // namespace RAL_ISA
}  // namespace ral
