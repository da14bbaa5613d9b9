// Which queries or keys a CTA of `attention` has.
#pragma once

#include "core/keys.h"

namespace ral {
namespace cuda {

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

// Queries [first_query, first_query + num_queries) of a head's sequence.
struct QueriesOfBlock {
  int64_t b, h, kv_head;
  Sequence sequence;
  int32_t first_query, num_queries;  // no queries: nothing to do
  int64_t first_token;               // the first query's, in the packed tensors
  Visibility visibility;
  const int32_t* ids;      // span ids of the sequence's keys; null if not wanted
  const uint8_t* padding;  // of the sequence's keys, or null

  // num_blocks: per head. wants_spans: the call has marginals, or a gradient of them.
  RAL_DEVICE QueriesOfBlock(const ral_attention_params& call, int32_t num_blocks, int32_t block_q,
                            bool wants_spans)
      // Late causal queries see the most keys, so they start first.
      : QueriesOfBlock(call, num_blocks - 1 - int32_t(block_index() % num_blocks),
                       block_index() / num_blocks, block_q, wants_spans) {}

 private:
  RAL_DEVICE QueriesOfBlock(const ral_attention_params& call, int32_t block, int64_t head,
                            int32_t block_q, bool wants_spans)
      : b(head / call.num_heads),
        h(head % call.num_heads),
        kv_head(h / (call.num_heads / call.num_kv_heads)),
        sequence(locate(call, block_q, block, false)),
        first_query(sequence.block * block_q),
        num_queries(minimum(block_q, sequence.length_q - first_query)),
        first_token(int64_t(sequence.q_start) + first_query),
        visibility(call, sequence),
        ids(span_ids_of(call, b, sequence, wants_spans)),
        padding(padding_of(call, b)) {}
};

// Keys [first_key, first_key + num_keys) of a kv head's sequence.
struct KeysOfBlock {
  int64_t b, kv_head;
  Sequence sequence;
  int32_t first_key, num_keys;  // no keys: nothing to do
  int64_t first_token;          // the first key's, in the packed tensors
  Visibility visibility;
  const int32_t* ids;  // as above
  const uint8_t* padding;

  RAL_DEVICE KeysOfBlock(const ral_attention_params& call, int32_t num_blocks, int32_t block_k,
                         bool wants_spans)
      // Most queries see early causal keys, so they start first.
      : KeysOfBlock(call, int32_t(block_index() % num_blocks), block_index() / num_blocks, block_k,
                    wants_spans) {}

 private:
  RAL_DEVICE KeysOfBlock(const ral_attention_params& call, int32_t block, int64_t head,
                         int32_t block_k, bool wants_spans)
      : b(head / call.num_kv_heads),
        kv_head(head % call.num_kv_heads),
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
