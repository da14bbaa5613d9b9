// Launch of attention_bwd_dkdv_sm90_kernel.
#ifdef RAL_CUDA_SM90

#include "attention/bwd_dkdv_sm90.h"
#include "core/launch.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
static int launch_dkdv_sm90(AttentionBwdSm90Params params, void* stream) {
  using Dkdv = attention_bwd_dkdv_sm90_kernel<T, kHeadDim>;
  const ral_attention_params& call = params.backward.call;
  const int64_t blocks = count_blocks(call.seqlen_k, call.num_sequences, Dkdv::kBlockKeys,
                                      call.cu_seqlens_q != nullptr);
  params.backward.num_blocks = int32_t(blocks);
  return run<Dkdv>(blocks * call.num_kv_heads * call.batch_size, params, stream);
}

int attention_bwd_dkdv_sm90(const AttentionBwdSm90Params& params, void* stream) {
  const ral_attention_params& call = params.backward.call;
  RAL_DISPATCH(call.dtype, call.head_dim, launch_dkdv_sm90, params, stream);
}

}  // namespace cuda
}  // namespace ral

#endif
