// The launches of the backward for Hopper, whose instructions host_hopper.h imitates. Then the
// kernels that their bits are compared with, of 256 columns: see hopper_for_tests.cu.
#define RAL_CUDA_SM90
#include "attention/bwd_dkdv.h"
#include "attention/bwd_dkdv_sm90.cu"
#include "attention/bwd_dq.h"
#include "attention/bwd_dq_sm90.cu"
#include "attention/bwd_sm90.cu"

namespace ral {
namespace cuda {

template <typename T>
static int plain_bwd(AttentionBwdParams params, void* stream) {
  using Dq = attention_bwd_dq_kernel<T, 256>;
  using Dkdv = attention_bwd_dkdv_kernel<T, 256>;
  const ral_attention_params& call = params.call;
  int error = attention_bwd_delta(params, stream);
  params.order = order_of_queries(call, Dq::kBlockQ, Dq::kBands);
  const int64_t ctas = params.order.num_blocks * call.num_heads * call.batch_size * Dq::kBands;
  if (error == 0) error = run<Dq>(ctas, params, stream);
  const int32_t num_shares = Dkdv::kBands * params.splits.num_parts;
  params.order = order_of_keys(call, kBlockK, num_shares);
  const int64_t blocks = params.order.num_blocks * call.num_kv_heads * call.batch_size;
  if (error == 0) error = run<Dkdv>(blocks * num_shares, params, stream);
  if (error == 0) error = attention_bwd_join(params, stream);
  return error;
}

}  // namespace cuda
}  // namespace ral

extern "C" RAL_EXPORT int32_t ral_cuda_attention_bwd_plain_256(
    const ral_attention_params* call, const ral_attention_outputs* outputs,
    const ral_attention_gradients* gradients, int32_t head_parts, int32_t range_parts,
    float* scratch, void* stream) {
  const ral::cuda::AttentionBwdParams params = ral::cuda::bwd_params(
      *call, *outputs, *gradients, head_parts, range_parts, 256, scratch);
  return call->dtype == RAL_BFLOAT16 ? ral::cuda::plain_bwd<ral::cuda::Bf16>(params, stream)
                                     : ral::cuda::plain_bwd<ral::cuda::Fp16>(params, stream);
}
