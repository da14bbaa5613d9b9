// Forward of `policy` and of `policy_divergence`: ral_kernels/ops/policy/README.md and
// ral_kernels/ops/policy/divergence.md.
//
// A task is one token block of one sample. It streams over the keys twice, for the normalisers and
// for the averaged weights. It stores no T x N tensor except the policy itself, where that is the
// result.
#pragma once

#include "policy/stream.h"
#include "policy/target.h"

namespace ral {
namespace RAL_ISA {

// Samples that are packed at once: as many as fit the budget, which bounds scratch.
inline int64_t samples_per_round(int64_t batch_size, int64_t bytes_per_sample) {
  constexpr int64_t kBudget = int64_t{256} << 20;
  const int64_t fit = bytes_per_sample > 0 ? kBudget / bytes_per_sample : batch_size;
  return fit < 1 ? 1 : fit < batch_size ? fit : batch_size;
}

// Reference is the compute type of the other side. `reference` is null for the policy alone.
template <class Compute, class Reference, int V>
class PolicyForward {
 public:
  static constexpr int64_t kWidth = V * kLanes;

  PolicyForward(const ral_policy_common& common, const ral_policy_side& policy,
                const ral_policy_side* reference, int64_t sub_blocks)
      : common_(common),
        policy_(common, policy, sub_blocks),
        reference_(common, reference ? *reference : policy, sub_blocks),
        compares_(reference != nullptr),
        blocks_((common.num_rows + policy_.rows - 1) / policy_.rows) {}

  const ral_policy_target* target = nullptr;  // in place of the reference policy
  float* p = nullptr;                         // results; null = not wanted
  int32_t kind = RAL_JSD;
  float* value = nullptr;
  float* u = nullptr;
  float* w = nullptr;

  int run() {
    const int threads = common_.num_threads;
    const int64_t reference_size = streams_reference() ? reference_.packed_rows_size() : 0;
    sample_size_ = policy_.packed_rows_size() + reference_size;
    const int64_t round = samples_per_round(common_.batch_size, sample_size_ * 4);
    Arena arena;
    const size_t packed = arena.reserve(round * sample_size_, 4);
    reserve_scratch();
    const size_t scratch = arena.reserve(scratch_layout_.size * threads, 4);
    if (!arena.allocate()) return RAL_OUT_OF_MEMORY;
    packed_ = arena.at<uint32_t>(packed);
    scratch_ = arena.at<uint32_t>(scratch);
    for (first_sample_ = 0; first_sample_ < common_.batch_size; first_sample_ += round) {
      const int64_t left = common_.batch_size - first_sample_;
      const int64_t samples = left < round ? left : round;
      parallel_for(threads, samples * policy_.groups, pack_task, this);
      parallel_for(threads, samples * blocks_, block_task, this);
    }
    return RAL_OK;
  }

 private:
  struct Scratch : Layout {
    int64_t stage, queries, reference_queries, bias, norm, reference_norm, valid, z, reference_z,
        mean, reference_mean, weights, moment, total, span_sums;
  };

  void reserve_scratch() {
    Scratch& s = scratch_layout_;
    const int64_t columns = policy_.columns_size();
    const int64_t reference_columns = streams_reference() ? reference_.columns_size() : 0;
    const int64_t longest = columns > reference_columns ? columns : reference_columns;
    const int64_t stage = policy_.stage_size() > reference_.stage_size() ? policy_.stage_size()
                                                                         : reference_.stage_size();
    s.stage = s.add(stage > kLanes * kChunkKeys ? stage : kLanes * kChunkKeys);
    s.queries = s.add(policy_.queries_size());
    s.reference_queries = s.add(streams_reference() ? reference_.queries_size() : 0);
    s.bias = s.add(policy_.bias_size());
    s.norm = s.add(3 * columns);  // the sums' own loss is the third
    s.reference_norm = s.add(3 * reference_columns);
    s.valid = s.add(2 * longest);
    s.z = s.add(policy_.rows);
    s.reference_z = s.add(policy_.rows);
    s.mean = s.add(kChunkKeys * policy_.rows);
    s.reference_mean = s.add(kChunkKeys * policy_.rows);
    s.weights = s.add(compares_ ? policy_.total_panels * kChunkKeys * kWidth : 0);
    s.moment = s.add(compares_ ? 2 * columns : 0);
    s.total = s.add(2 * policy_.rows);
    s.span_sums = s.add(common_.span_ids ? (policy_.padded_spans + 2) * policy_.rows : 0);
  }

  static void pack_task(void* self, int64_t task, int worker) {
    static_cast<PolicyForward*>(self)->pack(task, worker);
  }
  static void block_task(void* self, int64_t task, int worker) {
    const typename Compute::Scope scope;
    static_cast<PolicyForward*>(self)->run_block(task, worker);
  }

  bool streams_reference() const { return compares_ && !target; }

  uint32_t* packed_of(int64_t slot) const { return packed_ + slot * sample_size_; }

  void pack(int64_t task, int worker) {
    const int64_t slot = task / policy_.groups, group = task % policy_.groups;
    uint32_t* stage = scratch_ + worker * scratch_layout_.size + scratch_layout_.stage;
    const int64_t sample = first_sample_ + slot;
    for (int64_t h = 0; h < policy_.side.num_kv_heads; ++h) {
      policy_.pack_group(sample, h, group, stage, packed_of(slot), nullptr);
    }
    if (!streams_reference()) return;
    for (int64_t h = 0; h < reference_.side.num_kv_heads; ++h) {
      reference_.pack_group(sample, h, group, stage, packed_of(slot) + policy_.packed_rows_size(),
                            nullptr);
    }
  }

  // Normalisers and z of one side. Fills `norm` [2][columns]; `valid` holds W_h, z its head
  // average.
  template <class Side>
  SideBlock normalise(const Side& side, const TokenBlock& block, const uint32_t* keys,
                      uint32_t* queries, float* bias, float* norm, float* z,
                      uint32_t* scratch) const {
    const auto floats = [scratch](int64_t at) { return reinterpret_cast<float*>(scratch + at); };
    side.load_queries(block, scratch + scratch_layout_.stage, queries);
    if (bias) side.load_bias(block, bias);
    float* inverse = norm + side.columns_size();
    const SideBlock in{keys, queries, bias, norm, inverse};
    float* valid = floats(scratch_layout_.valid);
    sum_weights(side, block, in, norm, valid, inverse, WeightCache{});
    finish_sums(side, block, norm, valid, inverse, z);
    side.store_norm(block, norm, side.side.norm);
    for (int64_t i = 0; i < block.count; ++i) {
      side.side.z[block.row(common_, i)] = z[i];
    }
    return in;
  }

  void run_block(int64_t task, int worker) {
    const int64_t slot = task / blocks_;
    TokenBlock block;
    block.build(common_, policy_.side, first_sample_ + slot, task % blocks_, policy_.rows);
    uint32_t* scratch = scratch_ + worker * scratch_layout_.size;
    const Scratch& s = scratch_layout_;
    const auto floats = [scratch](int64_t at) { return reinterpret_cast<float*>(scratch + at); };
    const uint32_t* keys = packed_of(slot);

    TokenBlock reference_block = block;
    SideBlock other{};
    if (target) {
      TargetRows(common_, *target)
          .sum(block, policy_.groups, policy_.rows, floats(s.stage), floats(s.reference_mean),
               floats(s.reference_z));
      memcpy(reference_.side.z + block.row(common_, 0), floats(s.reference_z),
             block.count * sizeof(float));
    } else if (compares_) {
      reference_block.build(common_, reference_.side, block.batch, task % blocks_, policy_.rows);
      other = normalise(reference_, reference_block, keys + policy_.packed_rows_size(),
                        scratch + s.reference_queries, nullptr, floats(s.reference_norm),
                        floats(s.reference_z), scratch);
    }
    const SideBlock own = normalise(policy_, block, keys, scratch + s.queries,
                                    policy_.side.span_bias.data ? floats(s.bias) : nullptr,
                                    floats(s.norm), floats(s.z), scratch);
    if (w) policy_.store_columns(block, floats(s.valid), w);

    alignas(64) float inverse[TokenBlock::kMaxRows], reference_inverse[TokenBlock::kMaxRows];
    invert(policy_, floats(s.z), inverse);
    if (target) {
      invert_targets(floats(s.reference_z), policy_.rows, reference_inverse);
    } else if (compares_) {
      invert(reference_, floats(s.reference_z), reference_inverse);
    }
    if (p) start_policy(block, floats(s.span_sums));
    int32_t span = -1;  // of the last key that is in one
    if (compares_) {
      memset(floats(s.total), 0, 2 * policy_.rows * sizeof(float));
      memset(floats(s.moment), 0, 2 * policy_.columns_size() * sizeof(float));
    }

    GroupRange visible = visible_groups(block, GroupRange{0, policy_.groups});
    if (compares_) {  // keys on which either policy may put weight
      const GroupRange seen = visible_groups(reference_block, GroupRange{0, policy_.groups});
      if (visible.begin == visible.end) {
        visible = seen;
      } else if (seen.begin < seen.end) {
        if (seen.begin < visible.begin) visible.begin = seen.begin;
        if (seen.end > visible.end) visible.end = seen.end;
      }
    }
    for (int64_t begin = visible.begin; begin < visible.end; begin += kChunkGroups) {
      const GroupRange chunk{
          begin, begin + kChunkGroups < visible.end ? begin + kChunkGroups : visible.end};
      const int64_t count = (chunk.end - chunk.begin) * kTileRows;
      chunk_weights(policy_, block, own, chunk, floats(s.mean),
                    compares_ ? floats(s.weights) : nullptr, nullptr);
      renormalise(block, common_, chunk, policy_.rows, inverse, floats(s.mean));
      if (p) add_policy(block, chunk, floats(s.mean), floats(s.span_sums), &span, floats(s.stage));
      if (!compares_) continue;
      if (target) {
        TargetRows(common_, *target)
            .load_chunk(block, chunk, policy_.rows, floats(s.stage), floats(s.reference_mean));
      } else {
        chunk_weights(reference_, reference_block, other, chunk, floats(s.reference_mean), nullptr,
                      nullptr);
      }
      renormalise(block, common_, chunk, policy_.rows, reference_inverse, floats(s.reference_mean));
      divergence_terms(kind, count, policy_.rows, floats(s.mean), floats(s.reference_mean),
                       floats(s.total));
      add_moments(policy_, block, chunk, floats(s.weights), floats(s.reference_mean),
                  floats(s.moment), nullptr);
    }
    if (p && common_.span_ids) {
      close_span(span, floats(s.span_sums));
      finish_spans(block, floats(s.span_sums), floats(s.stage));
    }
    if (compares_)
      write_divergence(block, floats(s.total), floats(s.moment), inverse, reference_inverse);
  }

  template <class Side>
  void invert(const Side& side, const float* z, float* inverse) const {
    for (int64_t i = 0; i < side.rows; ++i) {
      inverse[i] = side.inverse_of(z[i]);
    }
  }

  float* policy_row(const TokenBlock& block, int64_t row) const {
    return p + block.row(common_, row) * common_.row_length;
  }

  void start_policy(const TokenBlock& block, float* span_sums) const {
    if (common_.span_ids) {
      memset(span_sums, 0, (policy_.padded_spans + 2) * policy_.rows * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < block.count; ++i) {
      memset(policy_row(block, i), 0, common_.row_length * sizeof(float));
    }
  }

  // Successive keys of one span are summed by themselves, after all spans in `span_sums`, and added
  // to the span where another one begins.
  void add_policy(const TokenBlock& block, GroupRange chunk, const float* mean, float* span_sums,
                  int32_t* span, float* stage) const {
    const int64_t first = chunk.begin * kTileRows;
    int64_t count = (chunk.end - chunk.begin) * kTileRows;
    if (first + count > common_.seqlen_k) count = common_.seqlen_k - first;
    if (!common_.span_ids) {
      for (int64_t sub = 0; sub < policy_.rows; sub += kLanes) {
        transpose_block(mean + sub, policy_.rows, stage, kChunkKeys, kChunkKeys, kLanes);
        for (int64_t i = 0; i < kLanes && sub + i < block.count; ++i) {
          memcpy(policy_row(block, sub + i) + first, stage + i * kChunkKeys, count * sizeof(float));
        }
      }
      return;
    }
    const int32_t* ids = common_.span_ids + block.batch * common_.span_ids_stride_b + first;
    for (int64_t key = 0; key < count; ++key) {
      if (ids[key] < 0) continue;
      if (ids[key] != *span) close_span(*span, span_sums);
      *span = ids[key];
      float* sum = span_sums + policy_.padded_spans * policy_.rows;
      for (int64_t i = 0; i < policy_.rows; i += kLanes) {
        add_to_sum(sum + i, sum + policy_.rows + i, load(mean + key * policy_.rows + i));
      }
    }
  }

  void close_span(int32_t span, float* span_sums) const {
    if (span < 0) return;
    float* sum = span_sums + policy_.padded_spans * policy_.rows;
    settle(sum, policy_.rows);
    for (int64_t i = 0; i < policy_.rows; ++i) span_sums[span * policy_.rows + i] += sum[i];
    memset(sum, 0, policy_.rows * sizeof(float));
  }

  void finish_spans(const TokenBlock& block, const float* span_sums, float* stage) const {
    for (int64_t begin = 0; begin < common_.num_spans; begin += kLanes) {
      const int64_t left = common_.num_spans - begin;
      const int64_t width = left < kLanes ? left : kLanes;
      for (int64_t sub = 0; sub < policy_.rows; sub += kLanes) {
        transpose_block(span_sums + begin * policy_.rows + sub, policy_.rows, stage, kLanes, kLanes,
                        kLanes);
        for (int64_t i = 0; i < kLanes && sub + i < block.count; ++i) {
          memcpy(policy_row(block, sub + i) + begin, stage + i * kLanes, width * sizeof(float));
        }
      }
    }
  }

  void write_divergence(const TokenBlock& block, float* total, float* moment, const float* inverse,
                        const float* reference_inverse) const {
    finish_divergence(policy_, inverse, reference_inverse, total, moment);
    for (int64_t i = 0; i < block.count; ++i) {
      value[block.row(common_, i)] = total[i];
    }
    policy_.store_columns(block, moment, u);
  }

  const ral_policy_common& common_;
  const PolicySide<Compute, V> policy_;
  const PolicySide<Reference, V> reference_;
  const bool compares_;
  const int64_t blocks_;
  int64_t sample_size_ = 0, first_sample_ = 0;
  Scratch scratch_layout_{};
  uint32_t* packed_ = nullptr;
  uint32_t* scratch_ = nullptr;
};

}  // namespace RAL_ISA
}  // namespace ral
