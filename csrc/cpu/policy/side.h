// One policy's side of a call: its packed keys, and the weights of its heads on one tile of keys.
//
// The unit of work is a token block: `sub_blocks` vectors of kLanes query rows, with all heads. A
// vector holds one head's weights on one key for kLanes rows. So the head average is a sum of whole
// vectors, which one worker takes in a fixed order. Two sides of equal shape do the same operations
// in the same order: equal inputs give equal bits.
#pragma once

#include "attention/block.h"
#include "ral/divergence_math.h"
#include "ral/policy.h"

namespace ral {
namespace RAL_ISA {

constexpr int64_t kMaxSubBlocks = kTileVectors;  // so that even one head fills a tile

// The query rows of one token block and the keys that they see.
struct TokenBlock {
  static constexpr int64_t kMaxRows = kMaxSubBlocks * kLanes;
  alignas(64) int32_t first_key[kMaxRows];
  alignas(64) int32_t last_key[kMaxRows];
  alignas(64) int32_t self_key[kMaxRows];              // -1 = no key is excluded
  int64_t batch, first_row, count;                     // rows [first_row, first_row + count) exist
  int64_t some_first, some_last, all_first, all_last;  // as in ColumnBlock

  // Where row `i` of the block lies in tensors [B, T].
  int64_t row(const ral_policy_common& c, int64_t i) const {
    return batch * c.total_rows + first_row + i;
  }

  void build(const ral_policy_common& c, const ral_policy_side& side, int64_t sample, int64_t block,
             int64_t rows) {
    batch = sample;
    first_row = block * rows;
    count = c.num_rows - first_row < rows ? c.num_rows - first_row : rows;
    some_first = c.seqlen_k;
    some_last = -1;
    all_first = 0;
    all_last = c.seqlen_k - 1;
    for (int64_t i = 0; i < rows; ++i) {
      first_key[i] = 0;
      last_key[i] = static_cast<int32_t>(c.seqlen_k - 1);
      self_key[i] = -1;
      if (i >= count) continue;
      const int64_t position = c.query_start + first_row + i;
      // As if one query stood at `position` of its own sequence: top-left alignment.
      const KeyRange range =
          visible_keys(position, 0, c.seqlen_k, side.window_left, side.window_right, true);
      first_key[i] = static_cast<int32_t>(range.first < c.seqlen_k ? range.first : c.seqlen_k);
      last_key[i] = static_cast<int32_t>(range.last > -1 ? range.last : -1);
      if (c.exclude_self && position >= 0 && position < c.seqlen_k) {
        self_key[i] = static_cast<int32_t>(position);
      }
      if (first_key[i] <= last_key[i]) {
        if (range.first < some_first) some_first = range.first;
        if (range.last > some_last) some_last = range.last;
      }
      if (first_key[i] > all_first) all_first = first_key[i];
      if (last_key[i] < all_last) all_last = last_key[i];
    }
  }
};

// Which keys count for every query: padding and scope. GroupValidity excludes a row's own key.
class KeyValidity {
 public:
  explicit KeyValidity(const ral_policy_common& common) : c_(common) {}

  bool in_scope(int64_t sample, int64_t key) const {
    return key < c_.seqlen_k && (!c_.scope || c_.scope[sample * c_.scope_stride_b + key]) &&
           !is_padding(sample, key);
  }
  bool is_padding(int64_t sample, int64_t key) const {
    return c_.key_padding_mask && !c_.key_padding_mask[sample * c_.key_padding_mask_stride_b + key];
  }

 private:
  const ral_policy_common& c_;
};

template <class Compute, int V>
class PolicySide {
 public:
  static constexpr int64_t kWidth = V * kLanes;
  static constexpr int64_t kStepsPerGroup = kTileRows / Compute::kPair;

  PolicySide(const ral_policy_common& common, const ral_policy_side& side, int64_t sub_blocks)
      : common(common),
        side(side),
        sub_blocks(sub_blocks),
        rows(sub_blocks * kLanes),
        vectors(side.num_heads / side.num_kv_heads * sub_blocks),
        panels(round_up(vectors, V) / V),
        total_panels(panels * side.num_kv_heads),
        steps(steps_of<Compute>(side.head_dim)),
        padded_steps(round_up(steps, kLanes)),
        groups(round_up(common.seqlen_k, kTileRows) / kTileRows),
        feature_groups(round_up(side.head_dim, kTileRows) / kTileRows),
        padded_spans(round_up(common.num_spans, kLanes)) {}

  // Sub-blocks that fill a tile if a kv head has `group` heads.
  static int64_t sub_blocks_for(int64_t group) {
    int64_t sub = 1;
    while (sub < V && group * sub < V) sub *= 2;
    return sub;
  }

  // Sizes in 32-bit elements.
  int64_t packed_rows_size() const { return side.num_kv_heads * groups * kTileRows * steps; }
  int64_t packed_columns_size() const {
    return side.num_kv_heads * groups * kStepsPerGroup * feature_groups * kTileRows;
  }
  int64_t queries_size() const { return total_panels * padded_steps * kWidth; }
  int64_t columns_size() const { return total_panels * kWidth; }
  int64_t bias_size() const {
    return side.span_bias.data ? padded_spans * total_panels * kWidth : 0;
  }
  int64_t stage_size() const {
    const int64_t query_stage = kWidth * (padded_steps > kLanes ? padded_steps : kLanes);
    const int64_t key_stage = kTileRows * (round_up(side.head_dim, kTileRows) + kTileRows);
    return query_stage > key_stage ? query_stage : key_stage;
  }

  Rows key_rows(int64_t sample, int64_t kv_head) const {
    const int64_t size = element_size(side.dtype);
    const auto at = [size](const ral_tensor& x, int64_t b, int64_t h) {
      return static_cast<const char*>(x.data) + (b * x.stride_b + h * x.stride_h) * size;
    };
    Rows source{side.dtype, at(side.k, sample, kv_head), side.k.stride_t * size,
                common.seqlen_k - side.shared_prefix};
    if (side.shared_prefix > 0) {
      source.prefix = at(side.k_prefix, side.prefix_index[sample], kv_head);
      source.prefix_stride_bytes = side.k_prefix.stride_t * size;
      source.prefix_count = side.shared_prefix;
    }
    if (common.key_padding_mask) {
      source.real = common.key_padding_mask + sample * common.key_padding_mask_stride_b;
    }
    return source;
  }

  void pack_group(int64_t sample, int64_t kv_head, int64_t group, uint32_t* stage,
                  uint32_t* packed_rows, uint32_t* packed_columns) const {
    const Rows keys = key_rows(sample, kv_head);
    pack_a_rows<Compute>(keys, group, side.head_dim, stage,
                         packed_rows + (kv_head * groups + group) * kTileRows * steps);
    if (!packed_columns) return;
    uint32_t* columns =
        packed_columns + kv_head * groups * kStepsPerGroup * feature_groups * kTileRows;
    pack_a_columns<Compute>(keys, group, side.head_dim,
                            FeatureRows::of<Compute>(side.head_dim, groups, groups), stage,
                            columns);
  }

  // Query head and row of lane `lane` of vector `vector` of one kv head. Returns false for padding.
  bool find_head_and_row(const TokenBlock& block, int64_t kv_head, int64_t vector, int64_t lane,
                         int64_t* head, int64_t* row) const {
    *row = vector % sub_blocks * kLanes + lane;
    *head = kv_head * (side.num_heads / side.num_kv_heads) + vector / sub_blocks;
    return vector < vectors && *row < block.count;
  }
  // In the mean over heads, of column `c` of [total_panels][kWidth]; 1 for padding.
  float head_weight(const TokenBlock& block, int64_t c) const {
    if (!side.head_weights) return 1.f;
    const int64_t vector = c / kWidth % panels * V + c % kWidth / kLanes;
    if (vector >= vectors) return 1.f;
    const int64_t group = side.num_heads / side.num_kv_heads;
    const int64_t head = c / kWidth / panels * group + vector / sub_blocks;
    return side.head_weights[block.batch * side.num_heads + head];
  }
  // Of the first lane of sub-block `sub` of a head, in [total_panels][kWidth].
  int64_t column_of(int64_t head, int64_t sub) const {
    const int64_t group = side.num_heads / side.num_kv_heads;
    const int64_t vector = head % group * sub_blocks + sub;
    return (head / group * panels + vector / V) * kWidth + vector % V * kLanes;
  }
  // 1 / (Z H), or 0 where the valid keys weigh less than kSmallestWeight. There the inverse, or its
  // product with a row's weight, could overflow.
  float inverse_of(float z) const {
    const float total = z * static_cast<float>(side.num_heads);
    return total < kSmallestWeight ? 0.f : 1.f / total;
  }

  // Row of column `c` of [total_panels][kWidth].
  int64_t row_of_column(int64_t c) const {
    const int64_t vector = c / kWidth % panels * V + c % kWidth / kLanes;
    return vector % sub_blocks * kLanes + c % kLanes;
  }
  const char* query(const TokenBlock& block, const ral_tensor& q, int64_t head, int64_t row) const {
    const int64_t offset =
        block.batch * q.stride_b + head * q.stride_h + (block.first_row + row) * q.stride_t;
    return static_cast<const char*>(q.data) + offset * element_size(side.dtype);
  }
  int64_t column_index(const TokenBlock& block, int64_t head, int64_t row) const {
    return (block.batch * side.num_heads + head) * common.total_rows + block.first_row + row;
  }

  // Queries as B operands: [total_panels][padded_steps][kWidth].
  void load_queries(const TokenBlock& block, uint32_t* stage, uint32_t* dst) const {
    for (int64_t panel = 0; panel < total_panels; ++panel) {
      for (int64_t i = 0; i < kWidth; ++i) {
        int64_t head, row;
        uint32_t* to = stage + i * padded_steps;
        if (find_head_and_row(block, panel / panels, panel % panels * V + i / kLanes, i % kLanes,
                              &head, &row)) {
          Compute::load_row(side.dtype, query(block, side.q, head, row), side.head_dim, to);
          memset(to + steps, 0, (padded_steps - steps) * sizeof(uint32_t));
        } else {
          memset(to, 0, padded_steps * sizeof(uint32_t));
        }
      }
      transpose_block(stage, padded_steps, dst + panel * padded_steps * kWidth, kWidth, kWidth,
                      padded_steps);
    }
  }

  // Spreads one number per head and row over [total_panels][kWidth]; `fill` where there is no row.
  void load_columns(const TokenBlock& block, const float* src, float fill, float* dst) const {
    for (int64_t i = 0; i < total_panels * kWidth; ++i) {
      int64_t head, row;
      const int64_t panel = i / kWidth;
      const bool exists = find_head_and_row(
          block, panel / panels, panel % panels * V + i % kWidth / kLanes, i % kLanes, &head, &row);
      dst[i] = exists ? src[column_index(block, head, row)] : fill;
    }
  }
  void store_columns(const TokenBlock& block, const float* src, float* dst) const {
    for (int64_t i = 0; i < total_panels * kWidth; ++i) {
      int64_t head, row;
      const int64_t panel = i / kWidth;
      if (find_head_and_row(block, panel / panels, panel % panels * V + i % kWidth / kLanes,
                            i % kLanes, &head, &row)) {
        dst[column_index(block, head, row)] = src[i];
      }
    }
  }

  // Copies the normalisers of the block's columns, [2][total_panels][kWidth], from and to the op's
  // tensor.
  void load_norm(const TokenBlock& block, const float* src, float* dst) const {
    load_columns(block, src, 0.f, dst);
    load_columns(block, src + norm_stride(), 0.f, dst + columns_size());
  }
  void store_norm(const TokenBlock& block, const float* src, float* dst) const {
    store_columns(block, src, dst);
    store_columns(block, src + columns_size(), dst + norm_stride());
  }
  int64_t norm_stride() const { return common.batch_size * side.num_heads * common.total_rows; }

  // Span bias as [padded_spans][total_panels][kWidth].
  void load_bias(const TokenBlock& block, float* dst) const {
    const ral_broadcast& b = side.span_bias;
    for (int64_t i = 0; i < total_panels * kWidth; ++i) {
      int64_t head, row;
      const int64_t panel = i / kWidth;
      const bool exists = find_head_and_row(
          block, panel / panels, panel % panels * V + i % kWidth / kLanes, i % kLanes, &head, &row);
      const float* from = static_cast<const float*>(b.data) + block.batch * b.stride_b;
      if (exists) from += head * b.stride_h + (block.first_row + row) * b.stride_t;
      for (int64_t s = 0; s < common.num_spans; ++s) {
        dst[s * total_panels * kWidth + i] = exists ? from[s * b.stride_s] : 0.f;
      }
    }
  }

  // Forms raw products of one key group with one panel of queries. Returns the factor that turns
  // them into scores in powers of two: score log2 e = acc * factor. Hidden keys come out as -inf.
  // `slope`: as in ScoreTransform.
  RAL_INLINE float score_group(const TokenBlock& block, const uint32_t* packed_rows,
                               const uint32_t* queries, const float* bias, int64_t panel,
                               int64_t group, Vec (&acc)[kTileRows][V], Vec* slope) const {
    multiply_group<Compute>(acc,
                            packed_rows + (panel / panels * groups + group) * kTileRows * steps,
                            queries + panel * padded_steps * kWidth, kWidth, steps);
    const int64_t key = group * kTileRows;
    if (__builtin_expect(side.softcap <= 0 && !bias && !common.key_padding_mask &&
                             key >= block.all_first && key + kTileRows - 1 <= block.all_last,
                         1)) {
      return side.scale * kLog2e;
    }
    transform(block, bias, panel, key, acc, slope);
    return 1.f;
  }

  const ral_policy_common& common;
  const ral_policy_side& side;
  const int64_t sub_blocks, rows, vectors, panels, total_panels, steps, padded_steps, groups,
      feature_groups, padded_spans;

 private:
  RAL_NOINLINE void transform(const TokenBlock& block, const float* bias, int64_t panel,
                              int64_t key, Vec (&acc)[kTileRows][V], Vec* slope) const {
    const KeyValidity validity(common);
    const Vec hidden = broadcast(-__builtin_inff());
    for (int r = 0; r < kTileRows; ++r) {
      const int32_t k = static_cast<int32_t>(key + r);
      const bool real = k < common.seqlen_k && !validity.is_padding(block.batch, k);
      const int32_t span =
          bias && real ? common.span_ids[block.batch * common.span_ids_stride_b + k] : -1;
      for (int v = 0; v < V; ++v) {
        const int64_t row = (panel % panels * V + v) % sub_blocks * kLanes;
        Vec x = acc[r][v] * side.scale;
        if (side.softcap > 0) {
          const Vec t = tanh(x / side.softcap);
          x = t * side.softcap;
          if (slope) slope[r * V + v] = 1.f - t * t;
        }
        if (span >= 0) x = x + load(bias + (span * total_panels + panel) * kWidth + v * kLanes);
        // finfo.min is a score like others and stays finite.
        x = select((x > hidden) & (x < kLowestScore), broadcast(kLowestScore), x);
        const IntVec seen = (load(block.first_key + row) <= k) & (load(block.last_key + row) >= k);
        // Rounded here: an FMA would leave up to half an ulp of a huge score in the exponent.
        acc[r][v] = real ? select(seen, x * kLog2e, hidden) : hidden;
      }
    }
  }
};

}  // namespace RAL_ISA
}  // namespace ral
