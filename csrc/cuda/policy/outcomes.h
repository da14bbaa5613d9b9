// Between rows over keys, in scratch memory, and p or its gradient, over keys or spans. Equation
// (8) of ral_kernels/ops/policy/README.md.
#pragma once

#include "policy/side.h"

namespace ral {
namespace cuda {

struct PolicyOutcomesParams {
  ral_policy_common common;
  ral_policy_side side;
  RowChunk chunk;
  float* rows;                  // [samples, rows, chunk.stride]
  float* p;                     // [B, T, common.row_length]
  const float* dp;              // as p
  ral_policy_span_lists lists;  // with spans
  int32_t lanes;                // that sum a span: a power of 2, at most kWarpSize
};

// One row of a chunk.
struct RowOfChunk {
  int32_t b, t;
  int64_t outcomes;  // of the row's outcomes in p
  float* line;       // its keys
  bool is_there;     // packed, later rows belong to no sequence

  RAL_DEVICE RowOfChunk(const PolicyOutcomesParams& params, int64_t index)
      : b(params.chunk.first_sample + int32_t(index / params.chunk.num_rows)),
        t(params.chunk.first_row + int32_t(index % params.chunk.num_rows)),
        outcomes((b * params.common.num_rows + t) * params.common.row_length),
        line(params.rows + index * params.chunk.stride),
        is_there(t < stop_of_rows(params.common)) {}
};

// Writes p from the rows of policy_terms_kernel, which formed no key that a row does not see. One
// CTA has a row.
struct policy_outcomes_kernel {
  using Params = PolicyOutcomesParams;
  static constexpr int kThreads = 128, kMinBlocks = 8, kSharedBytes = 0;
  static const char* name() { return "policy_outcomes_kernel"; }

  RAL_DEVICE static void run(const Params& params, char*) {
    const RowOfChunk row(params, block_index());
    if (!row.is_there) return;
    const ral_policy_common& common = params.common;
    const Sample sample = sample_of_row(common, row.b, row.t);
    const KeysOfRows seen(visibility_of(sample, params.side), row.t, 1);
    const auto weight_of = [&](int32_t key) {
      return key >= seen.low && key <= seen.high ? load_global(row.line + key) : 0.0f;
    };
    float* const p = params.p + row.outcomes;
    if (common.span_ids == nullptr) {
      for (int32_t key = thread_index(); key < common.row_length; key += kThreads)
        store_global(p + key, weight_of(key));
      return;
    }
    const int32_t lanes = params.lanes, num_spans = int32_t(common.num_spans);
    const int32_t* const starts =
        params.lists.starts + (params.lists.is_shared ? 0 : int64_t(sample.index) * num_spans);
    const int32_t lane = thread_index() % lanes;
    for (int32_t first = 0; first < num_spans; first += kThreads / lanes) {
      const int32_t span = first + thread_index() / lanes;
      float sum = 0.0f;
      if (span < num_spans) {
        const int32_t stop = load_global(starts + span + 1);
        for (int32_t i = load_global(starts + span) + lane; i < stop; i += lanes)
          sum += weight_of(load_global(params.lists.keys + i));
      }
      for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (lane == 0 && span < num_spans) store_global(p + span, sum);
    }
  }
};

// Writes the gradient of a row's keys from that of its outcomes. An outcome of probability 0 is a
// constant: its gradient counts as 0. One CTA has a row.
struct policy_outcome_gradients_kernel {
  using Params = PolicyOutcomesParams;
  static constexpr int kThreads = 128, kMinBlocks = 8, kSharedBytes = 0;
  static const char* name() { return "policy_outcome_gradients_kernel"; }

  RAL_DEVICE static void run(const Params& params, char*) {
    const RowOfChunk row(params, block_index());
    if (!row.is_there) return;
    const ral_policy_common& common = params.common;
    const Sample sample = sample_of_row(common, row.b, row.t);
    const int32_t* const ids =
        common.span_ids == nullptr
            ? nullptr
            : common.span_ids + row.b * common.span_ids_stride_b + sample.first_key;
    for (int32_t key = thread_index(); key < params.chunk.stride; key += kThreads) {
      int32_t outcome = key < sample.num_keys ? key : -1;
      if (ids != nullptr && outcome >= 0) outcome = load_global(ids + key);
      const bool counts = outcome >= 0 && load_global(params.p + row.outcomes + outcome) != 0.0f;
      store_global(row.line + key, counts ? load_global(params.dp + row.outcomes + outcome) : 0.0f);
    }
  }
};

}  // namespace cuda
}  // namespace ral
