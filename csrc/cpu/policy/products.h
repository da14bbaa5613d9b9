// The two matrix products of a policy's gradient, dK += dS^T Q and dQ^T += K^T dS^T, for one key
// block and one token block. It also forms the tiles of dS that go into them. policy/bwd.h walks
// over key blocks first, policy/loss.h over token blocks; both use this.
#pragma once

#include "policy/bwd_blocks.h"

namespace ral {
namespace RAL_ISA {

template <class Compute, class Reference, int V>
class PolicyProducts {
 public:
  static constexpr int64_t kWidth = V * kLanes;
  static constexpr int64_t kStepsPerGroup = kTileRows / Compute::kPair;
  static constexpr int64_t kBlockGroups = 2 * kChunkGroups;  // per key block
  static constexpr int64_t kBlockKeys = kBlockGroups * kTileRows;

  PolicyProducts(const PolicyProducts&) = delete;
  PolicyProducts& operator=(const PolicyProducts&) = delete;

 protected:
  PolicyProducts(const ral_policy_common& common, const ral_policy_side& policy,
                 const ral_policy_side* reference, const PolicyGradientSource& source,
                 const PolicyGradients& gradients, int64_t sub_blocks)
      : common_(common),
        blocks_(common, policy, reference, source, gradients, sub_blocks, kBlockGroups),
        policy_(blocks_.policy),
        dk_(gradients.dk),
        has_bias_gradient_(gradients.dspan_bias != nullptr),
        key_blocks_((policy_.groups + kBlockGroups - 1) / kBlockGroups) {}
  ~PolicyProducts() = default;

  struct Scratch : Layout {
    int64_t stage, mean, weights, slope, gradient, moment, share, ds_rows, ds_pairs, dk, dbias;
  };

  void reserve_scratch() {
    Scratch& s = scratch_layout_;
    const int64_t rows = policy_.rows, kv_heads = policy_.side.num_kv_heads;
    const int64_t weights = policy_.total_panels * kChunkKeys * kWidth;
    s.stage = s.add(blocks_.stage_size());
    s.mean = s.add(kChunkKeys * rows);
    s.weights = s.add(weights);
    s.slope = s.add(capped() ? weights : 0);
    s.gradient = s.add(kChunkKeys * rows);
    s.moment = s.add(2 * policy_.columns_size());
    s.share = s.add(2 * policy_.columns_size());
    s.ds_rows = s.add(kv_heads * kBlockKeys * blocks_.column_steps);
    // With one number per element both forms of dS are the same.
    s.ds_pairs = Compute::kPair == 1
                     ? s.ds_rows
                     : s.add(kv_heads * kBlockKeys / Compute::kPair * blocks_.columns);
    s.dk = s.add(kv_heads * kBlockKeys * blocks_.padded_k);
    s.dbias = s.add(has_bias_gradient_ ? blocks_.bias_columns : 0);
  }

  bool capped() const { return policy_.side.softcap > 0; }

  StreamScratch stream_scratch(int worker) const {
    const Scratch& s = scratch_layout_;
    return StreamScratch{scratch_at(worker, s.stage), floats(worker, s.mean),
                         floats(worker, s.weights),   capped() ? floats(worker, s.slope) : nullptr,
                         floats(worker, s.gradient),  floats(worker, s.moment),
                         floats(worker, s.share)};
  }

  uint32_t* scratch_at(int worker, int64_t offset) const {
    return scratch_ + worker * scratch_layout_.size + offset;
  }
  float* floats(int worker, int64_t offset) const {
    return reinterpret_cast<float*>(scratch_at(worker, offset));
  }

  GroupRange key_block_groups(int64_t key_block) const {
    GroupRange keys{key_block * kBlockGroups, (key_block + 1) * kBlockGroups};
    if (keys.end > policy_.groups) keys.end = policy_.groups;
    return keys;
  }

  void pack(int64_t task, int worker) {
    const int64_t slot = task / policy_.groups, group = task % policy_.groups;
    const int64_t sample = first_sample_ + slot;
    uint32_t* stage = scratch_at(worker, scratch_layout_.stage);
    uint32_t* rows = blocks_.packed_of(slot);
    uint32_t* columns = rows + blocks_.packed_rows_size;
    for (int64_t h = 0; h < policy_.side.num_kv_heads; ++h) {
      policy_.pack_group(sample, h, group, stage, rows, columns);
    }
    if (!blocks_.streams_reference) return;
    uint32_t* reference_rows = columns + blocks_.packed_columns_size;
    for (int64_t h = 0; h < blocks_.reference.side.num_kv_heads; ++h) {
      blocks_.reference.pack_group(sample, h, group, stage, reference_rows, nullptr);
    }
  }

  // dS of one chunk for all heads, from weights and G in scratch, as operands of both products.
  // `first_group` counts from the first group that the operands hold.
  void form_ds_tiles(int64_t index, GroupRange chunk, int64_t first_group,
                     const StreamScratch& scratch, int worker) const {
    const TokenBlock& block = blocks_.own_tokens(index);
    const float* g = scratch.gradient;
    const float* delta = blocks_.delta(index);
    for (int64_t panel = 0; panel < policy_.total_panels; ++panel) {
      const int64_t kv_head = panel / policy_.panels, local = panel % policy_.panels;
      for (int64_t group = chunk.begin; group < chunk.end; ++group) {
        const int64_t row_group = first_group + group - chunk.begin;
        uint32_t* rows = scratch_at(worker, scratch_layout_.ds_rows) +
                         (kv_head * kBlockKeys + row_group * kTileRows) * blocks_.column_steps +
                         local * kWidth / Compute::kPair;
        uint32_t* pairs =
            scratch_at(worker, scratch_layout_.ds_pairs) +
            (kv_head * kBlockKeys / Compute::kPair + row_group * kStepsPerGroup) * blocks_.columns +
            local * kWidth;
        for (int first = 0; first < kTileRows; first += kFewRows) {
          const int64_t key = (group - chunk.begin) * kTileRows + first;
          const float* p = scratch.weights + (panel * kChunkKeys + key) * kWidth;
          Vec ds[kFewRows][V];
          RAL_UNROLL for (int v = 0; v < V; ++v) {
            const Vec d = load(delta + panel * kWidth + v * kLanes);
            const int64_t sub = (local * V + v) % policy_.sub_blocks * kLanes;
            RAL_UNROLL for (int r = 0; r < kFewRows; ++r) {
              ds[r][v] = load(p + r * kWidth + v * kLanes) *
                         (load(g + (key + r) * policy_.rows + sub) - d);
            }
          }
          if (has_bias_gradient_) {
            add_bias_gradient(block, panel, group * kTileRows + first, ds, worker);
          }
          if (capped()) {
            const float* s = scratch.slope + (panel * kChunkKeys + key) * kWidth;
            for (int r = 0; r < kFewRows; ++r) {
              for (int v = 0; v < V; ++v) ds[r][v] *= load(s + r * kWidth + v * kLanes);
            }
          }
          Compute::store_rows_and_pairs(
              ds, rows + first * blocks_.column_steps, blocks_.column_steps,
              pairs + first / Compute::kPair * blocks_.columns, blocks_.columns);
        }
      }
    }
  }

  void add_bias_gradient(const TokenBlock& block, int64_t panel, int64_t first_key,
                         const Vec (&ds)[kFewRows][V], int worker) const {
    const int32_t* ids = common_.span_ids + block.batch * common_.span_ids_stride_b;
    for (int r = 0; r < kFewRows; ++r) {
      const int64_t key = first_key + r;
      if (key >= common_.seqlen_k || ids[key] < 0) continue;
      float* to = floats(worker, scratch_layout_.dbias) + ids[key] * policy_.columns_size() +
                  panel * kWidth;
      for (int v = 0; v < V; ++v) store(to + v * kLanes, load(to + v * kLanes) + ds[r][v]);
    }
  }

  // dK += dS^T Q. `dk` holds the rows from key group `first_group` on; heads are `head_stride`
  // apart.
  void add_to_keys(int64_t index, GroupRange seen, int64_t first_group, bool add, int worker,
                   float* dk, int64_t head_stride) const {
    const int64_t head_dim = policy_.side.head_dim;
    for (int64_t h = 0; h < policy_.side.num_kv_heads; ++h) {
      const uint32_t* a =
          scratch_at(worker, scratch_layout_.ds_rows) + h * kBlockKeys * blocks_.column_steps;
      const uint32_t* b = blocks_.query_rows(index) + h * blocks_.column_steps * blocks_.padded_k;
      float* to = dk + h * head_stride;
      for (int64_t feature = 0; feature < head_dim; feature += kPanel) {
        for (int64_t group = seen.begin; group < seen.end; ++group) {
          const Product product{a + (group - seen.begin) * kTileRows * blocks_.column_steps,
                                blocks_.column_steps, b + feature * blocks_.column_steps, kPanel,
                                blocks_.column_steps};
          accumulate_panel<Compute, AOperand::kRowMajor>(
              kTileRows, head_dim - feature,
              to + (group - first_group) * kTileRows * blocks_.padded_k + feature, blocks_.padded_k,
              add, product);
        }
      }
    }
  }

  // dQ^T += K^T dS^T.
  void add_to_queries(int64_t slot, int64_t index, GroupRange seen, bool add, int worker) const {
    const int64_t total_steps = policy_.groups * kStepsPerGroup;
    const int64_t head_dim = policy_.side.head_dim;
    float* dq = blocks_.dq_sum(index);
    for (int64_t panel = 0; panel < policy_.total_panels; ++panel) {
      const int64_t kv_head = panel / policy_.panels;
      const uint32_t* keys = blocks_.packed_of(slot) + blocks_.packed_rows_size +
                             kv_head * total_steps * policy_.feature_groups * kTileRows;
      const uint32_t* ds = scratch_at(worker, scratch_layout_.ds_pairs) +
                           kv_head * kBlockKeys / Compute::kPair * blocks_.columns +
                           panel % policy_.panels * kWidth;
      for (int64_t g = 0; g < policy_.feature_groups; ++g) {
        const int64_t d = g * kTileRows;
        const Product product{keys + (g * total_steps + seen.begin * kStepsPerGroup) * kTileRows, 0,
                              ds, blocks_.columns, (seen.end - seen.begin) * kStepsPerGroup};
        // With this prefetch the product takes 0.77x the time at 8k keys. In `attention`, whose
        // operands are nearer, the same prefetch costs 2 to 4 %.
        if (g + 1 < policy_.feature_groups) {
          prefetch_packed(product.a + total_steps * kTileRows, product.steps);
        }
        accumulate_rows<Compute, AOperand::kPacked, V>(
            head_dim - d < kTileRows ? head_dim - d : kTileRows,
            dq + (panel * blocks_.padded_d + d) * kWidth, kWidth, add, product);
      }
    }
  }

  void finish_keys(int64_t slot, GroupRange keys, float* dk, int64_t head_stride) const {
    const int64_t size = element_size(policy_.side.dtype);
    for (int64_t h = 0; h < policy_.side.num_kv_heads; ++h) {
      char* target = static_cast<char*>(dk_.data) +
                     ((first_sample_ + slot) * dk_.stride_b + h * dk_.stride_h) * size;
      for (int64_t key = keys.begin * kTileRows;
           key < keys.end * kTileRows && key < common_.seqlen_k; ++key) {
        float* row = dk + h * head_stride + (key - keys.begin * kTileRows) * blocks_.padded_k;
        for (int64_t d = 0; d < policy_.side.head_dim; ++d) row[d] *= policy_.side.scale;
        convert_from_float(policy_.side.dtype, row, policy_.side.head_dim,
                           target + key * dk_.stride_t * size);
      }
    }
  }

  const ral_policy_common& common_;
  PolicyGradientBlocks<Compute, Reference, V> blocks_;
  const PolicySide<Compute, V>& policy_;
  const ral_tensor dk_;
  const bool has_bias_gradient_;
  const int64_t key_blocks_;
  int64_t first_sample_ = 0;
  Scratch scratch_layout_{};
  uint32_t* scratch_ = nullptr;
};

}  // namespace RAL_ISA
}  // namespace ral
