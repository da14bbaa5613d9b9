// Launch of the forward of `attention` for Hopper. With RAL_CUDA_SM90 it is compiled for sm_90a
// alone. An nvcc that does not know sm_90a compiles it without that macro; the entry points then
// only say so.
//
// It takes all calls that ral_cuda_attention_fwd takes, with key padding and packed sequences too,
// but for two kinds. One has a soft cap, span_bias or attn_mask. The other has tensors that no
// tensor map can describe (map_shape in hopper/layout.h): no elements, a stride of 0, rows that
// overlap, or no alignment to 16 bytes. The caller passes those to ral_cuda_attention_fwd.
#include "core/launch.h"

#ifdef RAL_CUDA_SM90

#include "attention/fwd_sm90.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
int attention_fwd_sm90(const ral_attention_params& call, const ral_attention_outputs& outputs,
                       void* stream) {
  using Kernel = attention_fwd_sm90_kernel<T, kHeadDim>;
  if (!is_hopper()) return failed("a GPU that is not of compute capability 9.0", kNotTaken);
  AttentionFwdSm90Params params{
      {}, {}, {}, {call, outputs, order_of_queries(call, Kernel::kBlockQ)}};
  const char* reason = encode_tensor(params.q, call, call.q, call.head_dim, false);
  if (reason == nullptr) reason = encode_tensor(params.k, call, call.k, call.head_dim, true);
  if (reason == nullptr) reason = encode_tensor(params.v, call, call.v, call.head_dim_v, true);
  if (reason != nullptr) return failed(reason, kNotTaken);
  return run<Kernel>(params.forward.order.num_blocks * call.num_heads * call.batch_size, params,
                     stream);
}

}  // namespace cuda
}  // namespace ral

// After kNotTaken nothing was launched, and ral_cuda_failed_kernel says why.
extern "C" RAL_EXPORT int32_t ral_cuda_attention_fwd_sm90(const ral_attention_params* call,
                                                          const ral_attention_outputs* outputs,
                                                          void* stream) {
  RAL_CHECK(ral::check_attention(ral::Memory::kDevice, call, outputs, nullptr) == RAL_OK);
  if (ral::cuda::has_options(*call))
    return ral::cuda::failed("a soft cap, span_bias or attn_mask", ral::cuda::kNotTaken);
  RAL_DISPATCH_GENERAL(call->dtype, ral::cuda::hopper_columns(*call), ral::cuda::attention_fwd_sm90,
                       *call, *outputs, stream);
}

// Null, or the reason why the library has no kernels for Hopper.
extern "C" RAL_EXPORT const char* ral_cuda_hopper_missing() {
  return nullptr;
}

#else

extern "C" RAL_EXPORT const char* ral_cuda_hopper_missing() {
  return "the library was built by an nvcc older than 12.0, which does not know sm_90a";
}

extern "C" RAL_EXPORT int32_t ral_cuda_attention_fwd_sm90(const ral_attention_params*,
                                                          const ral_attention_outputs*, void*) {
  return ral::cuda::failed(ral_cuda_hopper_missing(), ral::cuda::kNotTaken);
}

#endif
