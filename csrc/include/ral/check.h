// What every entry point checks before a kernel runs: pointers are there, sizes fit together, no
// divisor is zero and no index leaves its range. Python checks the same and names the argument.
// This guards against other callers, and against values that changed since.
#pragma once

#include <float.h>
#include <stdint.h>

#include "ral/attention.h"
#include "ral/policy.h"

namespace ral {

// Where the arrays of indices of a call lie.
enum class Memory { kHost, kDevice };  // kDevice: only the device can read, so none is checked

static inline bool in_range(int64_t x, int64_t low, int64_t high) {
  return low <= x && x <= high;
}

// Sizes of one tensor, at least 1 each. Offsets into it stay far from the end of int64.
template <class... Sizes>
static inline bool are_sizes(Sizes... sizes) {
  return (in_range(sizes, 1, INT32_MAX) && ...) && (1.0 * ... * double(sizes)) < 0x1p60;
}

static inline bool is_float_dtype(int32_t dtype) {
  return dtype == RAL_FLOAT32 || dtype == RAL_BFLOAT16 || dtype == RAL_FLOAT16;
}

// -1 = no bound.
static inline bool are_scores(int64_t window_left, int64_t window_right, float scale,
                              float softcap) {
  return in_range(window_left, -1, INT32_MAX) && in_range(window_right, -1, INT32_MAX) &&
         scale > 0.f && scale <= FLT_MAX && softcap >= 0.f && softcap <= FLT_MAX;
}

static inline bool are_span_ids(const int32_t* ids, int64_t stride_b, int64_t batch_size,
                                int64_t seqlen_k, int64_t num_spans) {
  const int32_t count = static_cast<int32_t>(num_spans);
  for (int64_t b = 0; b < (stride_b == 0 ? 1 : batch_size); ++b) {
    int32_t wrong = 0;  // without a branch, so that it is vectorised
    for (int64_t i = 0; i < seqlen_k; ++i) {
      const int32_t id = ids[b * stride_b + i];
      wrong |= (id < -1) | (id >= count);
    }
    if (wrong) return false;
  }
  return true;
}

// Bounds of packed sequences: from 0 or more to at most `total`, never decreasing.
static inline bool are_bounds(const int32_t* bounds, int64_t num_sequences, int64_t total) {
  int64_t last = 0;
  for (int64_t i = 0; i <= num_sequences; ++i) {
    if (bounds[i] < last) return false;
    last = bounds[i];
  }
  return last <= total;
}

// A ral_status. `gradients` is null in a forward.
static inline int32_t check_attention(Memory memory, const ral_attention_params* params,
                                      const ral_attention_outputs* outputs,
                                      const ral_attention_gradients* gradients) {
  if (!params || !outputs) return RAL_BAD_ARGUMENT;
  const ral_attention_params& x = *params;
  const bool packed = x.cu_seqlens_q || x.cu_seqlens_k;
  const bool spans = x.span_ids != nullptr, rows = x.row_start < x.row_stop;
  const bool fits =
      are_sizes(x.batch_size, x.num_heads, x.seqlen_q, x.head_dim) &&
      are_sizes(x.batch_size, x.num_heads, x.seqlen_q, x.head_dim_v) &&
      are_sizes(x.batch_size, x.num_kv_heads, x.seqlen_k, x.head_dim) &&
      are_sizes(x.batch_size, x.num_kv_heads, x.seqlen_k, x.head_dim_v) &&
      x.num_heads % x.num_kv_heads == 0 && in_range(x.num_spans, 0, INT32_MAX) &&
      (x.num_spans == 0 || are_sizes(x.batch_size, x.num_heads, x.seqlen_q, x.num_spans)) &&
      in_range(x.row_start, 0, x.row_stop) && x.row_stop <= x.seqlen_q &&
      are_scores(x.window_left, x.window_right, x.scale, x.softcap) && is_float_dtype(x.dtype) &&
      (packed ? x.cu_seqlens_q && x.cu_seqlens_k && x.batch_size == 1 &&
                    in_range(x.num_sequences, 0, INT32_MAX)
              : x.num_sequences == x.batch_size) &&
      (memory == Memory::kDevice || x.num_threads >= 1);
  const bool given = x.q.data && x.k.data && x.v.data && outputs->out.data && outputs->lse &&
                     (spans || !x.span_bias.data) &&
                     (!x.attn_mask.data || x.attn_mask_dtype == RAL_BOOL ||
                      x.attn_mask_dtype == RAL_FLOAT32 || x.attn_mask_dtype == x.dtype) &&
                     (gradients ? gradients->dq.data && gradients->dk.data && gradients->dv.data &&
                                      (!gradients->dmarginals || (spans && outputs->marginals)) &&
                                      (!gradients->dspan_bias || (spans && x.span_bias.data))
                      : spans   ? outputs->marginals || !rows || x.num_spans == 0
                                : x.num_spans == 0 || !outputs->marginals);
  if (!fits || !given) return RAL_BAD_ARGUMENT;
  if (memory == Memory::kDevice) return RAL_OK;
  if (packed && !(are_bounds(x.cu_seqlens_q, x.num_sequences, x.seqlen_q) &&
                  are_bounds(x.cu_seqlens_k, x.num_sequences, x.seqlen_k)))
    return RAL_BAD_BOUNDS;
  if (spans &&
      !are_span_ids(x.span_ids, x.span_ids_stride_b, x.batch_size, x.seqlen_k, x.num_spans))
    return RAL_BAD_SPAN_ID;
  return RAL_OK;
}

static inline int32_t check_attention_bwd(Memory memory, const ral_attention_params* params,
                                          const ral_attention_outputs* outputs,
                                          const ral_attention_gradients* gradients) {
  return gradients ? check_attention(memory, params, outputs, gradients) : RAL_BAD_ARGUMENT;
}

// Offsets of packed sequences from 0 on, each at most `longest` after the one before it.
static inline bool are_offsets(const int32_t* offsets, int64_t num_sequences, int64_t total,
                               int64_t longest) {
  if (offsets[0] != 0 || !are_bounds(offsets, num_sequences, total)) return false;
  for (int64_t i = 0; i < num_sequences; ++i) {
    if (offsets[i + 1] - offsets[i] > longest) return false;
  }
  return true;
}

static inline int32_t check_packed_policy(Memory memory, const ral_policy_common& x) {
  const bool fits = x.cu_seqlens_q && x.cu_seqlens_k && x.query_starts && x.batch_size == 1 &&
                    !x.key_padding_mask && in_range(x.num_sequences, 0, INT32_MAX) &&
                    in_range(x.max_rows, 1, x.num_rows) && in_range(x.max_keys, 1, x.seqlen_k);
  if (!fits) return RAL_BAD_ARGUMENT;
  if (memory == Memory::kDevice) return RAL_OK;
  return are_offsets(x.cu_seqlens_q, x.num_sequences, x.num_rows, x.max_rows) &&
                 are_offsets(x.cu_seqlens_k, x.num_sequences, x.seqlen_k, x.max_keys)
             ? RAL_OK
             : RAL_BAD_BOUNDS;
}

static inline int32_t check_policy_common(Memory memory, const ral_policy_common& x) {
  const bool packed = x.cu_seqlens_q || x.cu_seqlens_k || x.query_starts;
  const int64_t outcomes = x.span_ids ? x.num_spans : packed ? x.max_keys : x.seqlen_k;
  if (!are_sizes(x.batch_size, x.num_rows, x.seqlen_k) || !in_range(x.num_spans, 0, INT32_MAX) ||
      (x.num_spans > 0 && !x.span_ids) || !in_range(x.query_start, -INT32_MAX, INT32_MAX) ||
      x.total_rows != x.num_rows || x.row_length != outcomes ||
      (memory == Memory::kHost && x.num_threads < 1))
    return RAL_BAD_ARGUMENT;
  if (packed) {
    if (const int32_t wrong = check_packed_policy(memory, x)) return wrong;
  }
  if (memory == Memory::kHost && x.span_ids &&
      !are_span_ids(x.span_ids, x.span_ids_stride_b, x.batch_size, x.seqlen_k, x.num_spans))
    return RAL_BAD_SPAN_ID;
  return RAL_OK;
}

// `normalised`: the kernel reads norm and z, or writes them for another one.
static inline int32_t check_policy_side(Memory memory, const ral_policy_common& common,
                                        const ral_policy_side& x, bool normalised) {
  const bool fits =
      are_sizes(common.batch_size, x.num_heads, common.num_rows, x.head_dim) &&
      are_sizes(common.batch_size, x.num_kv_heads, common.seqlen_k, x.head_dim) &&
      x.num_heads % x.num_kv_heads == 0 && in_range(x.shared_prefix, 0, common.seqlen_k) &&
      (common.num_spans == 0 ||
       are_sizes(common.batch_size, x.num_heads, common.num_rows, common.num_spans)) &&
      are_scores(x.window_left, x.window_right, x.scale, x.softcap) && is_float_dtype(x.dtype);
  const bool given =
      x.q.data && (x.k.data || x.shared_prefix == common.seqlen_k) &&
      (x.shared_prefix == 0 || !common.cu_seqlens_q) &&
      (x.shared_prefix == 0 || (x.k_prefix.data && x.prefix_index && x.num_prefixes >= 1)) &&
      (common.span_ids || !x.span_bias.data) && (!normalised || (x.norm && x.z));
  if (!fits || !given) return RAL_BAD_ARGUMENT;
  if (memory == Memory::kHost && x.shared_prefix > 0)
    for (int64_t b = 0; b < common.batch_size; ++b)
      if (!in_range(x.prefix_index[b], 0, x.num_prefixes - 1)) return RAL_BAD_PREFIX_INDEX;
  return RAL_OK;
}

// Keys in [0, seqlen_k), ascending, and then -1.
static inline bool are_target_ids(const int32_t* ids, int64_t length, int64_t seqlen_k) {
  int64_t last = -1;
  for (int64_t i = 0; i < length; ++i) {
    const bool none = ids[i] == -1;
    if (!none && (ids[i] <= last || ids[i] >= seqlen_k)) return false;
    last = none ? seqlen_k : ids[i];
  }
  return true;
}

static inline int32_t check_policy_target(Memory memory, const ral_policy_common& common,
                                          const ral_policy_target& x) {
  const int64_t rows = common.batch_size * common.num_rows;
  // A call of some packed sequences, which CUDA makes, has not all keys of its targets.
  const bool fits = x.index && in_range(x.first_key, 0, memory == Memory::kHost ? 0 : INT32_MAX) &&
                    are_sizes(common.batch_size, x.num_targets, x.length) &&
                    (x.ids || x.length - x.first_key >= common.seqlen_k) && !common.span_ids;
  if (!fits) return RAL_BAD_ARGUMENT;
  if (memory == Memory::kDevice) return RAL_OK;
  for (int64_t i = 0; i < rows; ++i) {
    if (!in_range(x.index[i], -1, x.num_targets - 1)) return RAL_BAD_TARGET;
  }
  for (int64_t i = 0; x.ids && i < common.batch_size * x.num_targets; ++i) {
    if (!are_target_ids(x.ids + i * x.length, x.length, common.seqlen_k)) return RAL_BAD_TARGET;
  }
  return RAL_OK;
}

static inline int32_t check_policy(Memory memory, const ral_policy_params* params,
                                   bool is_backward) {
  if (!params) return RAL_BAD_ARGUMENT;
  const ral_policy_params& x = *params;
  int32_t status = check_policy_common(memory, x.common);
  if (status == RAL_OK) status = check_policy_side(memory, x.common, x.policy, true);
  if (status != RAL_OK) return status;
  const bool spans = x.common.span_ids != nullptr;
  const bool outcomes = !spans || x.common.num_spans > 0;
  const bool given = is_backward ? (x.dp || !outcomes) && x.dq.data && x.dk.data &&
                                       (!x.dspan_bias || (spans && x.policy.span_bias.data)) &&
                                       (!x.dhead_weights || x.policy.head_weights)
                                 : x.p || !outcomes;
  return given ? RAL_OK : RAL_BAD_ARGUMENT;
}

enum class DivergencePass { kForward, kBackward, kLoss };

static inline int32_t check_policy_divergence(Memory memory,
                                              const ral_policy_divergence_params* params,
                                              DivergencePass pass) {
  if (!params) return RAL_BAD_ARGUMENT;
  const ral_policy_divergence_params& x = *params;
  const bool loss = pass == DivergencePass::kLoss;
  int32_t status = check_policy_common(memory, x.common);
  if (status == RAL_OK) status = check_policy_side(memory, x.common, x.policy, !loss);
  const bool has_target = x.target.values != nullptr;
  if (status == RAL_OK) {
    status = has_target ? check_policy_target(memory, x.common, x.target)
                        : check_policy_side(memory, x.common, x.reference, true);
  }
  if (status != RAL_OK) return status;
  if (has_target && (!x.reference.z || x.reference_normalised)) return RAL_BAD_ARGUMENT;
  const bool given =
      (pass == DivergencePass::kBackward || x.value) && (loss || (x.u && x.w)) &&
      (pass == DivergencePass::kForward ||
       (x.dvalue && x.dq.data && x.dk.data && (!x.dhead_weights || x.policy.head_weights)));
  return given && in_range(x.kind, RAL_JSD, RAL_CROSS_ENTROPY) ? RAL_OK : RAL_BAD_ARGUMENT;
}

static inline int32_t check_divergence(const ral_divergence_params* params) {
  if (!params) return RAL_BAD_ARGUMENT;
  const ral_divergence_params& x = *params;
  if (!in_range(x.kind, RAL_JSD, RAL_CROSS_ENTROPY) || x.num_threads < 1) return RAL_BAD_ARGUMENT;
  if (x.num_rows == 0) return RAL_OK;
  const bool given = x.value && (x.length == 0 || (x.p && x.r));
  const bool fits = in_range(x.length, 0, INT32_MAX - 1) && are_sizes(x.num_rows, x.length + 1);
  return given && fits ? RAL_OK : RAL_BAD_ARGUMENT;
}

}  // namespace ral
