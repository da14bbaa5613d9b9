// Launches of the backward of `attention` for Hopper; see attention_fwd_sm90.cu, also for what is
// left to ral_cuda_attention_bwd.
#include "attention_bwd.h"
#include "launch.h"

#ifdef RAL_CUDA_SM90

#include "attention_bwd_dkdv_sm90.h"
#include "attention_bwd_dq_sm90.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
int attention_bwd_sm90(const AttentionBwdParams& backward, void* stream) {
  using Dq = attention_bwd_dq_sm90_kernel<T, kHeadDim>;
  using Dkdv = attention_bwd_dkdv_sm90_kernel<T, kHeadDim>;
  if (!is_hopper()) return failed("a GPU that is not of compute capability 9.0", kNotTaken);
  const ral_attention_params& call = backward.call;
  const bool packed = call.cu_seqlens_q != nullptr;
  AttentionBwdSm90Params params{{}, {}, {}, {}, backward};
  const ral_tensor& dout = backward.gradients.dout;
  const char* reason = encode_tensor<kHeadDim>(params.q, call, call.q, false);
  if (reason == nullptr) reason = encode_tensor<kHeadDim>(params.k, call, call.k, true);
  if (reason == nullptr) reason = encode_tensor<kHeadDim>(params.v, call, call.v, true);
  if (reason == nullptr)
    reason =
        encode_tensor<kHeadDim>(params.dout, call, dout.data == nullptr ? call.q : dout, false);
  if (reason != nullptr) return failed(reason, kNotTaken);
  int error = attention_bwd_delta(backward, stream);
  if (error != 0) return error;
  const int64_t q_blocks = count_blocks(call.seqlen_q, call.num_sequences, Dq::kBlockQ, packed);
  params.backward.num_blocks = int32_t(q_blocks);
  error = run<Dq>(q_blocks * call.num_heads * call.batch_size, params, stream);
  if (error != 0) return error;
  const int64_t k_blocks =
      count_blocks(call.seqlen_k, call.num_sequences, Dkdv::kBlockKeys, packed);
  params.backward.num_blocks = int32_t(k_blocks);
  return run<Dkdv>(k_blocks * call.num_kv_heads * call.batch_size, params, stream);
}

}  // namespace cuda
}  // namespace ral

#endif

// As ral_cuda_attention_bwd. kNotTaken: nothing was launched, and ral_cuda_failed_kernel says why.
extern "C" RAL_EXPORT int32_t ral_cuda_attention_bwd_sm90(const ral_attention_params* call,
                                                          const ral_attention_outputs* outputs,
                                                          const ral_attention_gradients* gradients,
                                                          float* scratch, void* stream) {
#ifdef RAL_CUDA_SM90
  const int64_t num_rows = call->batch_size * call->num_heads * call->seqlen_q;
  const ral::cuda::AttentionBwdParams params{*call,   *outputs,           *gradients,
                                             scratch, scratch + num_rows, 0};
  RAL_DISPATCH(call->dtype, call->head_dim, ral::cuda::attention_bwd_sm90, params, stream);
#else
  static_cast<void>(call), static_cast<void>(outputs), static_cast<void>(gradients);
  static_cast<void>(scratch), static_cast<void>(stream);
  return ral::cuda::failed("a library without kernels for Hopper", ral::cuda::kNotTaken);
#endif
}
