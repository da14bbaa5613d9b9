// Launch of attention_bwd_dkdv_general_kernel.
#include "attention/bwd_dkdv.h"
#include "core/launch.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
static int launch_dkdv(AttentionBwdParams params, void* stream) {
  using Dkdv = attention_bwd_dkdv_general_kernel<T, kHeadDim>;
  const ral_attention_params& call = params.call;
  const int32_t num_shares = Dkdv::kBands * params.splits.num_parts;
  params.order = order_of_keys(call, kBlockK, num_shares);
  const int64_t blocks = params.order.num_blocks * call.num_kv_heads * call.batch_size;
  return run<Dkdv>(blocks * num_shares, params, stream);
}

int attention_bwd_dkdv_general(const AttentionBwdParams& params, void* stream) {
  RAL_DISPATCH_GENERAL(params.call.dtype, params.splits.columns, launch_dkdv, params, stream);
}

}  // namespace cuda
}  // namespace ral
