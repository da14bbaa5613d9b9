// Launch of attention_fwd_general_kernel.
#include "attention/fwd.h"
#include "core/launch.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
static int launch_fwd(const ral_attention_params& call, const ral_attention_outputs& outputs,
                      void* stream) {
  using Kernel = attention_fwd_general_kernel<T, kHeadDim>;
  const AttentionFwdParams params{call, outputs, order_of_queries(call, Kernel::kBlockQ)};
  return run<Kernel>(params.order.num_blocks * call.num_heads * call.batch_size, params, stream);
}

int attention_fwd_general(const ral_attention_params& call, const ral_attention_outputs& outputs,
                          void* stream) {
  RAL_DISPATCH_GENERAL(call.dtype, general_columns(call), launch_fwd, call, outputs, stream);
}

}  // namespace cuda
}  // namespace ral
