// Reduces each row's sums over keys to D, and forms what the row's gradient needs. Equations (1),
// (3), (4), (6) and (12) of ral_kernels/ops/policy/divergence.md.
#pragma once

#include "policy/side.h"

namespace ral {
namespace cuda {

struct PolicyRowsParams {
  ral_policy_common common;
  ral_policy_side policy, reference;
  RowChunk chunk;
  const float* value_parts;  // [samples, rows, chunk.stride / kTermKeys], or null: no divergence
  const float* u_parts;      // [samples, rows, H, chunk.stride / 64]; null = u is given
  float* u;                  // [B, H, T]
  const float* w;            // [B, H, T]
  float* value;              // [B, T], or null
  // For the gradient, as in PolicyBwdParams; c null = no gradient.
  const float* weight;  // [B, T]; null = 1
  float* c;
  float* factor;
  float* delta;
  float* dhead_weights;  // [B, H, T] terms of (12), or null
};

// One warp per row. A row has no gradient if its value is infinite or if one side has no policy.
struct policy_rows_kernel {
  using Params = PolicyRowsParams;
  static constexpr int kThreads = 128, kMinBlocks = 8, kSharedBytes = 0;
  static constexpr int kRowsPerBlock = kThreads / kWarpSize;
  static const char* name() { return "policy_rows_kernel"; }

  RAL_DEVICE static void run(const Params& params, char*) {
    const RowChunk& chunk = params.chunk;
    const int64_t index = block_index() * kRowsPerBlock + warp_index();
    if (index >= int64_t(chunk.num_samples) * chunk.num_rows) return;
    const int lane = lane_index();
    const int32_t b = chunk.first_sample + int32_t(index / chunk.num_rows);
    const int32_t t = chunk.first_row + int32_t(index % chunk.num_rows);
    const int64_t num_rows = params.common.num_rows, num_heads = params.policy.num_heads;
    const int64_t row = b * num_rows + t;
    const float z = load_global(params.policy.z + row);
    bool constant = z == 0.0f || load_global(params.reference.z + row) == 0.0f;
    // Key blocks that the row sees on neither side may not have been formed.
    const Sample sample = sample_of_row(params.common, b, t);
    const KeysOfRows mine(visibility_of(sample, params.policy), t, 1);
    const KeysOfRows others(visibility_of(sample, params.reference), t, 1);

    float value = 0.0f;
    const int32_t num_parts = params.value_parts == nullptr ? 0 : int32_t(chunk.stride / kTermKeys);
    for (int32_t part = lane; part < num_parts; part += kWarpSize)
      if (mine.meet(part * kTermKeys, kTermKeys) || others.meet(part * kTermKeys, kTermKeys))
        value += load_global(params.value_parts + index * num_parts + part);
    value = constant ? 0.0f : warp_sum(value);
    constant = constant || value == -minus_infinity();
    if (params.value != nullptr && lane == 0) store_global(params.value + row, value);

    // A lane has every kWarpSize-th head.
    float* const u = params.u + b * num_heads * num_rows + t;
    float all_u = 0.0f;
    if (params.u_parts != nullptr) {
      for (int64_t h = 0; h < num_heads; ++h) {
        const float sum = sum_of_parts(params, index * num_heads + h, mine);  // (3)
        if (lane != h % kWarpSize) continue;
        store_global(u + h * num_rows, constant ? 0.0f : sum);
        all_u += constant ? 0.0f : sum;
      }
    } else {
      for (int64_t h = lane; h < num_heads; h += kWarpSize) all_u += load_global(u + h * num_rows);
    }
    if (params.c == nullptr) return;
    const float share = constant ? 0.0f : 1.0f / (z * float(num_heads));
    const float c = constant ? 0.0f : warp_sum(all_u) * share;  // (4)
    const float weight = params.weight == nullptr ? 1.0f : load_global(params.weight + row);
    const float factor = constant ? 0.0f : share * weight;
    if (lane == 0) store_global(params.c + index, c);
    const float* const inverses =
        params.policy.norm + params.common.batch_size * num_heads * num_rows;
    for (int64_t h = lane; h < num_heads; h += kWarpSize) {
      const int64_t per_head = (b * num_heads + h) * num_rows + t;
      float scaled = 0.0f, delta = 0.0f;
      const float head = head_weight(params.policy, sample, h);
      if (!constant && head != 0.0f) {
        // dS is a multiple of w_h P_h. The normaliser of P_h, with w_h, enters here, once per row.
        scaled = factor * load_global(inverses + per_head);
        delta = (load_global(u + h * num_rows) - c * load_global(params.w + per_head)) / head;
      }
      const int64_t at = chunk.at(b, num_heads, h, t);
      store_global(params.factor + at, scaled);
      store_global(params.delta + at, delta * scaled);  // (6)
      if (params.dhead_weights != nullptr)
        store_global(params.dhead_weights + per_head, delta * factor);
    }
  }

 private:
  // Sums the parts of U of line `line` whose keys the row sees.
  RAL_DEVICE static float sum_of_parts(const Params& params, int64_t line, const KeysOfRows& seen) {
    const float* const parts = params.u_parts + line * (params.chunk.stride / kBlockK);
    const int32_t first = seen.low / kBlockK;
    const int32_t stop = seen.low <= seen.high ? seen.high / kBlockK + 1 : first;
    float sum = 0.0f;
    for (int32_t part = first + lane_index(); part < stop; part += kWarpSize)
      sum += load_global(parts + part);
    return warp_sum(sum);
  }
};

struct PolicyHeadWeightsParams {
  ral_policy_common common;
  int64_t num_heads;
  const float* terms;    // [B, H, T] of (12)
  float* dhead_weights;  // [B, H], or [num_sequences, H]
};

// Sums the terms of (12) over rows, in a fixed order. One warp has a head of a sample.
struct policy_head_weights_kernel {
  using Params = PolicyHeadWeightsParams;
  static constexpr int kThreads = 128, kMinBlocks = 8, kSharedBytes = 0;
  static constexpr int kPerBlock = kThreads / kWarpSize;
  static const char* name() { return "policy_head_weights_kernel"; }

  RAL_DEVICE static void run(const Params& params, char*) {
    const ral_policy_common& common = params.common;
    const bool packed = common.cu_seqlens_q != nullptr;
    const int64_t index = block_index() * kPerBlock + warp_index();
    const int64_t h = index % params.num_heads, sample = index / params.num_heads;
    if (sample >= (packed ? common.num_sequences : common.batch_size)) return;
    const int32_t start = packed ? load_global(common.cu_seqlens_q + sample) : 0;
    const int32_t stop =
        packed ? load_global(common.cu_seqlens_q + sample + 1) : int32_t(common.num_rows);
    const int64_t b = packed ? 0 : sample;
    const float* const terms = params.terms + (b * params.num_heads + h) * common.num_rows;
    double sum = 0.0;  // of the lane's rows
    for (int32_t t = start + lane_index(); t < stop; t += kWarpSize) sum += load_global(terms + t);
    const float all = warp_sum(float(sum));
    if (lane_index() == 0) store_global(params.dhead_weights + index, all);
  }
};

}  // namespace cuda
}  // namespace ral
