// Launch of attention_bwd_join_kernel, where dk and dv are in parts.
#include "attention/bwd_join.h"
#include "core/launch.h"

namespace ral {
namespace cuda {

int attention_bwd_join(const AttentionBwdParams& given, void* stream) {
  if (given.splits.num_parts == 1) return 0;
  AttentionBwdParams params = given;
  const ral_attention_params& call = params.call;
  params.order = order_of_keys(call, kBlockK, 2);
  const int64_t blocks = 2 * params.order.num_blocks * call.num_kv_heads * call.batch_size;
  return call.dtype == RAL_BFLOAT16 ? run<attention_bwd_join_kernel<Bf16>>(blocks, params, stream)
                                    : run<attention_bwd_join_kernel<Fp16>>(blocks, params, stream);
}

}  // namespace cuda
}  // namespace ral
