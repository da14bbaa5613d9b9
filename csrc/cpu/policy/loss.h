// A loss on `policy_divergence` together with its gradient: the sum over rows of weight *
// divergence, for weights that are known before the divergence.
// ral_kernels/ops/policy/divergence.md.
//
// A task is one token block of one sample. It streams over the keys for the normalisers, again for
// both policies and the moments, and a third time for dS, which needs the moments. If the heads'
// weights fit kCacheBytes, the first stream keeps them and the others read them, which is faster.
// Otherwise they are formed again. l is kept between the last two streams. The token blocks add to
// dK in turn.
#pragma once

#include "policy/products.h"

namespace ral {
namespace RAL_ISA {

template <class Compute, class Reference, int V>
class PolicyLoss : private PolicyProducts<Compute, Reference, V> {
  using Base = PolicyProducts<Compute, Reference, V>;
  using Base::blocks_, Base::common_, Base::first_sample_, Base::floats, Base::kBlockGroups,
      Base::kBlockKeys, Base::key_blocks_, Base::policy_, Base::scratch_, Base::scratch_layout_;

 public:
  static constexpr int64_t kCacheBytes = int64_t{128} << 20;  // of all workers together
  static constexpr int64_t kPackedSharers = 4;  // as many workers are taken for granted

  PolicyLoss(const ral_policy_common& common, const ral_policy_side& policy,
             const ral_policy_side& reference, const PolicyGradientSource& source, float* value,
             const PolicyGradients& gradients, bool reference_given, int64_t sub_blocks)
      : Base(common, policy, &reference, source, gradients, sub_blocks),
        value_(value),
        reference_given_(reference_given) {}

  int run() {
    const int threads = common_.num_threads;
    chunks_ = (policy_.groups + kChunkGroups - 1) / kChunkGroups;
    head_stride_ = key_blocks_ * kBlockKeys * blocks_.padded_k;
    chunk_weights_size_ = policy_.total_panels * kChunkKeys * Base::kWidth;
    const int64_t columns = policy_.columns_size();
    const int64_t other = blocks_.streams_reference ? blocks_.reference.columns_size() : 0;
    const int64_t cache_size = chunks_ * (kChunkKeys + 1) * (columns + other);
    // A sequence of a packed call may run on one thread or on all. Its bits must not depend on
    // that.
    const int64_t sharers = common_.max_keys > 0 ? kPackedSharers : threads;
    caches_ = policy_.side.softcap <= 0 && cache_size * sharers * int64_t{4} <= kCacheBytes;
    this->reserve_scratch();
    extra_.valid = extra_.add(2 * (columns > other ? columns : other));
    extra_.z = extra_.add(policy_.rows);
    extra_.total = extra_.add(2 * policy_.rows);
    extra_.l = extra_.add(chunks_ * kChunkKeys * policy_.rows);
    extra_.weights = extra_.add(caches_ ? chunks_ * kChunkKeys * columns : 0);
    extra_.stabilisers = extra_.add(caches_ ? chunks_ * columns : 0);
    extra_.reference_weights = extra_.add(caches_ ? chunks_ * kChunkKeys * other : 0);
    extra_.reference_stabilisers = extra_.add(caches_ ? chunks_ * other : 0);

    const int64_t dk_size = policy_.side.num_kv_heads * head_stride_;
    const int64_t per_sample =
        (blocks_.sample_size + blocks_.blocks * blocks_.block_size() + dk_size) * 4;
    const int64_t round = samples_per_round(common_.batch_size, per_sample);
    Arena arena;
    blocks_.reserve(arena, round);
    const size_t dk = arena.reserve(round * dk_size, 4);
    const size_t turns = arena.reserve(round * key_blocks_, sizeof(Turn));
    const size_t scratch = arena.reserve(scratch_layout_.size * threads, 4);
    const size_t extra = arena.reserve(extra_.size * threads, 4);
    if (!arena.allocate()) return RAL_OUT_OF_MEMORY;
    blocks_.bind(arena);
    dk_sums_ = arena.at<float>(dk);
    turns_ = arena.at<Turn>(turns);
    scratch_ = arena.at<uint32_t>(scratch);
    extra_data_ = arena.at<uint32_t>(extra);
    for (first_sample_ = 0; first_sample_ < common_.batch_size; first_sample_ += round) {
      const int64_t left = common_.batch_size - first_sample_;
      const int64_t samples = left < round ? left : round;
      blocks_.begin(first_sample_);
      for (int64_t i = 0; i < samples * key_blocks_; ++i) turns_[i] = Turn{0, false};
      parallel_for(threads, samples * policy_.groups, pack_task, this);
      parallel_for(threads, samples * blocks_.blocks, block_task, this);
      blocks_.finish_head_weights(samples);
    }
    return RAL_OK;
  }

 private:
  // Whose turn it is to add to dK of one key block, and whether any token block has.
  struct Turn {
    int64_t order;
    bool started;
  };
  struct Extra : Layout {
    int64_t valid, z, total, l, weights, stabilisers, reference_weights, reference_stabilisers;
  };

  static void pack_task(void* self, int64_t task, int worker) {
    static_cast<PolicyLoss*>(self)->pack(task, worker);
  }
  static void block_task(void* self, int64_t task, int worker) {
    const typename Compute::Scope scope;
    static_cast<PolicyLoss*>(self)->run_block(task, worker);
  }

  float* extra(int worker, int64_t offset) const {
    return reinterpret_cast<float*>(extra_data_ + worker * extra_.size + offset);
  }
  GroupRange chunk_groups(int64_t chunk) const {
    const int64_t end = (chunk + 1) * kChunkGroups;
    return GroupRange{chunk * kChunkGroups, end < policy_.groups ? end : policy_.groups};
  }

  void run_block(int64_t task, int worker) {
    // Last rows first: under a causal mask they see the most keys.
    const int64_t slot = task / blocks_.blocks, order = task % blocks_.blocks;
    const int64_t index = slot * blocks_.blocks + blocks_.blocks - 1 - order;
    const StreamScratch scratch = this->stream_scratch(worker);
    blocks_.load_block(index, scratch);
    blocks_.normalise(index, reference_given_, scratch, extra(worker, extra_.valid),
                      extra(worker, extra_.z), cache(worker), reference_cache(worker));
    compare(slot, index, scratch, worker);

    bool started = false;
    for (int64_t key_block = 0; key_block < key_blocks_; ++key_block) {
      const GroupRange keys = this->key_block_groups(key_block);
      const GroupRange seen = visible_groups(blocks_.own_tokens(index), keys);
      const bool sees = seen.begin < seen.end;
      if (sees) {
        for (int64_t begin = keys.begin; begin < keys.end; begin += kChunkGroups) {
          score_gradients(slot, index, begin / kChunkGroups, begin - keys.begin, scratch, worker);
        }
        this->add_to_queries(slot, index, keys, started, worker);
        started = true;
      }
      add_in_turn(slot, index, order, key_block, keys, sees, worker);
    }
    if (started) {
      blocks_.finish_queries(index, scratch);
    } else {
      blocks_.finish_unseen(index, scratch);
    }
  }

  // The divergence of the block's rows. It keeps l, and the weights if they fit.
  void compare(int64_t slot, int64_t index, const StreamScratch& scratch, int worker) {
    const TokenBlock& block = blocks_.own_tokens(index);
    float* total = extra(worker, extra_.total);
    memset(total, 0, 2 * policy_.rows * sizeof(float));
    memset(scratch.moment, 0, 2 * policy_.columns_size() * sizeof(float));
    for (int64_t i = 0; i < chunks_; ++i) {
      const GroupRange chunk = chunk_groups(i);
      if (!blocks_.sees(index, chunk)) continue;
      const StreamScratch used = weights_at(i, scratch, worker);
      if (caches_) {
        recall_weights(policy_, block, blocks_.own_side(slot, index), chunk, i, cache(worker), true,
                       used.mean);
      } else {
        chunk_weights(policy_, block, blocks_.own_side(slot, index), chunk, used.mean, used.weights,
                      nullptr);
      }
      blocks_.chunk_gradient(slot, index, chunk, total, used, reference_cache(worker));
      add_moments(policy_, block, chunk, used.weights, used.gradient, used.moment, nullptr);
      memcpy(extra(worker, extra_.l) + i * kChunkKeys * policy_.rows, used.gradient,
             kChunkKeys * policy_.rows * sizeof(float));
    }
    blocks_.finish_divergence(index, total, scratch.moment);
    for (int64_t i = 0; i < block.count; ++i) {
      value_[block.row(common_, i)] = total[i];
    }
    blocks_.finish_moments(index, scratch.moment, scratch.share);
  }

  WeightCache cache(int worker) const {
    if (!caches_) return WeightCache{};
    return WeightCache{extra(worker, extra_.weights), extra(worker, extra_.stabilisers)};
  }
  WeightCache reference_cache(int worker) const {
    if (!caches_ || !blocks_.streams_reference) return WeightCache{};
    return WeightCache{extra(worker, extra_.reference_weights),
                       extra(worker, extra_.reference_stabilisers)};
  }
  // The worker's scratch, with the kept weights of chunk `i` if there are any.
  StreamScratch weights_at(int64_t i, StreamScratch scratch, int worker) const {
    if (caches_) scratch.weights = cache(worker).chunk(policy_, i);
    return scratch;
  }

  void score_gradients(int64_t slot, int64_t index, int64_t i, int64_t first_group,
                       const StreamScratch& scratch, int worker) const {
    const TokenBlock& block = blocks_.own_tokens(index);
    const GroupRange chunk = chunk_groups(i);
    if (!blocks_.sees(index, chunk)) {
      memset(scratch.weights, 0, chunk_weights_size_ * sizeof(float));
      memset(scratch.gradient, 0, kChunkKeys * policy_.rows * sizeof(float));
      if (scratch.slope) memset(scratch.slope, 0, chunk_weights_size_ * sizeof(float));
      this->form_ds_tiles(index, chunk, first_group, scratch, worker);
      return;
    }
    if (!caches_) {
      chunk_weights(policy_, block, blocks_.own_side(slot, index), chunk, scratch.mean,
                    scratch.weights, scratch.slope);
    }
    memcpy(scratch.gradient, extra(worker, extra_.l) + i * kChunkKeys * policy_.rows,
           kChunkKeys * policy_.rows * sizeof(float));
    blocks_.scale_gradient(block, index, chunk, scratch.gradient);
    this->form_ds_tiles(index, chunk, first_group, weights_at(i, scratch, worker), worker);
  }

  // Adds to dK of one key block in this token block's turn. The last one writes dk.
  void add_in_turn(int64_t slot, int64_t index, int64_t order, int64_t key_block, GroupRange keys,
                   bool sees, int worker) const {
    Turn& turn = turns_[slot * key_blocks_ + key_block];
    for (int64_t i = 0; __atomic_load_n(&turn.order, __ATOMIC_ACQUIRE) != order; ++i) {
      spin_pause(i);
    }
    float* dk = dk_sums_ + slot * policy_.side.num_kv_heads * head_stride_ +
                keys.begin * kTileRows * blocks_.padded_k;
    if (sees) {
      this->add_to_keys(index, keys, keys.begin, turn.started, worker, dk, head_stride_);
      turn.started = true;
    }
    if (order == blocks_.blocks - 1) {
      if (!turn.started) {
        for (int64_t h = 0; h < policy_.side.num_kv_heads; ++h) {
          memset(dk + h * head_stride_, 0, kBlockKeys * blocks_.padded_k * sizeof(float));
        }
      }
      this->finish_keys(slot, keys, dk, head_stride_);
    }
    __atomic_store_n(&turn.order, order + 1, __ATOMIC_RELEASE);
  }

  float* const value_;
  const bool reference_given_;
  int64_t chunks_ = 0, head_stride_ = 0, chunk_weights_size_ = 0;
  bool caches_ = false;
  Extra extra_{};
  float* dk_sums_ = nullptr;
  Turn* turns_ = nullptr;
  uint32_t* extra_data_ = nullptr;
};

}  // namespace RAL_ISA
}  // namespace ral
