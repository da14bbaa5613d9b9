// A target in the place of the reference policy: distributions that rows share. Equation (11) of
// ral_kernels/ops/policy/divergence.md.
//
// Weights of all keys are read where they are compared, tile by tile. Weights of some keys, with
// ids, are first scattered into the r of a chunk of rows.
#pragma once

#include "policy/side.h"
#include "ral/divergence_math.h"

namespace ral {
namespace cuda {

// The keys that are valid for a row by position. They exist; padding and scope are not looked at.
struct KeysOfRow {
  int32_t low, high;
  int32_t own;  // a key that does not count, or -1

  RAL_DEVICE KeysOfRow(const ral_policy_common& common, const Visibility& visibility, int32_t row)
      : low(visibility.first_key(row)),
        high(visibility.last_key(row)),
        own(common.exclude_self ? row + visibility.offset : -1) {}
  RAL_DEVICE bool have(int32_t key) const { return low <= key && key <= high && key != own; }
};

// Whether a key that exists is real and in the scope.
RAL_DEVICE bool is_in_scope(const ral_policy_common& common, const Sample& sample, int32_t key) {
  const uint8_t* const padding = common.key_padding_mask;
  const uint8_t* const scope = common.scope;
  return (padding == nullptr ||
          load_global(padding + sample.b * common.key_padding_mask_stride_b + key) != 0) &&
         (scope == nullptr ||
          load_global(scope + sample.b * common.scope_stride_b + sample.first_key + key) != 0);
}

// The number of a row's target, or -1.
RAL_DEVICE int32_t target_of_row(const ral_policy_common& common, const ral_policy_target& target,
                                 int64_t b, int32_t row) {
  return load_global(target.index + b * common.num_rows + row);
}

// Where the weights and ids of target g of sample b begin.
RAL_DEVICE int64_t start_of_target(const ral_policy_target& target, int64_t b, int32_t g) {
  return (b * target.num_targets + g) * target.length;
}

// r of rows on four keys of the lane, from weights of all keys. Rows of one target that come one
// after another load them once.
class TargetTile {
 public:
  // z: [B, T]. Without a target it reads nothing, and no row may be asked for.
  RAL_DEVICE TargetTile(const ral_policy_common& common, const ral_policy_target& target,
                        const float* z, const Sample& sample, const Visibility& visibility,
                        int32_t first_key)
      : common_(common),
        target_(target),
        z_(z + sample.b * common.num_rows),
        sample_(sample),
        visibility_(visibility),
        key_(first_key + 4 * lane_index()) {
    RAL_UNROLL for (int e = 0; e < 4; ++e)
      in_scope_[e] = target.values != nullptr && key_ + e < sample.num_keys &&
                     is_in_scope(common, sample, key_ + e);
  }

  // All lanes ask for the same row.
  RAL_DEVICE Float4 of_row(int32_t row) {
    const int32_t g = target_of_row(common_, target_, sample_.b, row);
    if (g != loaded_ && g >= 0) {
      loaded_ = g;
      load(target_.values + start_of_target(target_, sample_.b, g) + target_.first_key +
           sample_.first_key + key_);
    }
    const KeysOfRow keys(common_, visibility_, row);
    const float inverse = target_inverse(load_global(z_ + row));  // 0 for a row without a target
    Float4 r;
    RAL_UNROLL for (int e = 0; e < 4; ++e)
      r.x[e] = keys.have(key_ + e) ? weights_.x[e] * inverse : 0.0f;
    return r;
  }

 private:
  // In one load where the address allows it. Weights outside the scope count as 0.
  RAL_DEVICE void load(const float* from) {
    Float4 found{};
    if (reinterpret_cast<uintptr_t>(from) % sizeof(Float4) == 0 && key_ + 3 < sample_.num_keys)
      found = load_global(reinterpret_cast<const Float4*>(from));
    else RAL_UNROLL
      for (int e = 0; e < 4; ++e)
        if (in_scope_[e]) found.x[e] = load_global(from + e);
    RAL_UNROLL for (int e = 0; e < 4; ++e)
      weights_.x[e] = in_scope_[e] ? found.x[e] : 0.0f;
  }

  const ral_policy_common& common_;
  const ral_policy_target& target_;
  const float* z_;
  const Sample& sample_;
  const Visibility& visibility_;
  int32_t key_, loaded_ = -1;
  bool in_scope_[4];
  Float4 weights_{};
};

struct PolicyTargetParams {
  ral_policy_common common;
  ral_policy_side policy;  // whose rows have the targets
  ral_policy_target target;
  float* z;  // [B, T]
  RowChunk chunk;
  float* r;  // [samples, rows, chunk.stride]
};

constexpr int kTargetThreads = 128;

// Calls visit(key, weight) for the row's valid keys that have weight; each thread has some of them.
template <typename Visit>
RAL_DEVICE void for_weights(const PolicyTargetParams& params, int64_t b, int32_t row, Visit visit) {
  const ral_policy_common& common = params.common;
  const ral_policy_target& target = params.target;
  const int32_t g = target_of_row(common, target, b, row);
  if (g < 0) return;
  const Sample sample = sample_of_row(common, b, row);
  const KeysOfRow keys(common, visibility_of(sample, params.policy), row);
  const int32_t first_key = int32_t(target.first_key) + sample.first_key;
  const float* const weights = target.values + start_of_target(target, b, g);
  if (target.ids == nullptr) {
    for (int32_t key = keys.low + thread_index(); key <= keys.high; key += kTargetThreads) {
      const float weight = load_global(weights + first_key + key);
      if (key != keys.own && is_in_scope(common, sample, key)) visit(key, weight);
    }
    return;
  }
  const int32_t* const ids = target.ids + start_of_target(target, b, g);
  for (int32_t i = thread_index(); i < int32_t(target.length); i += kTargetThreads) {
    const int32_t key = load_global(ids + i) - first_key;  // negative for none, too
    if (keys.have(key) && is_in_scope(common, sample, key)) visit(key, load_global(weights + i));
  }
}

// Z of each row: its target's weight on its valid keys. A CTA has a row. The sum in float64 rounds
// to the same float32 in any order, so that a target with ids has the bits of the same without.
struct policy_target_share_kernel {
  using Params = PolicyTargetParams;
  static constexpr int kThreads = kTargetThreads, kMinBlocks = 8;
  static constexpr int kSharedBytes = kThreads * int(sizeof(double));
  static const char* name() { return "policy_target_share_kernel"; }

  RAL_DEVICE static void run(const Params& params, char* shared) {
    const ral_policy_common& common = params.common;
    const int64_t b = block_index() / common.num_rows;
    const int32_t row = int32_t(block_index() % common.num_rows);
    double sum = 0.0;
    if (row < stop_of_rows(common))
      for_weights(params, b, row, [&](int32_t, float weight) { sum += double(weight); });
    double* const sums = reinterpret_cast<double*>(shared) + thread_index();
    store_shared(sums, sum);
    for (int count = kThreads / 2; count > 0; count /= 2) {
      sync_block();
      if (thread_index() < count) store_shared(sums, sum += load_shared(sums + count));
    }
    if (thread_index() == 0)
      store_global(params.z + block_index(), float(sum) < kSmallestWeight ? 0.0f : float(sum));
  }
};

// r of a chunk's rows from weights with ids. A CTA has a row.
struct policy_target_rows_kernel {
  using Params = PolicyTargetParams;
  static constexpr int kThreads = kTargetThreads, kMinBlocks = 8, kSharedBytes = 0;
  static const char* name() { return "policy_target_rows_kernel"; }

  RAL_DEVICE static void run(const Params& params, char*) {
    const RowChunk& chunk = params.chunk;
    const int64_t b = chunk.first_sample + block_index() / chunk.num_rows;
    const int32_t row = chunk.first_row + int32_t(block_index() % chunk.num_rows);
    if (row >= stop_of_rows(params.common)) return;  // no kernel reads r here
    float* const line = params.r + block_index() * chunk.stride;
    for (int64_t i = thread_index(); i < chunk.stride / 4; i += kThreads)
      store_global(reinterpret_cast<Float4*>(line) + i, Float4{});
    sync_block();  // ids of a target are distinct: no two threads write to one key after this
    const float inverse = target_inverse(load_global(params.z + b * params.common.num_rows + row));
    for_weights(params, b, row,
                [&](int32_t key, float weight) { store_global(line + key, weight * inverse); });
  }
};

}  // namespace cuda
}  // namespace ral
