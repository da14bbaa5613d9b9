// Launch of policy_statistics_sm90_kernel. With RAL_CUDA_SM90 it is compiled for sm_90a alone. An
// nvcc that does not know sm_90a compiles it without that macro; it then takes no call.
//
// It takes all calls but those with a shared prefix, and with tensors that no tensor map can
// describe (map_shape in hopper/layout.h).
#include "policy/launches.h"

#ifdef RAL_CUDA_SM90

#include "policy/statistics_sm90.h"

namespace ral {
namespace cuda {

// Returns null, or the reason why the kernel does not take a side of a call.
static const char* encode_side(const ral_policy_common& common, const ral_policy_side& side,
                               PolicyStatisticsSm90Params& params) {
  if (!is_hopper()) return "a GPU that is not of compute capability 9.0";
  if (side.k_prefix.data != nullptr) return "keys with a shared prefix";
  MapShape q, k;
  const char* reason =
      map_shape(side.q, side.head_dim, common.num_rows, side.num_heads, common.batch_size, q);
  if (reason == nullptr)
    reason =
        map_shape(side.k, side.head_dim, common.seqlen_k, side.num_kv_heads, common.batch_size, k);
  if (reason == nullptr) reason = encode_map(params.q, side.dtype, side.q.data, q);
  return reason == nullptr ? encode_map(params.k, side.dtype, side.k.data, k) : reason;
}

bool takes_statistics_sm90(const ral_policy_common& common, const ral_policy_side& side) {
  PolicyStatisticsSm90Params params{};
  return encode_side(common, side, params) == nullptr;
}

template <typename T, int kHeadDim>
static int launch_statistics(const ral_policy_common& common, const ral_policy_side& side, float* w,
                             void* stream) {
  using Kernel = policy_statistics_sm90_kernel<T, kHeadDim>;
  const int64_t blocks = blocks_of_rows(common, common.num_rows, Kernel::kBlockQ);
  PolicyStatisticsSm90Params params{{}, {}, {common, side, w, int32_t(blocks)}};
  const char* const reason = encode_side(common, side, params);
  if (reason != nullptr) return failed(reason, kNotTaken);
  return run<Kernel>(blocks * side.num_heads * common.batch_size, params, stream);
}

int policy_statistics_sm90(const ral_policy_common& common, const ral_policy_side& side, float* w,
                           void* stream) {
  RAL_DISPATCH(side.dtype, side.head_dim, launch_statistics, common, side, w, stream);
}

}  // namespace cuda
}  // namespace ral

#else

namespace ral {
namespace cuda {

bool takes_statistics_sm90(const ral_policy_common&, const ral_policy_side&) {
  return false;
}
int policy_statistics_sm90(const ral_policy_common&, const ral_policy_side&, float*, void*) {
  return failed("policy_statistics_sm90", kNotTaken);
}

}  // namespace cuda
}  // namespace ral

#endif
