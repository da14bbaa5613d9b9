// Launch of the forward of `attention`.
#include "attention/fwd.h"
#include "core/launch.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
int attention_fwd(const ral_attention_params& call, const ral_attention_outputs& outputs,
                  void* stream) {
  using Kernel = attention_fwd_kernel<T, kHeadDim>;
  const int64_t num_q_blocks = count_blocks(call.seqlen_q, call.num_sequences, Kernel::kBlockQ,
                                            call.cu_seqlens_q != nullptr);
  const AttentionFwdParams params{call, outputs, int32_t(num_q_blocks)};
  return run<Kernel>(num_q_blocks * call.num_heads * call.batch_size, params, stream);
}

}  // namespace cuda
}  // namespace ral

extern "C" RAL_EXPORT int32_t ral_cuda_attention_fwd(const ral_attention_params* call,
                                                     const ral_attention_outputs* outputs,
                                                     void* stream) {
  RAL_CHECK(ral::check_attention(ral::Memory::kDevice, call, outputs, nullptr) == RAL_OK);
  RAL_DISPATCH(call->dtype, call->head_dim, ral::cuda::attention_fwd, *call, *outputs, stream);
}
