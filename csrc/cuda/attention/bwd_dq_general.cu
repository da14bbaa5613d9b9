// Launch of attention_bwd_dq_general_kernel.
#include "attention/bwd_dq.h"
#include "core/launch.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
static int launch_dq(AttentionBwdParams params, void* stream) {
  using Dq = attention_bwd_dq_general_kernel<T, kHeadDim>;
  const ral_attention_params& call = params.call;
  params.order = order_of_queries(call, Dq::kBlockQ, Dq::kBands);
  const int64_t blocks = params.order.num_blocks * call.num_heads * call.batch_size;
  return run<Dq>(blocks * Dq::kBands, params, stream);
}

int attention_bwd_dq_general(const AttentionBwdParams& params, void* stream) {
  RAL_DISPATCH_GENERAL(params.call.dtype, params.splits.columns, launch_dq, params, stream);
}

}  // namespace cuda
}  // namespace ral
