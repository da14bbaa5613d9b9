// The forward of `attention` with its keys in parts, for a few queries: launches both kernels.
#include "attention/fwd.h"
#include "attention/fwd_join.h"
#include "core/launch.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
static int launch_parts(const ral_attention_params& call, const ral_attention_outputs& outputs,
                        int32_t num_parts, float* scratch, void* stream) {
  using Kernel = attention_fwd_split_kernel<T, kHeadDim>;
  using Join = attention_fwd_join_kernel<T>;
  const int64_t num_rows = call.batch_size * call.num_heads * call.seqlen_q;
  float* const sums = scratch + num_parts * num_rows * kHeadDim;
  const KeyParts parts{num_parts, kHeadDim, scratch, reinterpret_cast<Float2*>(sums),
                       sums + 2 * num_parts * num_rows};
  const CtaOrder order = order_of_queries(call, Kernel::kBlockQ, num_parts);
  const AttentionFwdParams params{call, outputs, order, parts};
  const int64_t blocks = order.num_blocks * call.num_heads * call.batch_size;
  const int error = run<Kernel>(blocks * num_parts, params, stream);
  return error == 0 ? run<Join>(cdiv(num_rows, Join::kRowsPerBlock), params, stream) : error;
}

}  // namespace cuda
}  // namespace ral

// `scratch`: num_parts * (B H T (general_columns + 2) + B H R S) floats, aligned to 16 bytes.
extern "C" RAL_EXPORT int32_t ral_cuda_attention_fwd_split(const ral_attention_params* call,
                                                           const ral_attention_outputs* outputs,
                                                           int32_t num_parts, float* scratch,
                                                           void* stream) {
  RAL_CHECK(scratch != nullptr && num_parts >= 1 &&
            ral::check_attention(ral::Memory::kDevice, call, outputs, nullptr) == RAL_OK);
  RAL_DISPATCH_GENERAL(call->dtype, ral::cuda::general_columns(*call), ral::cuda::launch_parts,
                       *call, *outputs, num_parts, scratch, stream);
}
