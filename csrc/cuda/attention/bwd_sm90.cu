// The backward of `attention` for Hopper: launches its kernels in order. attention/fwd_sm90.cu says
// which calls it leaves to ral_cuda_attention_bwd.
#include "core/launch.h"

#ifdef RAL_CUDA_SM90

#include "attention/bwd_sm90.h"

namespace ral {
namespace cuda {

static int attention_bwd_sm90(const AttentionBwdParams& backward, void* stream) {
  if (!is_hopper()) return failed("a GPU that is not of compute capability 9.0", kNotTaken);
  const ral_attention_params& call = backward.call;
  AttentionBwdSm90Params params{{}, {}, {}, {}, backward};
  const ral_tensor& dout = backward.gradients.dout;
  const bool has_dout = dout.data != nullptr;
  const char* reason = encode_tensor(params.q, call, call.q, call.head_dim, false);
  if (reason == nullptr) reason = encode_tensor(params.k, call, call.k, call.head_dim, true);
  if (reason == nullptr) reason = encode_tensor(params.v, call, call.v, call.head_dim_v, true);
  if (reason == nullptr)
    reason = encode_tensor(params.dout, call, has_dout ? dout : call.q,
                           has_dout ? call.head_dim_v : call.head_dim, false);
  if (reason != nullptr) return failed(reason, kNotTaken);
  int error = attention_bwd_delta(backward, stream);
  if (error == 0) error = attention_bwd_dq_sm90(params, stream);
  if (error == 0) error = attention_bwd_dkdv_sm90(params, stream);
  if (error == 0) error = attention_bwd_join(backward, stream);
  return error;
}

}  // namespace cuda
}  // namespace ral

#endif

// As ral_cuda_attention_bwd. After kNotTaken nothing was launched, and ral_cuda_failed_kernel says
// why.
extern "C" RAL_EXPORT int32_t ral_cuda_attention_bwd_sm90(const ral_attention_params* call,
                                                          const ral_attention_outputs* outputs,
                                                          const ral_attention_gradients* gradients,
                                                          int32_t head_parts, int32_t range_parts,
                                                          float* scratch, void* stream) {
#ifdef RAL_CUDA_SM90
  RAL_CHECK(scratch != nullptr &&
            ral::check_attention_bwd(ral::Memory::kDevice, call, outputs, gradients) == RAL_OK &&
            ral::cuda::are_parts(*call, head_parts, range_parts));
  if (ral::cuda::has_options(*call))
    return ral::cuda::failed("a soft cap, span_bias or attn_mask", ral::cuda::kNotTaken);
  return ral::cuda::attention_bwd_sm90(
      ral::cuda::bwd_params(*call, *outputs, *gradients, head_parts, range_parts,
                            ral::cuda::hopper_columns(*call), scratch),
      stream);
#else
  static_cast<void>(call), static_cast<void>(outputs), static_cast<void>(gradients);
  static_cast<void>(head_parts), static_cast<void>(range_parts);
  static_cast<void>(scratch), static_cast<void>(stream);
  return ral::cuda::failed("a library without kernels for Hopper", ral::cuda::kNotTaken);
#endif
}
