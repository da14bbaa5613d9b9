// Backward of `policy` and of `policy_divergence`: dq, dk and dspan_bias. It recomputes both
// policies chunk by chunk (policy/bwd_blocks.h). A task is one key block of one sample. The key
// blocks add to dQ in turn, as in attention/bwd_keys.h.
#pragma once

#include "policy/products.h"

namespace ral {
namespace RAL_ISA {

template <class Compute, class Reference, int V>
class PolicyBackward : private PolicyProducts<Compute, Reference, V> {
  using Base = PolicyProducts<Compute, Reference, V>;
  using Base::blocks_, Base::common_, Base::first_sample_, Base::floats, Base::has_bias_gradient_,
      Base::kBlockGroups, Base::kBlockKeys, Base::key_blocks_, Base::policy_, Base::scratch_,
      Base::scratch_layout_;

 public:
  PolicyBackward(const ral_policy_common& common, const ral_policy_side& policy,
                 const ral_policy_side* reference, const PolicyGradientSource& source,
                 const PolicyGradients& gradients, int64_t sub_blocks)
      : Base(common, policy, reference, source, gradients, sub_blocks) {}

  int run() {
    const int threads = common_.num_threads;
    this->reserve_scratch();
    const int64_t per_sample = (blocks_.sample_size + blocks_.blocks * blocks_.block_size()) * 4;
    const int64_t round = samples_per_round(common_.batch_size, per_sample);
    Arena arena;
    blocks_.reserve(arena, round);
    const size_t scratch = arena.reserve(scratch_layout_.size * threads, 4);
    if (!arena.allocate()) return RAL_OUT_OF_MEMORY;
    blocks_.bind(arena);
    scratch_ = arena.at<uint32_t>(scratch);
    if (has_bias_gradient_) {
      for (int worker = 0; worker < threads; ++worker) {
        memset(floats(worker, scratch_layout_.dbias), 0, blocks_.bias_columns * sizeof(float));
      }
    }
    for (first_sample_ = 0; first_sample_ < common_.batch_size; first_sample_ += round) {
      const int64_t left = common_.batch_size - first_sample_;
      const int64_t samples = left < round ? left : round;
      blocks_.begin(first_sample_);
      parallel_for(threads, samples * policy_.groups, pack_task, this);
      parallel_for(threads, samples * blocks_.blocks, prepare_task, this);
      blocks_.finish_head_weights(samples);
      parallel_for(threads, samples * key_blocks_, key_block_task, this);
    }
    return RAL_OK;
  }

 private:
  static void pack_task(void* self, int64_t task, int worker) {
    static_cast<PolicyBackward*>(self)->pack(task, worker);
  }
  static void prepare_task(void* self, int64_t task, int worker) {
    const typename Compute::Scope scope;
    PolicyBackward* backward = static_cast<PolicyBackward*>(self);
    backward->blocks_.prepare(task, backward->stream_scratch(worker));
  }
  static void key_block_task(void* self, int64_t task, int worker) {
    const typename Compute::Scope scope;
    static_cast<PolicyBackward*>(self)->run_key_block(task, worker);
  }

  void run_key_block(int64_t task, int worker) {
    const int64_t slot = task / key_blocks_, key_block = task % key_blocks_;
    const GroupRange keys = this->key_block_groups(key_block);
    const int64_t head_stride = kBlockKeys * blocks_.padded_k;
    float* dk = floats(worker, scratch_layout_.dk);
    memset(dk, 0, policy_.side.num_kv_heads * head_stride * sizeof(float));
    // last rows first, as in attention/bwd_keys.h
    for (int64_t i = blocks_.blocks - 1; i >= 0; --i) {
      const int64_t index = slot * blocks_.blocks + i;
      const GroupRange seen = visible_groups(blocks_.own_tokens(index), keys);
      if (seen.begin == seen.end) continue;
      for (int64_t begin = seen.begin; begin < seen.end; begin += kChunkGroups) {
        const GroupRange chunk{begin,
                               begin + kChunkGroups < seen.end ? begin + kChunkGroups : seen.end};
        score_gradients(slot, index, chunk, begin - seen.begin, worker);
      }
      this->add_to_keys(index, seen, keys.begin, true, worker, dk, head_stride);
      add_in_turn(slot, index, key_block, seen, worker);
    }
    this->finish_keys(slot, keys, dk, head_stride);
  }

  void score_gradients(int64_t slot, int64_t index, GroupRange chunk, int64_t first_group,
                       int worker) const {
    const TokenBlock& block = blocks_.own_tokens(index);
    const StreamScratch scratch = this->stream_scratch(worker);
    chunk_weights(policy_, block, blocks_.own_side(slot, index), chunk, scratch.mean,
                  scratch.weights, scratch.slope);
    blocks_.chunk_gradient(slot, index, chunk, nullptr, scratch, WeightCache{});
    blocks_.scale_gradient(block, index, chunk, scratch.gradient);
    this->form_ds_tiles(index, chunk, first_group, scratch, worker);
  }

  // Adds to the token block's sums in this key block's turn. The last one writes dq and dspan_bias.
  void add_in_turn(int64_t slot, int64_t index, int64_t key_block, GroupRange seen,
                   int worker) const {
    int64_t* turn = blocks_.turn(index);
    for (int64_t i = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != key_block; ++i) spin_pause(i);
    const GroupRange all = visible_groups(blocks_.own_tokens(index), GroupRange{0, policy_.groups});
    const bool first = key_block == all.begin / kBlockGroups;
    this->add_to_queries(slot, index, seen, !first, worker);
    if (has_bias_gradient_) {
      float* local = floats(worker, scratch_layout_.dbias);
      float* total = blocks_.dbias_sum(index);
      for (int64_t i = 0; i < blocks_.bias_columns; i += kLanes) {
        store(total + i, load(total + i) + load(local + i));
        store(local + i, Vec{});
      }
    }
    if (key_block == (all.end - 1) / kBlockGroups) {
      blocks_.finish_queries(index, this->stream_scratch(worker));
    }
    __atomic_store_n(turn, key_block + 1, __ATOMIC_RELEASE);
  }
};

}  // namespace RAL_ISA
}  // namespace ral
