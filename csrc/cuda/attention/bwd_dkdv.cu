// Launch of attention_bwd_dkdv_kernel.
#include "attention/bwd_dkdv.h"
#include "core/launch.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
static int launch_dkdv(AttentionBwdParams params, void* stream) {
  using Dkdv = attention_bwd_dkdv_kernel<T, kHeadDim>;
  const ral_attention_params& call = params.call;
  const int64_t blocks =
      count_blocks(call.seqlen_k, call.num_sequences, kBlockK, call.cu_seqlens_q != nullptr);
  params.num_blocks = int32_t(blocks);
  return run<Dkdv>(blocks * call.num_kv_heads * call.batch_size, params, stream);
}

int attention_bwd_dkdv(const AttentionBwdParams& params, void* stream) {
  RAL_DISPATCH(params.call.dtype, params.call.head_dim, launch_dkdv, params, stream);
}

}  // namespace cuda
}  // namespace ral
