// Launches of policy_statistics_kernel, or of that for Hopper, and of policy_share_kernel on what
// it wrote.
#include "policy/launches.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
static int launch_statistics(const ral_policy_common& common, const ral_policy_side& side, float* w,
                             void* stream) {
  using Statistics = policy_statistics_kernel<T, kHeadDim>;
  const int64_t blocks = blocks_of_rows(common, common.num_rows, Statistics::kBlockQ);
  return run<Statistics>(blocks * side.num_heads * common.batch_size,
                         PolicyStatisticsParams{common, side, w, int32_t(blocks)}, stream);
}

static int statistics_sm80(const ral_policy_common& common, const ral_policy_side& side, float* w,
                           void* stream) {
  RAL_DISPATCH(side.dtype, side.head_dim, launch_statistics, common, side, w, stream);
}

int policy_statistics(const ral_policy_common& common, const ral_policy_side& side, float* w,
                      bool on_hopper, void* stream) {
  const int error = on_hopper ? policy_statistics_sm90(common, side, w, stream)
                              : statistics_sm80(common, side, w, stream);
  if (error != 0) return error;
  return run<policy_share_kernel>(
      cdiv(common.batch_size * common.num_rows, policy_share_kernel::kThreads),
      PolicyShareParams{common, side, w}, stream);
}

}  // namespace cuda
}  // namespace ral
