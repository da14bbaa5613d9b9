// What the backward kernels of `attention` share: equations (8) to (16) of
// ral_kernels/ops/attention/README.md. Without a soft cap dx = ds.
#pragma once

#include "attention/general.h"
#include "core/blocks.h"
#include "core/tiles.h"

namespace ral {
namespace cuda {

// How the queries that see a block of keys are split over CTAs, where there are too few kv heads
// and keys to fill the GPU: into parts of their heads, and those into ranges of queries. Each part
// has sums of its own in float32, which attention_bwd_join_kernel adds in the order of the parts.
struct KeySplits {
  int32_t heads, ranges, num_parts;  // num_parts = heads * ranges
  int32_t columns;                   // of the kernels
  float *dk, *dv;                    // [num_parts, B, Hk, N, columns]; not used if it is 1
};

struct AttentionBwdParams {
  ral_attention_params call;
  ral_attention_outputs outputs;
  ral_attention_gradients gradients;
  float* delta;         // [B, H, T], written by attention_bwd_delta_kernel
  float* lse_log2;      // [B, H, T], from the same kernel; 0 where a row sees no key
  float* span_weights;  // [B, H, T, S], of the kernel that writes dspan_bias
  KeySplits splits;
  CtaOrder order;
};

// The parameters of a call with `scratch` of 2 B H T floats, and B H T S more if dspan_bias is
// wanted. With several parts, head_parts * range_parts * 2 B Hk N columns floats follow.
// columns: of the kernels that run the call.
inline AttentionBwdParams bwd_params(const ral_attention_params& call,
                                     const ral_attention_outputs& outputs,
                                     const ral_attention_gradients& gradients, int32_t head_parts,
                                     int32_t range_parts, int32_t columns, float* scratch) {
  const int64_t num_rows = call.batch_size * call.num_heads * call.seqlen_q;
  const int64_t num_keys = call.batch_size * call.num_kv_heads * call.seqlen_k;
  float* const span_weights = scratch + 2 * num_rows;
  const int64_t size = num_rows * (gradients.dspan_bias != nullptr ? 2 + call.num_spans : 2);
  float* const dk = scratch + (size + 3) / 4 * 4;  // aligned to 16 bytes
  const int32_t num_parts = head_parts * range_parts;
  float* const dv = dk + num_parts * num_keys * columns;
  const KeySplits splits{head_parts, range_parts, num_parts, columns, dk, dv};
  return {call, outputs, gradients, scratch, scratch + num_rows, span_weights, splits, {}};
}

// Whether head_parts and range_parts split the queries of a call.
inline bool are_parts(const ral_attention_params& call, int32_t head_parts, int32_t range_parts) {
  return head_parts >= 1 && head_parts <= call.num_heads / call.num_kv_heads && range_parts >= 1 &&
         range_parts <= call.seqlen_q + 1;
}

// Launches of the kernels, each in the .cu file of its name so that nvcc compiles them in parallel.
// All return as `run` does. dq and dkdv read what attention_bwd_delta writes; join reads what dkdv
// writes. All but the first set `order`.
int attention_bwd_delta(const AttentionBwdParams& params, void* stream);
int attention_bwd_dq(const AttentionBwdParams& params, void* stream);
int attention_bwd_dkdv(const AttentionBwdParams& params, void* stream);
int attention_bwd_dq_general(const AttentionBwdParams& params, void* stream);
int attention_bwd_dkdv_general(const AttentionBwdParams& params, void* stream);
int attention_bwd_join(const AttentionBwdParams& params, void* stream);

// The gradient of the marginals, row by row. Rows without marginals have none.
struct MarginalGradient {
  const float* rows;  // from query 0 of the sequence on; null = no gradient
  int64_t num_spans;
  int32_t first, stop;  // queries of the sequence that have one

  RAL_DEVICE MarginalGradient(const AttentionBwdParams& params, const Sequence& sequence, int64_t b,
                              int64_t h)
      : rows(nullptr), num_spans(params.call.num_spans), first(0), stop(0) {
    const ral_attention_params& call = params.call;
    if (params.gradients.dmarginals == nullptr || call.span_ids == nullptr) return;
    const int64_t num_rows = call.row_stop - call.row_start;
    const int64_t shift = sequence.q_start - call.row_start;
    rows = params.gradients.dmarginals + ((b * call.num_heads + h) * num_rows + shift) * num_spans;
    first = shift < 0 ? int32_t(-shift) : 0;
    const int64_t end = num_rows - shift;
    stop = int32_t(end < sequence.length_q ? end : sequence.length_q);
  }

  // Bit i: whether query + i has one, i < count <= 32.
  RAL_DEVICE uint32_t has(int32_t query, int count) const {
    const int32_t low = maximum(first - query, 0), high = minimum(stop - query, count);
    return low >= high ? 0 : ~0u << low & ~0u >> (32 - high);
  }
  // The row of a query, or null.
  RAL_DEVICE const float* row(int32_t query) const {
    return query >= first && query < stop ? rows + query * num_spans : nullptr;
  }
  RAL_DEVICE static float at(const float* row, int32_t span) {
    return row != nullptr && span >= 0 ? load_global(row + span) : 0.0f;
  }
  RAL_DEVICE float at(int32_t query, int32_t span) const {
    const bool there = span >= 0 && query >= first && query < stop;
    return there ? load_global(rows + query * num_spans + span) : 0.0f;
  }
};

// (11) of one element, from the gradient of its weight less delta. A weight of 0 has gradient 0
// whatever that is. A loss of log m or of lse sends inf or NaN to rows that see no key.
RAL_DEVICE float gradient_of_score(float p, float dp) {
  return p == 0.0f ? 0.0f : p * dp;
}

}  // namespace cuda
}  // namespace ral
