// The backward of `attention`: launches its kernels in order.
#include "attention/bwd.h"
#include "core/launch.h"

// The queries of a block of keys are split into head_parts * range_parts parts (KeySplits).
// `scratch`: as bwd_params says, aligned to 16 bytes.
extern "C" RAL_EXPORT int32_t ral_cuda_attention_bwd(const ral_attention_params* call,
                                                     const ral_attention_outputs* outputs,
                                                     const ral_attention_gradients* gradients,
                                                     int32_t head_parts, int32_t range_parts,
                                                     float* scratch, void* stream) {
  RAL_CHECK(scratch != nullptr &&
            ral::check_attention_bwd(ral::Memory::kDevice, call, outputs, gradients) == RAL_OK &&
            ral::cuda::are_parts(*call, head_parts, range_parts));
  const ral::cuda::AttentionBwdParams params = ral::cuda::bwd_params(
      *call, *outputs, *gradients, head_parts, range_parts, ral::cuda::columns_of(*call), scratch);
  int error = ral::cuda::attention_bwd_delta(params, stream);
  if (ral::cuda::is_general(*call)) {
    if (error == 0) error = ral::cuda::attention_bwd_dq_general(params, stream);
    if (error == 0) error = ral::cuda::attention_bwd_dkdv_general(params, stream);
  } else {
    if (error == 0) error = ral::cuda::attention_bwd_dq(params, stream);
    if (error == 0) error = ral::cuda::attention_bwd_dkdv(params, stream);
  }
  if (error == 0) error = ral::cuda::attention_bwd_join(params, stream);
  return error;
}
