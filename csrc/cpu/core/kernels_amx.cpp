// The bfloat16 ops on AMX. The variant runs everything else on AVX-512 (variants.cpp).
#include "attention/bwd_amx.h"
#include "attention/fwd_amx.h"
#include "core/kernels.h"
#include "policy/kernels.h"

namespace ral {
namespace RAL_ISA {
namespace {

// The rate of products whose operands stay in L1: TileRate for AMX.
struct AmxRate {
  static constexpr int64_t kSteps = 4;  // a row of 128 features
  alignas(64) uint32_t a[kSteps * 2 * kAmxElements];
  alignas(64) uint32_t b[kSteps * 2 * kAmxElements];
  int64_t repeats;

  static void task(void* self, int64_t, int) {
    const AmxRate& rate = *static_cast<const AmxRate*>(self);
    const AmxScope scope;
    amx_zero_sums();
    for (int64_t i = 0; i < rate.repeats; ++i) {
      amx_accumulate(packed_product(rate.a, rate.b, 2 * kAmxRows, kSteps), [] {});
    }
  }
};

int attention_fwd(const ral_attention_params& params, const ral_attention_outputs& outputs) {
  return AmxForward<4>(params, outputs).run();
}

int attention_bwd(const ral_attention_params& params, const ral_attention_outputs& outputs,
                  const ral_attention_gradients& gradients) {
  return AmxBackward<6>(params, outputs, gradients).run();
}

using Policy = PolicyKernels<AmxCompute, AmxCompute, 2>;

// 32 rows per token block halve the traffic of keys and of dK. Blocks of 64 rows are 4 % to 20 %
// slower (Emerald Rapids, 2026-11). The weights of all heads on all keys, which PolicyLoss keeps,
// are then twice as far away.
int64_t sub_blocks_of(const ral_policy_common& common) {
  return common.num_rows > kLanes ? 2 : 1;
}

int policy_fwd(const ral_policy_params& x) {
  return Policy::fwd(x, sub_blocks_of(x.common));
}
int policy_bwd(const ral_policy_params& x) {
  return Policy::bwd(x, sub_blocks_of(x.common));
}
int policy_divergence_fwd(const ral_policy_divergence_params& x) {
  return Policy::divergence_fwd(x, sub_blocks_of(x.common));
}
int policy_divergence_bwd(const ral_policy_divergence_params& x) {
  return Policy::divergence_bwd(x, sub_blocks_of(x.common));
}
int policy_loss(const ral_policy_divergence_params& x) {
  return Policy::loss(x, sub_blocks_of(x.common));
}

int64_t tile_flops(int32_t, int num_threads, int64_t repeats) {
  static AmxRate rate;  // zeros: any finite number takes the same time
  rate.repeats = repeats;
  parallel_for(num_threads, num_threads, AmxRate::task, &rate);
  return 2 * 2 * kAmxRows * kTileRows * 2 * kAmxRows * AmxRate::kSteps * repeats * num_threads;
}

}  // namespace

const Kernels kKernels{
    attention_fwd,         attention_bwd, policy_fwd, policy_bwd, policy_divergence_fwd,
    policy_divergence_bwd, policy_loss,   nullptr,    tile_flops};

}  // namespace RAL_ISA
}  // namespace ral
