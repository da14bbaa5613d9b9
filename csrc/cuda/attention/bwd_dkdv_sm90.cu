// Launch of attention_bwd_dkdv_sm90_kernel or, of 256 columns, attention_bwd_dkdv_wide_sm90_kernel.
#ifdef RAL_CUDA_SM90

#include <type_traits>

#include "attention/bwd_dkdv_sm90.h"
#include "attention/bwd_dkdv_wide_sm90.h"
#include "core/launch.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
static int launch_dkdv_sm90(AttentionBwdSm90Params params, void* stream) {
  using Dkdv = std::conditional_t<kHeadDim == 256, attention_bwd_dkdv_wide_sm90_kernel<T, kHeadDim>,
                                  attention_bwd_dkdv_sm90_kernel<T, kHeadDim>>;
  const ral_attention_params& call = params.backward.call;
  const int32_t num_parts = params.backward.splits.num_parts;
  params.backward.order = order_of_keys(call, Dkdv::kBlockKeys, num_parts);
  const int64_t blocks = params.backward.order.num_blocks * call.num_kv_heads * call.batch_size;
  return run<Dkdv>(blocks * num_parts, params, stream);
}

int attention_bwd_dkdv_sm90(const AttentionBwdSm90Params& params, void* stream) {
  RAL_DISPATCH_GENERAL(params.backward.call.dtype, params.backward.splits.columns, launch_dkdv_sm90,
                       params, stream);
}

}  // namespace cuda
}  // namespace ral

#endif
