// Launches of the kernels of `policy` and `policy_divergence`, each in the .cu file of its name so
// that nvcc compiles them in parallel. All return as `run` does.
#pragma once

#include "core/launch.h"
#include "policy/bwd.h"
#include "policy/moments.h"
#include "policy/statistics.h"
#include "policy/terms.h"

namespace ral {
namespace cuda {

// Writes side.norm, side.z and w [B, H, T]. on_hopper: by the kernel for Hopper, which takes the
// side.
int policy_statistics(const ral_policy_common& common, const ral_policy_side& side, float* w,
                      bool on_hopper, void* stream);
// Whether that kernel takes a side of a call, here and now.
bool takes_statistics_sm90(const ral_policy_common& common, const ral_policy_side& side);
// Writes side.norm and w.
int policy_statistics_sm90(const ral_policy_common& common, const ral_policy_side& side, float* w,
                           void* stream);
// In policy/terms_bf16.cu and policy/terms_fp16.cu.
template <typename T, int kHeadDim>
int policy_terms(const PolicyTermsParams& params, void* stream);
// These set the number of blocks in their parameters.
int policy_moments(const PolicyMomentsParams& params, void* stream);
int policy_bwd_dq(const PolicyBwdParams& params, void* stream);
int policy_bwd_dk(const PolicyBwdParams& params, void* stream);

}  // namespace cuda
}  // namespace ral
