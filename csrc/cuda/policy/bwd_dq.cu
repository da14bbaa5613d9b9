// Launches of policy_bwd_dq_kernel, and of policy_bwd_join_kernel where keys are in pieces.
#include "policy/bwd_dq.h"

#include "policy/launches.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
static int launch_dq(PolicyBwdParams params, void* stream) {
  using Dq = policy_bwd_dq_kernel<T, kHeadDim>;
  using Join = policy_bwd_join_kernel<T, kHeadDim>;
  static_assert(Dq::kBlockQ == kChunkBlockQ, "a chunk has whole blocks of rows");
  const int64_t heads = params.chunk.num_samples * params.side.num_heads;
  params.num_blocks =
      int32_t(blocks_of_rows(params.common, params.chunk.num_rows, Dq::kBlockQ));
  const int error = run<Dq>(params.pieces * heads * params.num_blocks, params, stream);
  if (error != 0 || params.dq_parts == nullptr) return error;
  const int64_t pairs = heads * params.chunk.num_rows * Join::kPairs;
  return run<Join>(cdiv(pairs, Join::kThreads), params, stream);
}

int policy_bwd_dq(const PolicyBwdParams& params, void* stream) {
  RAL_DISPATCH(params.side.dtype, params.side.head_dim, launch_dq, params, stream);
}

}  // namespace cuda
}  // namespace ral
