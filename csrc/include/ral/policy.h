// C interface of the `policy`, `policy_divergence` and `divergence` ops, shared by every compiled
// backend.
//
// A policy is the weighted head average of attention, for some query rows, renormalised over the
// valid keys (ral_kernels/ops/policy/README.md). Conventions as in attention.h.
#pragma once

#include "ral/attention.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  RAL_JSD = 0,
  RAL_KL = 1,
  RAL_REVERSE_KL = 2,
  RAL_CROSS_ENTROPY = 3,
} ral_divergence_kind;

// `isa` of a CUDA call: which kernels run where there are several.
enum { RAL_CUDA_ANY = 0, RAL_CUDA_HOPPER = 1 };

// The queries and keys of one policy.
typedef struct {
  int64_t num_heads, num_kv_heads, head_dim;
  int64_t shared_prefix;  // keys that come from k_prefix, before those of k
  int64_t num_prefixes;   // P
  int64_t window_left, window_right;
  ral_tensor q;                 // [B, H, T, D]
  ral_tensor k;                 // [B, Hk, N - shared_prefix, D]
  ral_tensor k_prefix;          // [P, Hk, shared_prefix, D], or data null
  const int64_t* prefix_index;  // [B] into k_prefix, or null
  ral_broadcast span_bias;      // float32; data null = none
  // [B, H] contiguous, or [num_sequences, H] where packed: w >= 0 with mean 1 over heads; null =
  // each is 1.
  const float* head_weights;
  // [2, B, H, T] contiguous, over all visible keys: m, in powers of two, and w / sum of
  // 2^(score log2 e - m); both 0 where a row sees no key.
  float* norm;
  float* z;  // [B, T] contiguous, the weighted share of the valid keys
  float scale, softcap;
  int32_t dtype;  // ral_dtype
} ral_policy_side;

// What both policies of a comparison share.
//
// A packed call has batch size 1. cu_seqlens_q and cu_seqlens_k hold the offsets of its sequences'
// rows and keys among num_rows and seqlen_k, from 0. Rows and keys after the last offset belong to
// none: their results and gradients are 0.
typedef struct {
  int64_t batch_size, num_rows, seqlen_k, num_spans;
  int64_t query_start;  // key position of row 0; unused where packed
  int64_t total_rows;   // rows of norm, z, u and w: num_rows, or more where these are of a part
  int64_t row_length;   // elements of a row of p and dp: num_spans, or keys (packed: max_keys)
  int64_t num_sequences, max_rows, max_keys;  // the longest; 0 where not packed
  const int32_t* cu_seqlens_q;                // [num_sequences + 1], or null: not packed
  const int32_t* cu_seqlens_k;
  const int32_t* query_starts;  // [num_sequences], position of a sequence's first row in its keys
  const int32_t* span_ids;      // [seqlen_k] per batch entry, or null
  int64_t span_ids_stride_b;
  const uint8_t* scope;  // 1 = in the scope, or null = all are
  int64_t scope_stride_b;
  const uint8_t* key_padding_mask;
  int64_t key_padding_mask_stride_b;
  int32_t exclude_self, isa, num_threads;
} ral_policy_common;

// attention_policy: p is [B, T, N], or [B, T, S] where spans are given.
typedef struct {
  ral_policy_common common;
  ral_policy_side policy;
  float* p;
  // Backward only.
  const float* dp;       // like p
  ral_tensor dq, dk;     // of q's and k's type, written entirely
  float* dspan_bias;     // [B, H, T, S] contiguous, or null
  float* dhead_weights;  // like the policy's head_weights, or null
} ral_policy_params;

// The keys of each span, for backends that gather them. A list is a sample's, or one of packed
// sequences, whose keys it counts from their first; span s of list n has keys[i] for i from
// starts[n * num_spans + s] to the next entry.
typedef struct {
  const int32_t* keys;
  const int32_t* starts;  // [number of lists * num_spans + 1]
  int32_t is_shared;      // 1 = one list for the whole batch
} ral_policy_span_lists;

// Distributions that rows share, in place of a reference policy. A row's is restricted to its valid
// keys and divided by its sum there. Packed calls number keys through all sequences.
typedef struct {
  const float* values;   // [B, num_targets, length] contiguous, >= 0; null = there is no target
  const int32_t* ids;    // like values: keys, ascending, then -1; null = length is that of the keys
  const int32_t* index;  // [B, total_rows], the target of each row, -1 = none
  int64_t num_targets, length;
  int64_t first_key;  // of the call's keys among those of the target
} ral_policy_target;

// Divergence of a policy from a reference. Each side is formed from its own queries and keys;
// neither is stored. With a target, of the reference only z counts: the weight on valid keys.
typedef struct {
  ral_policy_common common;
  ral_policy_side policy, reference;
  ral_policy_target target;
  int32_t kind;                  // ral_divergence_kind
  int32_t reference_normalised;  // 1 = the reference's norm and z are given, not written
  float* value;                  // [B, T]
  float* u;                      // [B, H, T] sum over valid keys of w_h P_h l
  float* w;                      // [B, H, T] sum over valid keys of w_h P_h
  // Backward only.
  const float* dvalue;  // [B, T]
  ral_tensor dq, dk;
  float* dhead_weights;  // like the policy's head_weights, or null
} ral_policy_divergence_params;

// Rows of two distributions, compared element by element. A null gradient is not wanted.
typedef struct {
  int64_t num_rows, length;
  const float* p;  // [num_rows, length] contiguous
  const float* r;
  float* value;  // [num_rows]
  float* dp;     // like p: d value / d p
  float* dr;
  int32_t kind, isa, num_threads;
} ral_divergence_params;

#ifdef __cplusplus
}
#endif
