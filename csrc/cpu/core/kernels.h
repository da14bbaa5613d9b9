// The table of ops that every CPU variant fills and the entry points call.
#pragma once

#include "ral/attention.h"
#include "ral/policy.h"

namespace ral {

constexpr int64_t kFewQueries = 8;

// Whether a forward has so few queries per key, like a step of decoding, that packing K and V would
// take longer than the products. Without packing, eight queries per kv head take 0.8x the time of
// bfloat16 packed for AMX. In float32 they take less than 0.5x (8,192 keys, Emerald Rapids,
// 2026-11).
static inline bool has_few_queries(const ral_attention_params& params) {
  if (params.cu_seqlens_q || params.num_kv_heads == 0) return false;
  return params.seqlen_q * (params.num_heads / params.num_kv_heads) <= kFewQueries;
}

struct Kernels {
  int (*attention_fwd)(const ral_attention_params&, const ral_attention_outputs&);
  int (*attention_bwd)(const ral_attention_params&, const ral_attention_outputs&,
                       const ral_attention_gradients&);
  int (*policy_fwd)(const ral_policy_params&);
  int (*policy_bwd)(const ral_policy_params&);
  int (*policy_divergence_fwd)(const ral_policy_divergence_params&);
  int (*policy_divergence_bwd)(const ral_policy_divergence_params&);
  int (*policy_loss)(const ral_policy_divergence_params&);
  int (*divergence_fwd)(const ral_divergence_params&);
  int64_t (*tile_flops)(int32_t dtype, int num_threads, int64_t repeats);
};

namespace portable {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}

// For bfloat16 alone, and without divergence_fwd, which takes only float32.
namespace amx_bf16 {
extern const Kernels kKernels;
}

// The kernels of variant `isa`. Null if it was not built or this processor cannot run it.
const Kernels* kernels_of(int32_t isa);

}  // namespace ral
