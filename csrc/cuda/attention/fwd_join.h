// Combines the results of parts of the keys (KeyParts), one warp per row.
#pragma once

#include "attention/fwd_rows.h"

namespace ral {
namespace cuda {

template <typename T>
struct attention_fwd_join_kernel {
  using Params = AttentionFwdParams;
  static constexpr int kThreads = 128, kMinBlocks = 8, kSharedBytes = 0;
  static constexpr int kRowsPerBlock = kThreads / kWarpSize;
  static const char* name() { return "attention_fwd_join_kernel"; }

  RAL_DEVICE static void run(const Params& params, char*) {
    const ral_attention_params& call = params.call;
    const KeyParts& parts = params.parts;
    const int64_t num_rows = call.batch_size * call.num_heads * call.seqlen_q;
    const int64_t row = block_index() * kRowsPerBlock + warp_index();
    if (row >= num_rows) return;
    const int64_t t = row % call.seqlen_q, head = row / call.seqlen_q;  // counted over the batch
    const int64_t b = head / call.num_heads, h = head % call.num_heads;
    const int lane = lane_index();

    float m = minus_infinity(), sum = 0.0f;
    for (int32_t part = 0; part < parts.num_parts; ++part)
      m = maximum(m, load_global(parts.sums + part * num_rows + row).x);
    const auto weight_of = [&](int32_t part) {
      const Float2 of_part = load_global(parts.sums + part * num_rows + row);
      return of_part.y * exp2(of_part.x - stabiliser(m));
    };
    for (int32_t part = 0; part < parts.num_parts; ++part) sum += weight_of(part);
    // A row that saw no key has sum = 0 and gives 0.
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    const float lse = sum > 0.0f ? (stabiliser(m) + log2(sum)) * kLn2 : minus_infinity();
    if (lane == 0) store_global(params.outputs.lse + row, lse);

    auto* out = reinterpret_cast<uint32_t*>(rows_of<T>(params.outputs.out, b, h, t));
    for (int pair = lane; pair < call.head_dim_v / 2; pair += kWarpSize) {
      Float2 x{};
      for (int32_t part = 0; part < parts.num_parts; ++part) {
        const float weight = weight_of(part);
        const Float2 y = load_global(reinterpret_cast<const Float2*>(
            parts.out + (part * num_rows + row) * parts.columns + 2 * pair));
        x.x += weight * y.x;
        x.y += weight * y.y;
      }
      store_global(out + pair, pack<T>(x.x * inverse, x.y * inverse));
    }

    if (params.outputs.marginals == nullptr || t < call.row_start || t >= call.row_stop) return;
    const int64_t of_head = call.row_stop - call.row_start;
    const int64_t of_part = call.batch_size * call.num_heads * of_head;
    const int64_t with_marginals = head * of_head + t - call.row_start;
    for (int64_t s = lane; s < call.num_spans; s += kWarpSize) {
      float share = 0.0f;
      for (int32_t part = 0; part < parts.num_parts; ++part)
        share +=
            weight_of(part) *
            load_global(parts.marginals + (part * of_part + with_marginals) * call.num_spans + s);
      store_global(params.outputs.marginals + with_marginals * call.num_spans + s, share * inverse);
    }
  }
};

}  // namespace cuda
}  // namespace ral
