// Launch of attention_bwd_dq_sm90_kernel.
#ifdef RAL_CUDA_SM90

#include "attention/bwd_dq_sm90.h"
#include "core/launch.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
static int launch_dq_sm90(AttentionBwdSm90Params params, void* stream) {
  using Dq = attention_bwd_dq_sm90_kernel<T, kHeadDim>;
  const ral_attention_params& call = params.backward.call;
  params.backward.order = order_of_queries(call, Dq::kBlockQ);
  return run<Dq>(params.backward.order.num_blocks * call.num_heads * call.batch_size, params,
                 stream);
}

int attention_bwd_dq_sm90(const AttentionBwdSm90Params& params, void* stream) {
  RAL_DISPATCH_GENERAL(params.backward.call.dtype, params.backward.splits.columns, launch_dq_sm90,
                       params, stream);
}

}  // namespace cuda
}  // namespace ral

#endif
