// The launch for Hopper, whose instructions host_hopper.h imitates. Then the kernel that its bits
// are compared with, of 256 columns: on a GPU such calls run the general kernel, which rounds
// scores otherwise.
#define RAL_CUDA_SM90
#include "attention/fwd.h"
#include "attention/fwd_sm90.cu"

namespace ral {
namespace cuda {

template <typename T>
static int plain_fwd(const ral_attention_params& call, const ral_attention_outputs& outputs,
                     void* stream) {
  using Kernel = attention_fwd_kernel<T, 256>;
  const AttentionFwdParams params{call, outputs, order_of_queries(call, Kernel::kBlockQ)};
  return run<Kernel>(params.order.num_blocks * call.num_heads * call.batch_size, params, stream);
}

}  // namespace cuda
}  // namespace ral

extern "C" RAL_EXPORT int32_t ral_cuda_attention_fwd_plain_256(const ral_attention_params* call,
                                                               const ral_attention_outputs* outputs,
                                                               void* stream) {
  return call->dtype == RAL_BFLOAT16
             ? ral::cuda::plain_fwd<ral::cuda::Bf16>(*call, *outputs, stream)
             : ral::cuda::plain_fwd<ral::cuda::Fp16>(*call, *outputs, stream);
}
