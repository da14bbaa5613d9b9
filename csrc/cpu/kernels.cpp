// One CPU variant: compiled several times, each with its own instruction set and RAL_ISA namespace.
//
// Only this project's code may be instantiated here. A standard library template compiled with
// AVX-512 could be the copy that the linker keeps for the whole library.
#include "attention_bwd.h"
#include "attention_fwd.h"

namespace ral {
namespace RAL_ISA {
namespace {

// Query columns of a forward block: one full-width panel where vectors are long, several where they
// are short, so that K and V are read once per 64 queries either way.
constexpr int64_t kForwardPanels = 64 / kPanel > 0 ? 64 / kPanel : 1;

template <class Compute>
int forward_as(const ral_attention_params& params, const ral_attention_outputs& outputs) {
  const int64_t group = params.num_kv_heads ? params.num_heads / params.num_kv_heads : 0;
  const int64_t longest = params.cu_seqlens_q ? kPanel : params.seqlen_q;
  if (longest * group <= kLanes) return AttentionForward<Compute, 1, 1>(params, outputs).run();
  return AttentionForward<Compute, kTileVectors, kForwardPanels>(params, outputs).run();
}

int forward(const ral_attention_params& params, const ral_attention_outputs& outputs) {
#if defined(__AVX512BF16__)
  if (params.dtype == RAL_BFLOAT16) return forward_as<BFloat16Compute>(params, outputs);
#endif
  return forward_as<Float32Compute>(params, outputs);
}

constexpr int64_t kBackwardPanels = 192 / kPanel;

int backward(const ral_attention_params& params, const ral_attention_outputs& outputs,
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

}  // namespace

const AttentionKernels kAttentionKernels{forward, backward};

}  // namespace RAL_ISA
}  // namespace ral
