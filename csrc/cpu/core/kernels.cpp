// One CPU variant. This file is compiled once per instruction set, each in its RAL_ISA namespace.
//
// It may instantiate only this project's code. The linker could keep a standard library template
// compiled with AVX-512 for the whole library.
#include "core/kernels.h"
#include "attention/bwd.h"
#include "attention/fwd.h"
#include "core/tile_rate.h"
#include "policy/divergence_fwd.h"
#include "policy/kernels.h"

namespace ral {
namespace RAL_ISA {
namespace {

// Query columns of a forward block: one full-width panel where vectors are long, several where they
// are short. Either way K and V are read once per 64 queries.
constexpr int64_t kForwardPanels = 64 / kPanel > 0 ? 64 / kPanel : 1;

template <class Compute>
int attention_fwd_as(const ral_attention_params& params, const ral_attention_outputs& outputs) {
  const int64_t group = params.num_kv_heads ? params.num_heads / params.num_kv_heads : 0;
  const int64_t longest = params.cu_seqlens_q ? kPanel : params.seqlen_q;
  if (longest * group <= kLanes) return AttentionForward<Compute, 1, 1>(params, outputs).run();
  return AttentionForward<Compute, kTileVectors, kForwardPanels>(params, outputs).run();
}

int attention_fwd(const ral_attention_params& params, const ral_attention_outputs& outputs) {
  if (has_few_queries(params)) {
    return AttentionForward<Float32Compute, 1, 1, false>(params, outputs).run();
  }
#if defined(__AVX512BF16__)
  if (params.dtype == RAL_BFLOAT16) return attention_fwd_as<BFloat16Compute>(params, outputs);
#endif
  return attention_fwd_as<Float32Compute>(params, outputs);
}

constexpr int64_t kBackwardPanels = 192 / kPanel;

int attention_bwd(const ral_attention_params& params, const ral_attention_outputs& outputs,
                  const ral_attention_gradients& gradients) {
#if defined(__AVX512BF16__)
  if (params.dtype == RAL_BFLOAT16) {
    return AttentionBackward<BFloat16Compute, kTileVectors, kBackwardPanels>(params, outputs,
                                                                             gradients)
        .run();
  }
#endif
  return AttentionBackward<Float32Compute, kTileVectors, kBackwardPanels>(params, outputs,
                                                                          gradients)
      .run();
}

// Calls fn<Compute, Reference>() for the compute types of two sides.
template <class Fn>
int with_compute_types(int32_t policy_dtype, int32_t reference_dtype, const Fn& fn) {
#if defined(__AVX512BF16__)
  if (policy_dtype == RAL_BFLOAT16 && reference_dtype == RAL_BFLOAT16) {
    return fn(BFloat16Compute(), BFloat16Compute());
  }
  if (policy_dtype == RAL_BFLOAT16) return fn(BFloat16Compute(), Float32Compute());
  if (reference_dtype == RAL_BFLOAT16) return fn(Float32Compute(), BFloat16Compute());
#endif
  (void)policy_dtype, (void)reference_dtype;
  return fn(Float32Compute(), Float32Compute());
}

int64_t sub_blocks_of(const ral_policy_side& side) {
  return PolicySide<Float32Compute, kTileVectors>::sub_blocks_for(side.num_heads /
                                                                  side.num_kv_heads);
}
int64_t sub_blocks_of(const ral_policy_side& policy, const ral_policy_side& reference) {
  const int64_t own = sub_blocks_of(policy), other = sub_blocks_of(reference);
  return own > other ? own : other;
}

template <class Compute, class Reference>
using Policy = PolicyKernels<Compute, Reference, kTileVectors>;

int policy_fwd(const ral_policy_params& x) {
  return with_compute_types(x.policy.dtype, x.policy.dtype, [&](auto c, auto r) {
    return Policy<decltype(c), decltype(r)>::fwd(x, sub_blocks_of(x.policy));
  });
}

int policy_bwd(const ral_policy_params& x) {
  return with_compute_types(x.policy.dtype, x.policy.dtype, [&](auto c, auto r) {
    return Policy<decltype(c), decltype(r)>::bwd(x, sub_blocks_of(x.policy));
  });
}

int policy_divergence_fwd(const ral_policy_divergence_params& x) {
  return with_compute_types(x.policy.dtype, x.reference.dtype, [&](auto c, auto r) {
    return Policy<decltype(c), decltype(r)>::divergence_fwd(x,
                                                            sub_blocks_of(x.policy, x.reference));
  });
}

int policy_divergence_bwd(const ral_policy_divergence_params& x) {
  return with_compute_types(x.policy.dtype, x.reference.dtype, [&](auto c, auto r) {
    return Policy<decltype(c), decltype(r)>::divergence_bwd(x,
                                                            sub_blocks_of(x.policy, x.reference));
  });
}

int policy_loss(const ral_policy_divergence_params& x) {
  return with_compute_types(x.policy.dtype, x.reference.dtype, [&](auto c, auto r) {
    return Policy<decltype(c), decltype(r)>::loss(x, sub_blocks_of(x.policy, x.reference));
  });
}

int divergence_fwd(const ral_divergence_params& x) {
  return DivergenceForward(x).run();
}

int64_t tile_flops(int32_t dtype, int num_threads, int64_t repeats) {
#if defined(__AVX512BF16__)
  if (dtype == RAL_BFLOAT16) return TileRate<BFloat16Compute>::run(num_threads, repeats);
#endif
  (void)dtype;
  return TileRate<Float32Compute>::run(num_threads, repeats);
}

}  // namespace

const Kernels kKernels{attention_fwd, attention_bwd,         policy_fwd,
                       policy_bwd,    policy_divergence_fwd, policy_divergence_bwd,
                       policy_loss,   divergence_fwd,        tile_flops};

}  // namespace RAL_ISA
}  // namespace ral
