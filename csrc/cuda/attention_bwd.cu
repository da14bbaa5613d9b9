// Launches of the backward of `attention`.
#include "attention_bwd_delta.h"
#include "attention_bwd_dkdv.h"
#include "attention_bwd_dq.h"
#include "launch.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
int launch_delta(const AttentionBwdParams& params, void* stream) {
  using Delta = attention_bwd_delta_kernel<T, kHeadDim>;
  const ral_attention_params& call = params.call;
  const int64_t num_rows = call.batch_size * call.num_heads * call.seqlen_q;
  return run<Delta>((num_rows + Delta::kRowsPerBlock - 1) / Delta::kRowsPerBlock, params, stream);
}

int attention_bwd_delta(const AttentionBwdParams& params, void* stream) {
  RAL_DISPATCH(params.call.dtype, params.call.head_dim, launch_delta, params, stream);
}

template <typename T, int kHeadDim>
int attention_bwd(AttentionBwdParams params, void* stream) {
  using Dq = attention_bwd_dq_kernel<T, kHeadDim>;
  using Dkdv = attention_bwd_dkdv_kernel<T, kHeadDim>;
  const ral_attention_params& call = params.call;
  const bool packed = call.cu_seqlens_q != nullptr;
  int error = attention_bwd_delta(params, stream);
  if (error != 0) return error;
  const int64_t q_blocks = count_blocks(call.seqlen_q, call.num_sequences, Dq::kBlockQ, packed);
  params.num_blocks = int32_t(q_blocks);
  error = run<Dq>(q_blocks * call.num_heads * call.batch_size, params, stream);
  if (error != 0) return error;
  const int64_t k_blocks = count_blocks(call.seqlen_k, call.num_sequences, kBlockK, packed);
  params.num_blocks = int32_t(k_blocks);
  return run<Dkdv>(k_blocks * call.num_kv_heads * call.batch_size, params, stream);
}

}  // namespace cuda
}  // namespace ral

// `scratch`: 2 B H T floats.
extern "C" RAL_EXPORT int32_t ral_cuda_attention_bwd(const ral_attention_params* call,
                                                     const ral_attention_outputs* outputs,
                                                     const ral_attention_gradients* gradients,
                                                     float* scratch, void* stream) {
  const int64_t num_rows = call->batch_size * call->num_heads * call->seqlen_q;
  const ral::cuda::AttentionBwdParams params{*call,   *outputs,           *gradients,
                                             scratch, scratch + num_rows, 0};
  RAL_DISPATCH(call->dtype, call->head_dim, ral::cuda::attention_bwd, params, stream);
}
