// The token blocks of a policy's backward. What arrives at their rows is prepared once for all key
// blocks. The key blocks add to the sums of dQ and dspan_bias in turn. Every head of a row gets the
// same gradient,
//
//   dP_h = G = w (l - c) / (Z H) on valid keys, else 0,     dS_h = P_h (G - delta_h).
//
// l is the gradient of a policy's element, from a table (policy) or from p and r (divergence).
#pragma once

#include "policy/fwd.h"
#include "policy/target.h"

namespace ral {
namespace RAL_ISA {

// What arrives at the policy's elements: `dp`, or the fields after it.
struct PolicyGradientSource {
  const float* dp = nullptr;                  // [B, T, N] or [B, T, S]
  int32_t kind = RAL_JSD;                     // or, in a comparison:
  const ral_policy_target* target = nullptr;  // in place of a reference policy
  const float* dvalue = nullptr;              // [B, T]
  const float* u = nullptr;                   // the forward's moments
  const float* w = nullptr;
};

// What a backward writes; null = not wanted.
struct PolicyGradients {
  ral_tensor dq, dk;
  float* dspan_bias = nullptr;
  float* dhead_weights = nullptr;  // [B, H]
};

// One worker's scratch for a chunk of keys.
struct StreamScratch {
  uint32_t* stage;
  float* mean;      // [kChunkKeys][rows]
  float* weights;   // [total_panels][kChunkKeys][kWidth]
  float* slope;     // likewise, or null without softcap
  float* gradient;  // [kChunkKeys][rows]
  float* moment;    // sums of [total_panels][kWidth]
  float* share;
};

template <class Compute, class Reference, int V>
class PolicyGradientBlocks {
 public:
  static constexpr int64_t kWidth = V * kLanes;

  PolicyGradientBlocks(const ral_policy_common& common, const ral_policy_side& policy,
                       const ral_policy_side* reference, const PolicyGradientSource& source,
                       const PolicyGradients& gradients, int64_t sub_blocks, int64_t block_groups)
      : policy(common, policy, sub_blocks),
        reference(common, reference ? *reference : policy, sub_blocks),
        compares(reference != nullptr),
        streams_reference(compares && !source.target),
        blocks((common.num_rows + this->policy.rows - 1) / this->policy.rows),
        columns(this->policy.panels * kWidth),
        column_steps(columns / Compute::kPair),
        padded_k(round_up(policy.head_dim, kPanel)),
        padded_d(round_up(policy.head_dim, kFeaturePadding)),
        bias_columns(this->policy.padded_spans * this->policy.columns_size()),
        packed_rows_size(this->policy.packed_rows_size()),
        packed_columns_size(this->policy.packed_columns_size()),
        sample_size(packed_rows_size + packed_columns_size +
                    (streams_reference ? this->reference.packed_rows_size() : 0)),
        common_(common),
        source_(source),
        gradients_(gradients),
        block_groups_(block_groups) {
    reserve_block();
  }

  // Size of StreamScratch::stage, in 32-bit elements.
  int64_t stage_size() const {
    int64_t stage = policy.stage_size();
    const int64_t needs[] = {reference.stage_size(), kLanes * kChunkKeys, 2 * padded_k,
                             kWidth * padded_d};
    for (const int64_t other : needs) {
      if (other > stage) stage = other;
    }
    return stage;
  }
  int64_t block_size() const { return block_layout_.size; }

  // Reserves room for `samples` samples. bind() follows the arena's allocation; begin() opens each
  // round.
  void reserve(Arena& arena, int64_t samples) {
    packed_offset_ = arena.reserve(samples * sample_size, 4);
    data_offset_ = arena.reserve(samples * blocks * block_layout_.size, 4);
    tokens_offset_ = arena.reserve(2 * samples * blocks, sizeof(TokenBlock));
    turns_offset_ = arena.reserve(samples * blocks, sizeof(int64_t));
  }
  void bind(const Arena& arena) {
    packed_ = arena.at<uint32_t>(packed_offset_);
    block_data_ = arena.at<uint32_t>(data_offset_);
    tokens_ = arena.at<TokenBlock>(tokens_offset_);
    turns_ = arena.at<int64_t>(turns_offset_);
  }
  void begin(int64_t first_sample) { first_sample_ = first_sample; }

  uint32_t* packed_of(int64_t slot) const { return packed_ + slot * sample_size; }
  // The key block whose turn it is to add to the block's sums.
  int64_t* turn(int64_t index) const { return turns_ + index; }
  float* dq_sum(int64_t index) const { return block_floats(index, block_layout_.dq); }
  float* dbias_sum(int64_t index) const { return block_floats(index, block_layout_.dbias); }
  const float* delta(int64_t index) const { return block_floats(index, block_layout_.delta); }
  const uint32_t* query_rows(int64_t index) const {
    return data_of(index, block_layout_.query_rows);
  }

  // Builds the tokens of one token block and packs its queries.
  void load_block(int64_t index, const StreamScratch& scratch) {
    const int64_t sample = first_sample_ + index / blocks, block_number = index % blocks;
    TokenBlock& block = tokens_[2 * index];
    block.build(common_, policy.side, sample, block_number, policy.rows);
    policy.load_queries(block, scratch.stage, data_of(index, block_layout_.queries));
    pack_query_rows(block, scratch.stage, data_of(index, block_layout_.query_rows));
    if (policy.side.span_bias.data) {
      policy.load_bias(block, block_floats(index, block_layout_.bias));
    }
    if (!streams_reference) return;
    TokenBlock& other = tokens_[2 * index + 1];
    other.build(common_, reference.side, sample, block_number, policy.rows);
    reference.load_queries(other, scratch.stage, data_of(index, block_layout_.reference_queries));
  }

  // Prepares what does not depend on the key block, from what the forward kept.
  void prepare(int64_t index, const StreamScratch& scratch) {
    load_block(index, scratch);
    const TokenBlock& block = own_tokens(index);
    policy.load_norm(block, policy.side.norm, block_floats(index, block_layout_.norm));
    invert(policy, block, block_floats(index, block_layout_.inverse));
    if (compares) load_reference(index);
    if (source_.dp) {
      if (common_.span_ids) load_span_gradient(block, index);
      sum_moments(index / blocks, index, scratch, scratch.moment, scratch.share);
    } else {
      const int64_t columns = policy.columns_size();
      policy.load_columns(block, source_.u, 0.f, scratch.moment);
      policy.load_columns(block, source_.w, 0.f, scratch.share);
      memset(scratch.moment + columns, 0, columns * sizeof(float));
      memset(scratch.share + columns, 0, columns * sizeof(float));
    }
    finish_moments(index, scratch.moment, scratch.share);
    if (gradients_.dspan_bias) {
      memset(block_floats(index, block_layout_.dbias), 0, bias_columns * sizeof(float));
    }

    const GroupRange visible = visible_groups(block, GroupRange{0, policy.groups});
    turns_[index] = visible.begin / block_groups_;
    if (visible.begin == visible.end) finish_unseen(index, scratch);  // no key block visits it
  }

  // Forms the normalisers of both sides of a loaded block. scratch.share receives W_h; `valid` is
  // room for the larger side's columns, `z` for its rows. With caches it forms given normalisers
  // again, because both sides' weights must come from the same stream.
  void normalise(int64_t index, bool reference_given, const StreamScratch& scratch, float* valid,
                 float* z, const WeightCache& cache, const WeightCache& reference_cache) {
    const int64_t slot = index / blocks;
    if (source_.target) {
      sum_targets(index, scratch, z);
    } else if (compares && reference_given && !reference_cache.weights) {
      load_reference(index);
    } else if (compares) {
      normalise_side(reference, reference_tokens(index), reference_side(slot, index),
                     block_floats(index, block_layout_.reference_norm), valid, z,
                     block_floats(index, block_layout_.reference_inverse), reference_cache,
                     !reference_given);
    }
    normalise_side(policy, own_tokens(index), own_side(slot, index),
                   block_floats(index, block_layout_.norm), scratch.share, z,
                   block_floats(index, block_layout_.inverse), cache, true);
  }

  void finish_divergence(int64_t index, float* total, float* moment) const {
    RAL_ISA::finish_divergence(policy, block_floats(index, block_layout_.inverse),
                               block_floats(index, block_layout_.reference_inverse), total, moment);
  }

  // Whether either policy may put weight on the keys of `chunk`.
  bool sees(int64_t index, GroupRange chunk) const {
    const GroupRange own = visible_groups(own_tokens(index), chunk);
    const GroupRange other = visible_groups(reference_tokens(index), chunk);
    return own.begin < own.end || other.begin < other.end;
  }

  // dq of a block that sees no key.
  void finish_unseen(int64_t index, const StreamScratch& scratch) const {
    memset(dq_sum(index), 0, policy.total_panels * padded_d * kWidth * sizeof(float));
    finish_queries(index, scratch);
  }

  // l of a chunk, 0 on keys that do not count: [keys][rows]. `value`, unless it is null, receives
  // the terms of a divergence. Weights of the reference come from its cache, if there is one.
  void chunk_gradient(int64_t slot, int64_t index, GroupRange chunk, float* value,
                      const StreamScratch& scratch, const WeightCache& reference_cache) const {
    const TokenBlock& block = own_tokens(index);
    const int64_t rows = policy.rows;
    const int64_t first = chunk.begin * kTileRows;
    const int64_t count = (chunk.end - chunk.begin) * kTileRows;
    float* l = scratch.gradient;
    if (compares) {
      float* mean = scratch.mean;
      renormalise(block, common_, chunk, rows, block_floats(index, block_layout_.inverse), mean);
      const TokenBlock& tokens = reference_tokens(index);
      const SideBlock in = reference_side(slot, index);
      if (source_.target) {
        TargetRows(common_, *source_.target)
            .load_chunk(block, chunk, rows, reinterpret_cast<float*>(scratch.stage), l);
      } else if (reference_cache.weights) {
        recall_weights(reference, tokens, in, chunk, chunk.begin / kChunkGroups, reference_cache,
                       false, l);
      } else {
        chunk_weights(reference, tokens, in, chunk, l, nullptr, nullptr);
      }
      renormalise(block, common_, chunk, rows, block_floats(index, block_layout_.reference_inverse),
                  l);
      divergence_terms(source_.kind, count, rows, mean, l, value);
      return;
    }
    if (common_.span_ids) {
      const int32_t* ids = common_.span_ids + block.batch * common_.span_ids_stride_b + first;
      const float* spans = block_floats(index, block_layout_.span_gradient);
      for (int64_t key = 0; key < count; ++key) {
        const int32_t span = first + key < common_.seqlen_k ? ids[key] : -1;
        if (span >= 0) {
          memcpy(l + key * rows, spans + span * rows, rows * sizeof(float));
        } else {
          memset(l + key * rows, 0, rows * sizeof(float));
        }
      }
    } else {
      float* stage = reinterpret_cast<float*>(scratch.stage);
      int64_t real = common_.seqlen_k - first;
      if (real > kChunkKeys) real = kChunkKeys;
      for (int64_t sub = 0; sub < rows; sub += kLanes) {
        memset(stage, 0, kLanes * kChunkKeys * sizeof(float));
        for (int64_t i = 0; i < kLanes && sub + i < block.count; ++i) {
          memcpy(stage + i * kChunkKeys,
                 source_.dp + block.row(common_, sub + i) * common_.row_length + first,
                 real * sizeof(float));
        }
        transpose_block(stage, kChunkKeys, l + sub, rows, kLanes, kChunkKeys);
      }
    }
    keep_valid(block, common_, chunk, rows, l);
  }

  // Turns l into G = scale (l - c) on valid keys, 0 elsewhere.
  void scale_gradient(const TokenBlock& block, int64_t index, GroupRange chunk, float* g) const {
    const float* scale = block_floats(index, block_layout_.scale);
    const float* center = block_floats(index, block_layout_.center);
    GroupValidity validity(common_, block);
    const int64_t count = (chunk.end - chunk.begin) * kTileRows;
    for (int64_t key = 0; key < count; ++key) {
      const int r = static_cast<int>(key % kTileRows);
      if (r == 0) validity.move_to(chunk.begin + key / kTileRows);
      for (int64_t i = 0; i < policy.rows; i += kLanes) {
        float* to = g + key * policy.rows + i;
        const Vec factor = load(scale + i);
        const IntVec counts = validity.lanes(r, i / kLanes) & (factor != 0.f);
        store(to, select(counts, factor * (load(to) - load(center + i)), Vec{}));
      }
    }
  }

  // Writes dq, and dspan_bias if it is wanted.
  void finish_queries(int64_t index, const StreamScratch& scratch) const {
    const TokenBlock& block = own_tokens(index);
    float* stage = reinterpret_cast<float*>(scratch.stage);
    const float* dq = block_floats(index, block_layout_.dq);
    for (int64_t panel = 0; panel < policy.total_panels; ++panel) {
      transpose_block(dq + panel * padded_d * kWidth, kWidth, stage, padded_d, padded_d, kWidth);
      for (int64_t i = 0; i < kWidth; ++i) {
        int64_t head, row;
        if (!policy.find_head_and_row(block, panel / policy.panels,
                                      panel % policy.panels * V + i / kLanes, i % kLanes, &head,
                                      &row)) {
          continue;
        }
        float* from = stage + i * padded_d;
        for (int64_t d = 0; d < policy.side.head_dim; ++d) from[d] *= policy.side.scale;
        convert_from_float(policy.side.dtype, from, policy.side.head_dim,
                           const_cast<char*>(policy.query(block, gradients_.dq, head, row)));
      }
    }
    if (!gradients_.dspan_bias) return;
    const float* dbias = block_floats(index, block_layout_.dbias);
    for (int64_t c = 0; c < policy.columns_size(); ++c) {
      int64_t head, row;
      const int64_t panel = c / kWidth;
      if (!policy.find_head_and_row(block, panel / policy.panels,
                                    panel % policy.panels * V + c % kWidth / kLanes, c % kLanes,
                                    &head, &row)) {
        continue;
      }
      float* to = gradients_.dspan_bias + policy.column_index(block, head, row) * common_.num_spans;
      for (int64_t s = 0; s < common_.num_spans; ++s) {
        to[s] = dbias[s * policy.columns_size() + c];
      }
    }
  }

  // Writes dhead_weights of a round's samples: delta_h, summed over rows in their order.
  void finish_head_weights(int64_t samples) const {
    if (!gradients_.dhead_weights) return;
    const int64_t heads = policy.side.num_heads;
    for (int64_t i = 0; i < samples * heads; ++i) {
      const int64_t slot = i / heads, head = i % heads;
      double sum = 0;
      for (int64_t index = slot * blocks; index < (slot + 1) * blocks; ++index) {
        for (int64_t row = 0; row < policy.rows; ++row) {  // delta is 0 where there is no row
          sum += double{delta(index)[policy.column_of(head, row / kLanes) + row % kLanes]};
        }
      }
      gradients_.dhead_weights[first_sample_ * heads + i] = static_cast<float>(sum);
    }
  }

  // Forms scale = w / (Z H), center = c, and delta_h of every column. Where l is far from 0, as in
  // a table, the difference in delta_h needs what the sums lost. They hold the head's weight, which
  // delta_h does not have.
  void finish_moments(int64_t index, const float* moment, const float* share) const {
    const TokenBlock& block = own_tokens(index);
    float* scale = block_floats(index, block_layout_.scale);
    float* center = block_floats(index, block_layout_.center);
    float* delta = block_floats(index, block_layout_.delta);
    const float* inverse = block_floats(index, block_layout_.inverse);
    const float* reference_inverse = block_floats(index, block_layout_.reference_inverse);
    const int64_t columns_size = policy.columns_size();
    for (int64_t i = 0; i < policy.rows; ++i) {
      float weight = i < block.count ? 1.f : 0.f;
      if (compares && i < block.count) {
        weight = source_.dvalue[block.row(common_, i)];
        if (reference_inverse[i] == 0.f) weight = 0.f;
      }
      scale[i] = weight * inverse[i];
      center[i] = 0.f;
    }
    for (int64_t c = 0; c < policy.columns_size(); ++c)
      center[policy.row_of_column(c)] += moment[c];
    for (int64_t i = 0; i < policy.rows; ++i) {
      center[i] *= inverse[i];
      // An infinite divergence has no gradient. Nor has a row without weight, whatever is in it.
      if (scale[i] == 0.f || center[i] == __builtin_inff()) scale[i] = center[i] = 0.f;
    }
    for (int64_t c = 0; c < policy.columns_size(); ++c) {
      const int64_t i = policy.row_of_column(c);
      const double u = double{moment[c]} + double{moment[columns_size + c]};
      const double w = double{share[c]} + double{share[columns_size + c]};
      const float head = policy.head_weight(block, c);
      delta[c] = scale[i] == 0.f || head == 0.f
                     ? 0.f
                     : scale[i] * static_cast<float>((u - center[i] * w) / head);
    }
  }

  const TokenBlock& own_tokens(int64_t index) const { return tokens_[2 * index]; }
  SideBlock own_side(int64_t slot, int64_t index) const {
    return SideBlock{packed_of(slot), data_of(index, block_layout_.queries),
                     policy.side.span_bias.data ? block_floats(index, block_layout_.bias) : nullptr,
                     block_floats(index, block_layout_.norm),
                     block_floats(index, block_layout_.norm) + policy.columns_size()};
  }

  const PolicySide<Compute, V> policy;
  const PolicySide<Reference, V> reference;
  const bool compares, streams_reference;
  const int64_t blocks, columns, column_steps, padded_k, padded_d, bias_columns, packed_rows_size,
      packed_columns_size, sample_size;

 private:
  struct BlockLayout : Layout {
    int64_t queries, query_rows, reference_queries, norm, reference_norm, delta, center, scale,
        inverse, reference_inverse, bias, dbias, dq, span_gradient;
  };
  void reserve_block() {
    BlockLayout& b = block_layout_;
    const int64_t columns = policy.columns_size(), rows = policy.rows;
    b.queries = b.add(policy.queries_size());
    b.query_rows = b.add(policy.side.num_kv_heads * column_steps * padded_k);
    b.reference_queries = b.add(streams_reference ? reference.queries_size() : 0);
    b.norm = b.add(3 * columns);  // the sums' own loss is the third
    b.reference_norm = b.add(streams_reference ? 3 * reference.columns_size() : 0);
    b.delta = b.add(columns);
    b.center = b.add(rows);
    b.scale = b.add(rows);
    b.inverse = b.add(rows);
    b.reference_inverse = b.add(rows);
    b.bias = b.add(policy.bias_size());
    b.dbias = b.add(gradients_.dspan_bias ? bias_columns : 0);
    b.dq = b.add(policy.total_panels * padded_d * kWidth);
    b.span_gradient = b.add(source_.dp && common_.span_ids ? policy.padded_spans * rows : 0);
  }

  uint32_t* data_of(int64_t index, int64_t offset) const {
    return block_data_ + index * block_layout_.size + offset;
  }
  float* block_floats(int64_t index, int64_t offset) const {
    return reinterpret_cast<float*>(data_of(index, offset));
  }
  const TokenBlock& reference_tokens(int64_t index) const {
    return tokens_[2 * index + (streams_reference ? 1 : 0)];
  }
  SideBlock reference_side(int64_t slot, int64_t index) const {
    return SideBlock{packed_of(slot) + packed_rows_size + packed_columns_size,
                     data_of(index, block_layout_.reference_queries), nullptr,
                     block_floats(index, block_layout_.reference_norm),
                     block_floats(index, block_layout_.reference_norm) + reference.columns_size()};
  }

  // The reference's factors, from what the forward kept.
  void load_reference(int64_t index) const {
    const TokenBlock& block = reference_tokens(index);
    float* inverse = block_floats(index, block_layout_.reference_inverse);
    if (source_.target) {
      for (int64_t i = 0; i < policy.rows; ++i) inverse[i] = 0.f;
      invert_targets(reference.side.z + block.row(common_, 0), block.count, inverse);
      return;
    }
    reference.load_norm(block, reference.side.norm,
                        block_floats(index, block_layout_.reference_norm));
    invert(reference, block, inverse);
  }

  // z of the block's targets, which it keeps, and their factors.
  void sum_targets(int64_t index, const StreamScratch& scratch, float* z) const {
    const TokenBlock& block = own_tokens(index);
    TargetRows(common_, *source_.target)
        .sum(block, policy.groups, policy.rows, reinterpret_cast<float*>(scratch.stage),
             scratch.gradient, z);
    invert_targets(z, policy.rows, block_floats(index, block_layout_.reference_inverse));
    memcpy(reference.side.z + block.row(common_, 0), z, block.count * sizeof(float));
  }

  template <class Side>
  void invert(const Side& side, const TokenBlock& block, float* inverse) const {
    for (int64_t i = 0; i < side.rows; ++i) {
      const float z = i < block.count ? side.side.z[block.row(common_, i)] : 0.f;
      inverse[i] = side.inverse_of(z);
    }
  }

  // Queries as B operands contracted over rows and heads: [kv head][panel of
  // features][steps][kPanel].
  void pack_query_rows(const TokenBlock& block, uint32_t* stage, uint32_t* dst) const {
    uint32_t* zero = stage + padded_k;
    memset(stage, 0, 2 * padded_k * sizeof(uint32_t));
    for (int64_t h = 0; h < policy.side.num_kv_heads; ++h) {
      const auto row_of = [&](int64_t column) {
        int64_t head, row;
        const bool exists =
            policy.find_head_and_row(block, h, column / kLanes, column % kLanes, &head, &row);
        return exists ? policy.query(block, policy.side.q, head, row)
                      : reinterpret_cast<const char*>(zero);
      };
      for (int64_t step = 0; step < column_steps; ++step) {
        const int64_t c = step * Compute::kPair;
        Compute::load_row_pair(policy.side.dtype, row_of(c), row_of(c + Compute::kPair - 1),
                               policy.side.head_dim, stage);
        for (int64_t panel = 0; panel < padded_k / kPanel; ++panel) {
          memcpy(dst + ((h * (padded_k / kPanel) + panel) * column_steps + step) * kPanel,
                 stage + panel * kPanel, kPanel * sizeof(uint32_t));
        }
      }
    }
  }

  void load_span_gradient(const TokenBlock& block, int64_t index) const {
    float* dst = block_floats(index, block_layout_.span_gradient);
    for (int64_t i = 0; i < policy.rows; ++i) {
      const float* row = source_.dp + block.row(common_, i) * common_.row_length;
      for (int64_t s = 0; s < common_.num_spans; ++s) {
        dst[s * policy.rows + i] = i < block.count ? row[s] : 0.f;
      }
    }
  }

  // U_h and W_h of a gradient that comes as a table: one more pass over the keys.
  void sum_moments(int64_t slot, int64_t index, const StreamScratch& scratch, float* moment,
                   float* share) const {
    const TokenBlock& block = own_tokens(index);
    memset(moment, 0, 2 * policy.columns_size() * sizeof(float));
    memset(share, 0, 2 * policy.columns_size() * sizeof(float));
    const GroupRange visible = visible_groups(block, GroupRange{0, policy.groups});
    for (int64_t begin = visible.begin; begin < visible.end; begin += kChunkGroups) {
      const GroupRange chunk{
          begin, begin + kChunkGroups < visible.end ? begin + kChunkGroups : visible.end};
      chunk_weights(policy, block, own_side(slot, index), chunk, scratch.mean, scratch.weights,
                    nullptr);
      chunk_gradient(slot, index, chunk, nullptr, scratch, WeightCache{});
      add_moments(policy, block, chunk, scratch.weights, scratch.gradient, moment, share);
    }
  }

  template <class Side>
  void normalise_side(const Side& side, const TokenBlock& block, const SideBlock& in, float* norm,
                      float* valid, float* z, float* inverse, const WeightCache& cache,
                      bool keeps) const {
    float* inverse_sum = norm + side.columns_size();
    sum_weights(side, block, in, norm, valid, inverse_sum, cache);
    finish_sums(side, block, norm, valid, inverse_sum, z);
    if (keeps && side.side.norm) side.store_norm(block, norm, side.side.norm);
    for (int64_t i = 0; i < side.rows; ++i) {
      inverse[i] = side.inverse_of(z[i]);
      if (keeps && side.side.z && i < block.count) {
        side.side.z[block.row(common_, i)] = z[i];
      }
    }
  }

  const ral_policy_common& common_;
  const PolicyGradientSource source_;
  const PolicyGradients gradients_;
  const int64_t block_groups_;
  int64_t first_sample_ = 0;
  BlockLayout block_layout_{};
  size_t packed_offset_ = 0, data_offset_ = 0, tokens_offset_ = 0, turns_offset_ = 0;
  uint32_t* packed_ = nullptr;
  uint32_t* block_data_ = nullptr;
  TokenBlock* tokens_ = nullptr;
  int64_t* turns_ = nullptr;
};

}  // namespace RAL_ISA
}  // namespace ral
