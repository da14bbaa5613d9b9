// Launches of policy_moments_kernel and of the kernel that joins its pieces.
#include "policy/moments.h"

#include "policy/launches.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
static int launch_moments(PolicyMomentsParams params, void* stream) {
  using Moments = policy_moments_kernel<T, kHeadDim>;
  using Join = policy_join_moments_kernel;
  static_assert(Moments::kBlockQ == kChunkBlockQ, "a chunk has whole blocks of rows");
  PolicyBwdParams& bwd = params.bwd;
  const int64_t heads = bwd.chunk.num_samples * bwd.side.num_heads;
  bwd.num_blocks = int32_t(blocks_of_rows(bwd.common, bwd.chunk.num_rows, Moments::kBlockQ));
  const int error = run<Moments>(bwd.pieces * heads * bwd.num_blocks, params, stream);
  if (error != 0) return error;
  return run<Join>(cdiv(heads * bwd.chunk.num_rows, Join::kThreads), params, stream);
}

int policy_moments(const PolicyMomentsParams& params, void* stream) {
  RAL_DISPATCH(params.bwd.side.dtype, params.bwd.side.head_dim, launch_moments, params, stream);
}

}  // namespace cuda
}  // namespace ral
