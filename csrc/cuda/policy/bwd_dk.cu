// Launch of policy_bwd_dk_kernel.
#include "policy/bwd_dk.h"

#include "policy/launches.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
static int launch_dk(PolicyBwdParams params, void* stream) {
  using Dk = policy_bwd_dk_kernel<T, kHeadDim>;
  static_assert(Dk::kBlockQ == kChunkBlockQ, "a chunk has whole blocks of rows");
  const ral_policy_common& common = params.common;
  params.num_blocks = int32_t(count_blocks(common.seqlen_k, common.num_sequences, kBlockK,
                                           common.cu_seqlens_k != nullptr));
  return run<Dk>(params.chunk.num_samples * params.side.num_kv_heads * params.num_blocks, params,
                 stream);
}

int policy_bwd_dk(const PolicyBwdParams& params, void* stream) {
  RAL_DISPATCH(params.side.dtype, params.side.head_dim, launch_dk, params, stream);
}

}  // namespace cuda
}  // namespace ral
