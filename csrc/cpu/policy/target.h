// Distributions that rows share, in place of the reference policy of a comparison: equation (11) of
// ral_kernels/ops/policy/divergence.md. A chunk of a row's target is loaded where a reference
// policy's would be formed from its queries and keys. Sparse targets are scattered into scratch of
// one chunk, so no row of them is ever as long as the keys.
#pragma once

#include "policy/stream.h"

namespace ral {
namespace RAL_ISA {

class TargetRows {
 public:
  TargetRows(const ral_policy_common& common, const ral_policy_target& target)
      : common_(common), target_(target) {}

  // Weights of the block's rows on the keys of a chunk, [kChunkKeys][rows], as they are given; 0 on
  // keys that are not valid. `stage` holds kLanes * kChunkKeys floats.
  void load_chunk(const TokenBlock& block, GroupRange chunk, int64_t rows, float* stage,
                  float* weights) const {
    for (int64_t sub = 0; sub < rows; sub += kLanes) {
      int32_t last = kNone;
      for (int64_t i = 0; i < kLanes; ++i) {
        float* row = stage + i * kChunkKeys;
        const int32_t target = target_of(block, sub + i);
        if (i > 0 && target == last) {  // rows one after another often share a target
          memcpy(row, row - kChunkKeys, kChunkKeys * sizeof(float));
        } else {
          fill(block.batch, target, chunk.begin * kTileRows, row);
        }
        last = target;
      }
      transpose_block(stage, kChunkKeys, weights + sub, rows, kLanes, kChunkKeys);
    }
    keep_valid(block, common_, chunk, rows, weights);
  }

  // z of every row: the sum of its weights on valid keys. `weights` is scratch of one chunk.
  void sum(const TokenBlock& block, int64_t groups, int64_t rows, float* stage, float* weights,
           float* z) const {
    alignas(64) float sums[2 * TokenBlock::kMaxRows] = {};
    const GroupRange visible = visible_groups(block, GroupRange{0, groups});
    for (int64_t begin = visible.begin; begin < visible.end; begin += kChunkGroups) {
      const GroupRange chunk{
          begin, begin + kChunkGroups < visible.end ? begin + kChunkGroups : visible.end};
      load_chunk(block, chunk, rows, stage, weights);
      for (int64_t i = 0; i < rows; i += kLanes) {
        Vec part{};
        for (int64_t key = 0; key < (chunk.end - chunk.begin) * kTileRows; ++key) {
          part += load(weights + key * rows + i);
        }
        add_to_sum(sums + i, sums + rows + i, part);
      }
    }
    settle(sums, rows);
    memcpy(z, sums, rows * sizeof(float));
  }

 private:
  static constexpr int32_t kNone = -1;

  int32_t target_of(const TokenBlock& block, int64_t row) const {
    return row < block.count ? target_.index[block.row(common_, row)] : kNone;
  }

  // One target on the keys from `first` on, [kChunkKeys].
  void fill(int64_t sample, int32_t target, int64_t first, float* row) const {
    memset(row, 0, kChunkKeys * sizeof(float));
    if (target == kNone) return;
    int64_t real = common_.seqlen_k - first;
    if (real > kChunkKeys) real = kChunkKeys;
    const int64_t from = (sample * target_.num_targets + target) * target_.length;
    const float* values = target_.values + from;
    first += target_.first_key;
    if (!target_.ids) {
      memcpy(row, values + first, real * sizeof(float));
      return;
    }
    const int32_t* ids = target_.ids + from;
    for (int64_t i = first_at_least(ids, first);
         i < target_.length && ids[i] != kNone && ids[i] < first + real; ++i) {
      row[ids[i] - first] = values[i];
    }
  }

  // Place of the first of a target's ids that is `key` or more. As unsigned numbers, -1 is last.
  int64_t first_at_least(const int32_t* ids, int64_t key) const {
    int64_t low = 0, high = target_.length;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (static_cast<int64_t>(static_cast<uint32_t>(ids[middle])) < key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  const ral_policy_common& common_;
  const ral_policy_target& target_;
};

// Factors on the loaded weights of rows whose sums are z.
inline void invert_targets(const float* z, int64_t rows, float* inverse) {
  for (int64_t i = 0; i < rows; ++i) inverse[i] = target_inverse(z[i]);
}

}  // namespace RAL_ISA
}  // namespace ral
