// The queries and keys of one policy, and which keys count for its rows.
//
// The terms are those of ral_kernels/ops/policy/README.md. A row *sees* the keys of its window that
// are not padding. Of these the keys in the scope are *valid*; `exclude_self` takes out the row's
// own key.
#pragma once

#include "core/keys.h"
#include "core/tiles.h"
#include "ral/policy.h"

namespace ral {
namespace cuda {

// The sample of a CTA, or its packed sequence. Rows are numbered as in the tensors of the call;
// keys from the sample's first one on.
struct Sample {
  int64_t b;
  int32_t first_row, stop;  // its rows, or those of a chunk
  int32_t first_key;        // in the tensors of the call
  int32_t num_keys;
  int32_t offset;  // position among its keys of row 0 of the tensors
  int32_t index;   // row of head_weights
};

RAL_DEVICE Sample packed_sample(const ral_policy_common& common, int32_t n) {
  const int32_t row = load_global(common.cu_seqlens_q + n);
  const int32_t key = load_global(common.cu_seqlens_k + n);
  return Sample{0,
                row,
                load_global(common.cu_seqlens_q + n + 1),
                key,
                load_global(common.cu_seqlens_k + n + 1) - key,
                load_global(common.query_starts + n) - row,
                n};
}

// Where `block` counts the blocks of all packed sequences, finds its sequence, and makes `block`
// the number there. It may lie beyond the sequence's end. Otherwise it is sample b, of which
// [first_row, stop) are taken.
RAL_DEVICE Sample sample_of_block(const ral_policy_common& common, const int32_t* offsets,
                                  int32_t block_size, int32_t& block, int64_t b, int32_t first_row,
                                  int32_t stop) {
  if (offsets == nullptr)
    return Sample{
        b, first_row, stop, 0, int32_t(common.seqlen_k), int32_t(common.query_start), int32_t(b)};
  const int32_t n = sequence_of_block(offsets, common.num_sequences, block_size, block);
  block -= load_global(offsets + n) / block_size + n;
  return packed_sample(common, n);
}

// The sample of a row of sample b.
RAL_DEVICE Sample sample_of_row(const ral_policy_common& common, int64_t b, int32_t row) {
  int32_t block = row;
  if (common.cu_seqlens_q == nullptr)
    return sample_of_block(common, nullptr, 1, block, b, 0, int32_t(common.num_rows));
  int32_t low = 0, high = int32_t(common.num_sequences) - 1;  // the last that begins by then
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (load_global(common.cu_seqlens_q + middle) <= row)
      low = middle;
    else
      high = middle - 1;
  }
  return packed_sample(common, low);
}

// Rows before it belong to samples; packed, later ones may belong to no sequence.
RAL_DEVICE int64_t stop_of_rows(const ral_policy_common& common) {
  return common.cu_seqlens_q == nullptr ? common.num_rows
                                        : load_global(common.cu_seqlens_q + common.num_sequences);
}

// w_h of the sample.
RAL_DEVICE float head_weight(const ral_policy_side& side, const Sample& sample, int64_t h) {
  if (side.head_weights == nullptr) return 1.0f;
  return load_global(side.head_weights + sample.index * side.num_heads + h);
}

RAL_DEVICE Visibility visibility_of(const Sample& sample, const ral_policy_side& side) {
  return Visibility(sample.offset, side.window_left, side.window_right, sample.num_keys);
}

// CTAs for all blocks of rows of a sample, or of packed sequences. Some of these may be empty.
inline int64_t blocks_of_rows(const ral_policy_common& common, int64_t num_rows,
                              int64_t block_size) {
  return count_blocks(num_rows, common.num_sequences, block_size, common.cu_seqlens_q != nullptr);
}

// Keys [low, high] that some of the rows [row, row + num_rows) see by position.
struct KeysOfRows {
  int32_t low, high;

  RAL_DEVICE KeysOfRows(const Visibility& visibility, int32_t row, int32_t num_rows)
      : low(visibility.first_key(row)), high(visibility.last_key(row + num_rows - 1)) {}
  RAL_DEVICE bool meet(int32_t first, int32_t num_keys) const {
    return low <= high && first <= high && first + num_keys > low;
  }
};

// 64 keys as bits. Real keys exist and are not padding; in_scope ones are real and in the scope.
struct KeyBits {
  uint64_t real, in_scope;

  RAL_DEVICE KeyBits(const ral_policy_common& common, const Sample& sample, int32_t first) {
    const uint8_t* padding = nullptr;
    if (common.key_padding_mask != nullptr)
      padding = common.key_padding_mask + sample.b * common.key_padding_mask_stride_b;
    in_scope = real = load_key_block(nullptr, padding, first, sample.num_keys).real;
    if (common.scope != nullptr) {
      const uint8_t* scope = common.scope + sample.b * common.scope_stride_b + sample.first_key;
      in_scope &= load_key_block(nullptr, scope, first, sample.num_keys).real;
    }
  }
};

// The keys of one kv head of a sample. The first `prefix_length` lie in a prefix that samples
// share.
template <typename T>
struct HeadKeys {
  const T* own;
  const T* prefix;
  int64_t stride, prefix_stride;
  int32_t prefix_length;

  RAL_DEVICE HeadKeys(const ral_policy_side& side, const Sample& sample, int64_t kv_head)
      : HeadKeys(side, sample.b, sample.first_key, kv_head) {}
  // first_token: the sample's first key in the tensor of all.
  RAL_DEVICE HeadKeys(const ral_policy_side& side, int64_t b, int32_t first_token, int64_t kv_head)
      : own(rows_of<const T>(side.k, b, kv_head, first_token)),
        prefix(nullptr),
        stride(side.k.stride_t),
        prefix_stride(side.k_prefix.stride_t),
        prefix_length(0) {
    if (side.k_prefix.data == nullptr) return;
    prefix_length = int32_t(side.shared_prefix);
    prefix = rows_of<const T>(side.k_prefix, load_global(side.prefix_index + b), kv_head, 0);
  }

  // Starts copying keys [first, first + kRows). Keys where `exists(row)` is false become 0: padding
  // may hold NaN, and 0 · NaN is NaN.
  template <int kRows, int kThreads, int kColumns, typename Exists>
  RAL_DEVICE void copy(Tile<T, kColumns> tile, int32_t first, Exists exists) const {
    const bool is_own = first >= prefix_length;
    if (is_own || first + kRows <= prefix_length) {
      const int64_t step = is_own ? stride : prefix_stride;
      const T* from = is_own ? own + (first - prefix_length) * stride : prefix + first * step;
      copy_rows<kRows, kThreads>(tile, from, step, exists);
      return;
    }
    constexpr int kChunks = Tile<T, kColumns>::kChunks;
    const int chunk = thread_index() % kChunks;
    for (int row = thread_index() / kChunks; row < kRows; row += kThreads / kChunks) {
      const int32_t key = first + row;
      const T* from =
          key < prefix_length ? prefix + key * prefix_stride : own + (key - prefix_length) * stride;
      copy_async(tile.at(row, chunk), from + chunk * kChunk, exists(row));
    }
  }
  template <int kThreads, int kColumns>
  RAL_DEVICE void copy_block(Tile<T, kColumns> tile, int32_t first, const KeyBits& bits) const {
    copy<kBlockK, kThreads>(tile, first, [&](int row) { return (bits.real >> row & 1) != 0; });
  }
};

// Sets bits `low` to `high` of 64; either may lie outside of the 64.
RAL_DEVICE uint64_t bits_between(int32_t low, int32_t high) {
  low = maximum(low, 0);
  high = minimum(high, 63);
  if (low > high) return 0;
  return ~uint64_t(0) << low & ~uint64_t(0) >> (63 - high);
}
RAL_DEVICE uint64_t without_bit(uint64_t bits, int32_t bit) {
  return bit < 0 || bit > 63 ? bits : bits & ~(uint64_t(1) << bit);
}

// Which of 64 keys a row sees, and which are valid for it; or which of 64 rows, for one key.
struct Mask {
  uint64_t visible, valid;

  // For keys [first, first + 64).
  RAL_DEVICE static Mask of_row(const ral_policy_common& common, const Visibility& visibility,
                                const KeyBits& keys, int32_t row, int32_t first) {
    const uint64_t near =
        bits_between(visibility.first_key(row) - first, visibility.last_key(row) - first);
    Mask mask{near & keys.real, near & keys.in_scope};
    if (common.exclude_self) mask.valid = without_bit(mask.valid, row + visibility.offset - first);
    return mask;
  }
  // For rows [first, first + 64) before `stop` and a key that is real, or in the scope, too.
  RAL_DEVICE static Mask of_key(const ral_policy_common& common, const Visibility& visibility,
                                bool is_real, bool is_in_scope, int32_t key, int32_t first,
                                int32_t stop) {
    const uint64_t near = bits_between(visibility.first_query(key) - first,
                                       minimum(visibility.last_query(key), stop - 1) - first);
    Mask mask{is_real ? near : 0, is_in_scope ? near : 0};
    if (common.exclude_self) mask.valid = without_bit(mask.valid, key - visibility.offset - first);
    return mask;
  }

  RAL_DEVICE bool is_full() const { return (visible & valid) == ~uint64_t(0); }
  // For element e of column tile c of the lane.
  RAL_DEVICE bool sees(int c, int e) const { return has(visible, c, e); }
  RAL_DEVICE bool counts(int c, int e) const { return has(valid, c, e); }

 private:
  RAL_DEVICE static bool has(uint64_t bits, int c, int e) {
    return (bits >> (2 * (lane_index() % 4)) >> (8 * c + e) & 1) != 0;
  }
};

// Whether all of a warp's rows see all 64 keys, all valid. All lanes get the same answer.
template <int kRows>
RAL_DEVICE bool all_full(const Mask (&masks)[kRows]) {
  bool full = true;
  RAL_UNROLL for (int i = 0; i < kRows; ++i)
    full = full && masks[i].is_full();
  return ballot(!full) == 0;
}

// Rows that one sweep takes together: some rows of one sample, or all rows of several samples.
struct RowChunk {
  int32_t first_sample, num_samples;
  int32_t first_row, num_rows;
  int64_t stride;  // of rows over keys: the number of keys, rounded up to kTermKeys

  // Index into tensors [samples, rows] and [samples, heads, rows] that hold a chunk.
  RAL_DEVICE int64_t at(int32_t sample, int32_t row) const {
    return int64_t(sample - first_sample) * num_rows + (row - first_row);
  }
  RAL_DEVICE int64_t at(int32_t sample, int64_t num_heads, int64_t h, int32_t row) const {
    return ((sample - first_sample) * num_heads + h) * num_rows + (row - first_row);
  }
  RAL_DEVICE int32_t stop() const { return first_row + num_rows; }
};

constexpr int kTermKeys = 128;    // keys of a CTA of policy_terms_kernel
constexpr int kChunkBlockQ = 64;  // rows of a CTA, in all kernels that take a chunk's rows

}  // namespace cuda
}  // namespace ral
