// Launches of the forward of `attention`.
#include "attention/fwd.h"
#include "core/launch.h"

namespace ral {
namespace cuda {

// In fwd_general.cu, so that nvcc compiles them in parallel.
int attention_fwd_general(const ral_attention_params& call, const ral_attention_outputs& outputs,
                          void* stream);

template <typename T, int kHeadDim>
int attention_fwd(const ral_attention_params& call, const ral_attention_outputs& outputs,
                  void* stream) {
  using Kernel = attention_fwd_kernel<T, kHeadDim>;
  const AttentionFwdParams params{call, outputs, order_of_queries(call, Kernel::kBlockQ)};
  return run<Kernel>(params.order.num_blocks * call.num_heads * call.batch_size, params, stream);
}

}  // namespace cuda
}  // namespace ral

extern "C" RAL_EXPORT int32_t ral_cuda_attention_fwd(const ral_attention_params* call,
                                                     const ral_attention_outputs* outputs,
                                                     void* stream) {
  RAL_CHECK(ral::check_attention(ral::Memory::kDevice, call, outputs, nullptr) == RAL_OK);
  if (ral::cuda::is_general(*call))
    return ral::cuda::attention_fwd_general(*call, *outputs, stream);
  RAL_DISPATCH_ATTENTION(call->dtype, call->head_dim, ral::cuda::attention_fwd, *call, *outputs,
                         stream);
}
