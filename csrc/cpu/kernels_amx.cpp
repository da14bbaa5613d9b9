// Attention in bfloat16 on AMX. What else this variant runs, those without AMX do (variants.cpp).
#include "attention_bwd_amx.h"
#include "attention_fwd_amx.h"
#include "kernels.h"

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

}  // namespace

int attention_fwd(const ral_attention_params& params, const ral_attention_outputs& outputs) {
  return AmxForward<4>(params, outputs).run();
}

int attention_bwd(const ral_attention_params& params, const ral_attention_outputs& outputs,
                  const ral_attention_gradients& gradients) {
  return AmxBackward<6>(params, outputs, gradients).run();
}

int64_t tile_flops(int num_threads, int64_t repeats) {
  static AmxRate rate;  // zeros: the processor takes the same time for any finite number
  rate.repeats = repeats;
  parallel_for(num_threads, num_threads, AmxRate::task, &rate);
  return 2 * 2 * kAmxRows * kTileRows * 2 * kAmxRows * AmxRate::kSteps * repeats * num_threads;
}

}  // namespace RAL_ISA
}  // namespace ral
