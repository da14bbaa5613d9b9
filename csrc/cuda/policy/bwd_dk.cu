// Launch of policy_bwd_dk_kernel.
#include "policy/bwd_dk.h"

#include "policy/launches.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
static int launch_dk(PolicyBwdParams params, void* stream) {
  using Dk = policy_bwd_dk_kernel<T, kHeadDim>;
  static_assert(Dk::kBlockQ == kChunkBlockQ, "a chunk has whole blocks of rows");
  params.num_blocks = int32_t(cdiv(params.common.seqlen_k, kBlockK));
  return run<Dk>(params.chunk.num_samples * params.side.num_kv_heads * params.num_blocks, params,
                 stream);
}

int policy_bwd_dk(const PolicyBwdParams& params, void* stream) {
  RAL_DISPATCH(params.side.dtype, params.side.head_dim, launch_dk, params, stream);
}

}  // namespace cuda
}  // namespace ral
