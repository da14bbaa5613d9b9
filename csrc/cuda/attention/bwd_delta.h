// Equation (10) of ral_kernels/ops/attention/README.md, one warp per row: delta = rowsum(dout ∘
// out) + rowsum(dm ∘ m) - dlse. It also writes lse in base 2.
#pragma once

#include "attention/bwd.h"

namespace ral {
namespace cuda {

template <typename T>
struct attention_bwd_delta_kernel {
  using Params = AttentionBwdParams;
  static constexpr int kThreads = 128, kMinBlocks = 8, kSharedBytes = 0;
  static constexpr int kRowsPerBlock = kThreads / kWarpSize;
  static const char* name() { return "attention_bwd_delta_kernel"; }

  RAL_DEVICE static void run(const Params& params, char*) {
    const ral_attention_params& call = params.call;
    const int64_t row = block_index() * kRowsPerBlock + warp_index();
    if (row >= call.batch_size * call.num_heads * call.seqlen_q) return;
    const int64_t t = row % call.seqlen_q, h = row / call.seqlen_q % call.num_heads;
    const int64_t b = row / call.seqlen_q / call.num_heads;
    const int lane = lane_index();
    float sum = 0.0f;
    if (params.gradients.dout.data != nullptr) {
      const auto* out =
          reinterpret_cast<const uint32_t*>(rows_of<const T>(params.outputs.out, b, h, t));
      const auto* dout =
          reinterpret_cast<const uint32_t*>(rows_of<const T>(params.gradients.dout, b, h, t));
      for (int pair = lane; pair < call.head_dim_v / 2; pair += kWarpSize) {
        const Float2 x = unpack<T>(load_global(out + pair));
        const Float2 y = unpack<T>(load_global(dout + pair));
        sum += x.x * y.x + x.y * y.y;
      }
    }
    if (params.gradients.dmarginals != nullptr && t >= call.row_start && t < call.row_stop) {
      const int64_t num_rows = call.row_stop - call.row_start;
      const int64_t first =
          ((b * call.num_heads + h) * num_rows + t - call.row_start) * call.num_spans;
      for (int64_t s = lane; s < call.num_spans; s += kWarpSize) {
        const float m = load_global(params.outputs.marginals + first + s);
        if (m != 0.0f) sum += m * load_global(params.gradients.dmarginals + first + s);
      }
    }
    RAL_UNROLL for (int mask = 16; mask > 0; mask /= 2)
      sum += shuffle_xor(sum, mask);
    if (lane != 0) return;
    if (params.gradients.dlse != nullptr) sum -= load_global(params.gradients.dlse + row);
    store_global(params.delta + row, sum);
    const float lse = load_global(params.outputs.lse + row);
    store_global(params.lse_log2 + row, lse == minus_infinity() ? 0.0f : lse * kLog2e);
  }
};

}  // namespace cuda
}  // namespace ral
