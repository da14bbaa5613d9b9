// C interface of the `attention` op, shared by every compiled backend.
//
// Pointers, strides and sizes only: no torch types, so that one build serves every torch version.
// Strides count elements. The last dimension of q, k, v, out and their gradients has unit stride.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  RAL_FLOAT32 = 0,
  RAL_BFLOAT16 = 1,
  RAL_FLOAT16 = 2,
  RAL_BOOL = 3,
} ral_dtype;

typedef enum {
  RAL_OK = 0,
  RAL_OUT_OF_MEMORY = 1,
  RAL_ISA_NOT_AVAILABLE = 2,
  RAL_BAD_ARGUMENT = 3,      // pointers or sizes do not fit together: ral/check.h
  RAL_BAD_SPAN_ID = 4,       // outside [-1, num_spans)
  RAL_BAD_PREFIX_INDEX = 5,  // outside [0, num_prefixes)
  RAL_BAD_BOUNDS = 6,        // of packed sequences
  RAL_BAD_TARGET = 7,        // its index outside [-1, num_targets), or its ids not as they must be
} ral_status;

// One tensor [batch, head, token, feature] with unit feature stride.
typedef struct {
  void* data;
  int64_t stride_b, stride_h, stride_t;
} ral_tensor;

// One read-only tensor [batch, head, query, key or span] with any strides, 0 where it broadcasts.
typedef struct {
  const void* data;
  int64_t stride_b, stride_h, stride_t, stride_s;
} ral_broadcast;

// Inputs and options of one call. Packed (varlen) calls give cu_seqlens_q and cu_seqlens_k with
// `num_sequences` sequences and batch_size 1; otherwise num_sequences = batch_size and both are
// null.
typedef struct {
  int64_t batch_size, num_sequences, num_heads, num_kv_heads, seqlen_q, seqlen_k;
  int64_t head_dim, head_dim_v, num_spans;
  int64_t row_start, row_stop;        // queries that get marginals
  int64_t window_left, window_right;  // -1 = no bound, relative to the aligned diagonal
  ral_tensor q, k, v;                 // of type `dtype`
  const int32_t* span_ids;            // [seqlen_k] per batch entry, or null
  int64_t span_ids_stride_b;          // 0 = the same for the whole batch
  ral_broadcast span_bias;            // float32, natural units; data null = none
  ral_broadcast attn_mask;            // type `attn_mask_dtype`; data null = none
  const uint8_t* key_padding_mask;    // 1 = a real key; or null
  int64_t key_padding_mask_stride_b;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  float scale, softcap;            // softcap 0 = off
  int32_t dtype, attn_mask_dtype;  // ral_dtype
  int32_t top_left;                // 1 = row t sits at key t, 0 = at key t + N - T
  int32_t isa;                     // index of a CPU variant, see ral_cpu_isa_name
  int32_t num_threads;
} ral_attention_params;

// Written by the forward, read by the backward.
typedef struct {
  ral_tensor out;    // of type `dtype`
  float* marginals;  // [B, H, row_stop - row_start, S] contiguous, or null
  float* lse;        // [B, H, T] contiguous
} ral_attention_outputs;

typedef struct {
  ral_tensor dout;          // data null = no gradient arrives at out
  const float* dmarginals;  // like marginals, or null
  const float* dlse;        // like lse, or null
  ral_tensor dq, dk, dv;    // of type `dtype`, written entirely
  float* dspan_bias;        // [B, H, T, S] contiguous, or null
} ral_attention_gradients;

#ifdef __cplusplus
}
#endif
