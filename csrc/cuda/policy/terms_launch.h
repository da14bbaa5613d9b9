// Launch of policy_terms_kernel. Two .cu files compile it: in one it would take longer than any
// other.
#pragma once

#include "policy/launches.h"

namespace ral {
namespace cuda {

template <typename T, int kHeadDim>
int policy_terms(const PolicyTermsParams& params, void* stream) {
  using Terms = policy_terms_kernel<T, kHeadDim>;
  static_assert(Terms::kBlockQ == kChunkBlockQ, "a chunk has whole blocks of rows");
  const int64_t blocks = int64_t(params.num_row_blocks) * params.num_key_blocks;
  return run<Terms>(params.chunk.num_samples * blocks, params, stream);
}

}  // namespace cuda
}  // namespace ral
