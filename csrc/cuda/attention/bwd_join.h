// Adds the parts of dk and dv where the queries that see a block of keys were split (KeySplits).
#pragma once

#include "attention/bwd.h"

namespace ral {
namespace cuda {

// One CTA has kBlockK keys of dk or of dv of a kv head. It adds the parts of each number in their
// order, so results repeat bit for bit.
template <typename T>
struct attention_bwd_join_kernel {
  using Params = AttentionBwdParams;
  static constexpr int kThreads = 128, kMinBlocks = 8, kSharedBytes = 0;
  static constexpr int kAtOnce = 4;  // numbers of a thread
  static const char* name() { return "attention_bwd_join_kernel"; }

  RAL_DEVICE static void run(const Params& params, char*) {
    const ral_attention_params& call = params.call;
    const KeysOfBlock block(call, params.order, 2, kBlockK, false);
    const bool is_dk = block.share == 0;
    const ral_tensor& gradient = is_dk ? params.gradients.dk : params.gradients.dv;
    const int32_t columns = params.splits.columns;
    const int64_t head_dim = is_dk ? call.head_dim : call.head_dim_v;
    const float factor = is_dk ? call.scale : 1.0f;
    const int64_t of_part = call.batch_size * call.num_kv_heads * call.seqlen_k * columns;
    const int64_t row =
        (block.b * call.num_kv_heads + block.kv_head) * call.seqlen_k + block.first_token;
    const float* parts = (is_dk ? params.splits.dk : params.splits.dv) + row * columns;
    T* const rows = rows_of<T>(gradient, block.b, block.kv_head, block.first_token);
    for (int32_t at = kAtOnce * thread_index(); at < block.num_keys * columns;
         at += kAtOnce * kThreads) {
      if (at % columns >= head_dim) continue;
      Float4 sum{};
      for (int32_t part = 0; part < params.splits.num_parts; ++part) {
        const Float4 x = load_global(reinterpret_cast<const Float4*>(parts + part * of_part + at));
        RAL_UNROLL for (int e = 0; e < kAtOnce; ++e)
          sum.x[e] += x.x[e];
      }
      const uint64_t low = pack<T>(sum.x[0] * factor, sum.x[1] * factor);
      const uint64_t high = pack<T>(sum.x[2] * factor, sum.x[3] * factor);
      T* const to = rows + at / columns * gradient.stride_t + at % columns;
      store_global(reinterpret_cast<uint64_t*>(to), low | high << 32);
    }
  }
};

}  // namespace cuda
}  // namespace ral
