// Launch of attention_bwd_delta_kernel.
#include "attention/bwd_delta.h"
#include "core/launch.h"

namespace ral {
namespace cuda {

template <typename T>
static int launch_delta(const AttentionBwdParams& params, void* stream) {
  using Delta = attention_bwd_delta_kernel<T>;
  const ral_attention_params& call = params.call;
  const int64_t num_rows = call.batch_size * call.num_heads * call.seqlen_q;
  return run<Delta>(cdiv(num_rows, Delta::kRowsPerBlock), params, stream);
}

int attention_bwd_delta(const AttentionBwdParams& params, void* stream) {
  return params.call.dtype == RAL_BFLOAT16 ? launch_delta<Bf16>(params, stream)
                                           : launch_delta<Fp16>(params, stream);
}

}  // namespace cuda
}  // namespace ral
