// Which keys of a block a row sees, and which spans they belong to.
#pragma once

#include "core/device.h"
#include "ral/attention.h"

namespace ral {
namespace cuda {

constexpr int kBlockK = 64;  // keys of a block: one bit each in a 64-bit mask

RAL_DEVICE int32_t minimum(int32_t x, int32_t y) {
  return x < y ? x : y;
}
RAL_DEVICE int32_t maximum(int32_t x, int32_t y) {
  return x > y ? x : y;
}

// Address of token `token` of head `h`.
template <typename V>
RAL_DEVICE V* rows_of(const ral_tensor& x, int64_t b, int64_t h, int64_t token) {
  return static_cast<V*>(x.data) + b * x.stride_b + h * x.stride_h + token * x.stride_t;
}

// A sequence of a call, and a block of its queries or keys. Without packing each batch entry is a
// sequence.
struct Sequence {
  int32_t index;
  int32_t q_start, length_q;  // in tokens of the packed tensors
  int32_t k_start, length_k;
  int32_t block;  // index of the block in the sequence
};

// The sequence that a block of a packed call belongs to. Each sequence begins a new block. Sequence
// n has the block numbers from cu_seqlens[n] / block_size + n on, which are enough for its blocks.
RAL_DEVICE int32_t sequence_of_block(const int32_t* cu_seqlens, int64_t num_sequences,
                                     int32_t block_size, int32_t block) {
  int32_t low = 0, high = int32_t(num_sequences) - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (load_global(cu_seqlens + middle) / block_size + middle <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Locates a block of `block_size` queries, or of keys with by_keys.
RAL_DEVICE Sequence locate(const ral_attention_params& call, int32_t block_size, int32_t block,
                           bool by_keys) {
  Sequence found{0, 0, int32_t(call.seqlen_q), 0, int32_t(call.seqlen_k), block};
  if (call.cu_seqlens_q == nullptr) return found;
  const int32_t* cut = by_keys ? call.cu_seqlens_k : call.cu_seqlens_q;
  const int32_t n = sequence_of_block(cut, call.num_sequences, block_size, block);
  found.index = n;
  found.block = block - (load_global(cut + n) / block_size + n);
  found.q_start = load_global(call.cu_seqlens_q + n);
  found.length_q = load_global(call.cu_seqlens_q + n + 1) - found.q_start;
  found.k_start = load_global(call.cu_seqlens_k + n);
  found.length_k = load_global(call.cu_seqlens_k + n + 1) - found.k_start;
  return found;
}

// Blocks that `num_rows` rows in `num_sequences` sequences need at most.
inline int64_t count_blocks(int64_t num_rows, int64_t num_sequences, int64_t block_size,
                            bool packed) {
  return packed ? num_rows / block_size + num_sequences : (num_rows + block_size - 1) / block_size;
}

// Which keys rows see by position. Windows are clipped to kWidest, so that positions cannot
// overflow.
struct Visibility {
  static constexpr int64_t kWidest = 1 << 30;
  int32_t offset;  // key position of query 0
  int32_t left, right;
  int32_t length_k;

  RAL_DEVICE Visibility(int32_t offset, int64_t window_left, int64_t window_right, int32_t length_k)
      : offset(offset),
        left(int32_t(window_left < kWidest ? window_left : kWidest)),
        right(int32_t(window_right < kWidest ? window_right : kWidest)),
        length_k(length_k) {}

  RAL_DEVICE Visibility(const ral_attention_params& call, const Sequence& sequence)
      : Visibility(call.top_left ? 0 : sequence.length_k - sequence.length_q, call.window_left,
                   call.window_right, sequence.length_k) {}

  RAL_DEVICE int32_t first_key(int32_t query) const {
    return left < 0 ? 0 : maximum(query + offset - left, 0);
  }
  RAL_DEVICE int32_t last_key(int32_t query) const {
    return right < 0 ? length_k - 1 : minimum(query + offset + right, length_k - 1);
  }
  RAL_DEVICE int32_t first_query(int32_t key) const {
    return right < 0 ? 0 : maximum(key - offset - right, 0);
  }
  // May lie past the last query.
  RAL_DEVICE int32_t last_query(int32_t key) const {
    return left < 0 ? INT32_MAX : key - offset + left;
  }
};

// What a warp knows about a block of keys.
struct KeyBlock {
  uint64_t real;      // bit i: key i is in the sequence and is not padding
  uint64_t starts;    // bit i: keys i and i - 1 have different spans; bit 0 is set
  int32_t low, high;  // span ids of keys `lane` and `lane` + 32 of the block; -1 = none

  // Span of a key; all lanes must ask for the same key.
  RAL_DEVICE int32_t span_of(int key) const { return shuffle(key < 32 ? low : high, key & 31); }
  // Span of key 8 tile + 2 (lane % 4) + e: the column of the lane's accumulator.
  RAL_DEVICE int32_t span_of_column(int tile, int e) const {
    return shuffle(tile < 4 ? low : high, tile % 4 * 8 + 2 * (lane_index() % 4) + e);
  }
  RAL_DEVICE bool is_one_span() const { return starts == 1; }
};

// What a lane loads of a block of keys, to be described later: of keys `lane` and `lane` + 32.
struct LoadedKeys {
  int32_t low, high;  // span ids; -1 = none
  bool real_low, real_high;
  bool has_spans;
};

// `ids` and `padding` start at the sequence's first key, or are null. kByKey: addresses come from
// the key's number; no pointer moves with `first`. nvcc spills registers of the forward for Hopper
// without it, and registers of policy_moments_kernel with it.
template <bool kByKey>
RAL_DEVICE LoadedKeys load_keys(const int32_t* ids, const uint8_t* padding, int32_t first,
                                int32_t length_k) {
  const int lane = lane_index();
  const int32_t key = first + lane;
  const auto at = [&](auto* of_keys) { return kByKey ? of_keys + key : of_keys + first + lane; };
  const bool has_low = key < length_k, has_high = key + 32 < length_k;
  LoadedKeys keys{-1, -1, has_low, has_high, ids != nullptr};
  if (padding != nullptr) {
    if (has_low) keys.real_low = load_global(at(padding)) != 0;
    if (has_high) keys.real_high = load_global(at(padding) + 32) != 0;
  }
  if (ids != nullptr) {
    if (has_low) keys.low = load_global(at(ids));
    if (has_high) keys.high = load_global(at(ids) + 32);
  }
  return keys;
}

// A collective of the warp.
RAL_DEVICE KeyBlock describe(const LoadedKeys& loaded) {
  KeyBlock keys{0, 1, loaded.low, loaded.high};
  keys.real = uint64_t(ballot(loaded.real_low)) | uint64_t(ballot(loaded.real_high)) << 32;
  if (loaded.has_spans) {
    const int lane = lane_index();
    const int32_t before_low = shuffle_up(keys.low, 1), last_low = shuffle(keys.low, 31);
    const int32_t within_high = shuffle_up(keys.high, 1);
    const int32_t before_high = lane == 0 ? last_low : within_high;
    keys.starts = uint64_t(ballot(lane == 0 || before_low != keys.low)) |
                  uint64_t(ballot(before_high != keys.high)) << 32;
  }
  return keys;
}

// A collective of the warp: both at once.
RAL_DEVICE KeyBlock load_key_block(const int32_t* ids, const uint8_t* padding, int32_t first,
                                   int32_t length_k) {
  return describe(load_keys<false>(ids, padding, first, length_k));
}

}  // namespace cuda
}  // namespace ral
