// Which queries or keys a CTA of `attention` has, and in which order CTAs start.
#pragma once

#include "core/keys.h"

namespace ral {
namespace cuda {

constexpr int kNumberBytes = 2;  // of q, k, v and dout

// The order in which the CTAs of a launch start. Each head has blocks 0 to num_blocks - 1, and
// block 0 has the most to do. Block 0 of all heads comes first, then block 1 of all. So the last
// CTAs to start are short, and multiprocessors end at about the same time. Heads that share keys
// and values are neighbours. Where the heads together exceed the L2 cache, they start in sections
// that do not.
struct CtaOrder {
  int32_t num_blocks;
  int32_t num_heads;  // of a section

  // What a section may read over and over: most of the L2 cache of an A100 (40 MB) or H100 (50 MB).
  static constexpr int64_t kSectionBytes = 32 << 20;

  // num_kv_heads: of all batch entries; heads_per_kv_head: what reads the same keys and values;
  // bytes: what they share.
  static CtaOrder of(int64_t num_blocks, int64_t num_kv_heads, int64_t heads_per_kv_head,
                     int64_t bytes) {
    const int64_t fit = bytes < kSectionBytes ? kSectionBytes / (bytes > 0 ? bytes : 1) : 1;
    int64_t of_section = num_kv_heads < fit ? num_kv_heads : fit;
    while (of_section > 1 && num_kv_heads % of_section != 0) --of_section;
    return {int32_t(num_blocks), int32_t(of_section * heads_per_kv_head)};
  }

  struct Place {
    int32_t block;
    int64_t head;  // counted over the batch
  };
  RAL_DEVICE Place place() const {
    const uint32_t index = uint32_t(block_index()), heads = uint32_t(num_heads);
    const uint32_t of_section = uint32_t(num_blocks) * heads;
    const uint32_t rest = index % of_section;
    return {int32_t(rest / heads), int64_t(index / of_section * heads + rest % heads)};
  }
};

// Span ids from the sequence's first key on. Null if spans are not wanted or not given.
RAL_DEVICE const int32_t* span_ids_of(const ral_attention_params& call, int64_t b,
                                      const Sequence& sequence, bool wanted) {
  if (!wanted || call.span_ids == nullptr) return nullptr;
  return call.span_ids + b * call.span_ids_stride_b + sequence.k_start;
}
// Key padding from the batch entry's first key on, or null. Packed sequences have no padding.
RAL_DEVICE const uint8_t* padding_of(const ral_attention_params& call, int64_t b) {
  if (call.key_padding_mask == nullptr) return nullptr;
  return call.key_padding_mask + b * call.key_padding_mask_stride_b;
}

// CTAs of block_q queries of a head, num_shares for each block. Those of a group read the same keys
// and values.
inline CtaOrder order_of_queries(const ral_attention_params& call, int32_t block_q,
                                 int32_t num_shares = 1) {
  const int64_t blocks =
      count_blocks(call.seqlen_q, call.num_sequences, block_q, call.cu_seqlens_q != nullptr);
  return CtaOrder::of(blocks, call.batch_size * call.num_kv_heads,
                      num_shares * (call.num_heads / call.num_kv_heads),
                      call.seqlen_k * (call.head_dim + call.head_dim_v) * kNumberBytes);
}

// CTAs of block_k keys of a kv head, num_shares for each block. They are counted as reading queries
// of different heads, though the bands of a part read the same.
inline CtaOrder order_of_keys(const ral_attention_params& call, int32_t block_k,
                              int32_t num_shares) {
  const int64_t blocks =
      count_blocks(call.seqlen_k, call.num_sequences, block_k, call.cu_seqlens_q != nullptr);
  return CtaOrder::of(
      blocks, call.batch_size * call.num_kv_heads, num_shares,
      num_shares * call.seqlen_q * (call.head_dim + call.head_dim_v) * kNumberBytes);
}

// Queries [first_query, first_query + num_queries) of a head's sequence. Several CTAs may have the
// same: each has a share, columns that it writes or keys that it walks over.
struct QueriesOfBlock {
  int64_t b, h, kv_head;
  int32_t share;
  Sequence sequence;
  int32_t first_query, num_queries;  // no queries: nothing to do
  int64_t first_token;               // the first query's, in the packed tensors
  Visibility visibility;
  const int32_t* ids;      // span ids of the sequence's keys; null if not wanted
  const uint8_t* padding;  // of the sequence's keys, or null

  // wants_spans: the call has marginals, or a gradient of them.
  RAL_DEVICE QueriesOfBlock(const ral_attention_params& call, const CtaOrder& order,
                            int32_t block_q, bool wants_spans, int32_t num_shares = 1)
      : QueriesOfBlock(call, order, order.place(), block_q, wants_spans, num_shares) {}

 private:
  RAL_DEVICE QueriesOfBlock(const ral_attention_params& call, const CtaOrder& order,
                            const CtaOrder::Place& place, int32_t block_q, bool wants_spans,
                            int32_t num_shares)
      // Late causal queries see the most keys.
      : QueriesOfBlock(call, order.num_blocks - 1 - place.block, place.head / num_shares,
                       int32_t(place.head % num_shares), block_q, wants_spans) {}
  RAL_DEVICE QueriesOfBlock(const ral_attention_params& call, int32_t block, int64_t head,
                            int32_t share, int32_t block_q, bool wants_spans)
      : b(head / call.num_heads),
        h(head % call.num_heads),
        kv_head(h / (call.num_heads / call.num_kv_heads)),
        share(share),
        sequence(locate(call, block_q, block, false)),
        first_query(sequence.block * block_q),
        num_queries(minimum(block_q, sequence.length_q - first_query)),
        first_token(int64_t(sequence.q_start) + first_query),
        visibility(call, sequence),
        ids(span_ids_of(call, b, sequence, wants_spans)),
        padding(padding_of(call, b)) {}
};

// Keys [first_key, first_key + num_keys) of a kv head's sequence. Several CTAs may have the same:
// each has a share, queries that it walks over and columns that it writes.
struct KeysOfBlock {
  int64_t b, kv_head;
  int32_t share;
  Sequence sequence;
  int32_t first_key, num_keys;  // no keys: nothing to do
  int64_t first_token;          // the first key's, in the packed tensors
  Visibility visibility;
  const int32_t* ids;  // as above
  const uint8_t* padding;

  RAL_DEVICE KeysOfBlock(const ral_attention_params& call, const CtaOrder& order,
                         int32_t num_shares, int32_t block_k, bool wants_spans)
      // Most queries see early causal keys.
      : KeysOfBlock(call, order.place(), num_shares, block_k, wants_spans) {}

 private:
  RAL_DEVICE KeysOfBlock(const ral_attention_params& call, const CtaOrder::Place& place,
                         int32_t num_shares, int32_t block_k, bool wants_spans)
      : KeysOfBlock(call, place.block, place.head / num_shares, int32_t(place.head % num_shares),
                    block_k, wants_spans) {}
  RAL_DEVICE KeysOfBlock(const ral_attention_params& call, int32_t block, int64_t head,
                         int32_t share, int32_t block_k, bool wants_spans)
      : b(head / call.num_kv_heads),
        kv_head(head % call.num_kv_heads),
        share(share),
        sequence(locate(call, block_k, block, true)),
        first_key(sequence.block * block_k),
        num_keys(minimum(block_k, sequence.length_k - first_key)),
        first_token(int64_t(sequence.k_start) + first_key),
        visibility(call, sequence),
        ids(span_ids_of(call, b, sequence, wants_spans)),
        padding(padding_of(call, b)) {}
};

}  // namespace cuda
}  // namespace ral
