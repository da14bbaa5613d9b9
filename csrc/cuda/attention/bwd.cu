// The backward of `attention`: launches its kernels in order.
#include "attention/bwd.h"
#include "core/launch.h"

// `scratch`: 2 B H T floats.
extern "C" RAL_EXPORT int32_t ral_cuda_attention_bwd(const ral_attention_params* call,
                                                     const ral_attention_outputs* outputs,
                                                     const ral_attention_gradients* gradients,
                                                     float* scratch, void* stream) {
  RAL_CHECK(scratch != nullptr &&
            ral::check_attention_bwd(ral::Memory::kDevice, call, outputs, gradients) == RAL_OK);
  const int64_t num_rows = call->batch_size * call->num_heads * call->seqlen_q;
  const ral::cuda::AttentionBwdParams params{*call,   *outputs,           *gradients,
                                             scratch, scratch + num_rows, 0};
  int error = ral::cuda::attention_bwd_delta(params, stream);
  if (error == 0) error = ral::cuda::attention_bwd_dq(params, stream);
  if (error == 0) error = ral::cuda::attention_bwd_dkdv(params, stream);
  return error;
}
