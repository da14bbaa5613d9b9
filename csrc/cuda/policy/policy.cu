// The order of launches of `policy`, and the layout of their scratch memory.
//
// The forward forms statistics and then, for each chunk of rows, p over keys in scratch memory,
// from which p goes to where it is wanted. The backward spreads the gradient over keys in the same
// way; sums over each row, dq and dk follow as in `policy_divergence`.
#include "policy/chunks.h"
#include "policy/moments.h"
#include "policy/outcomes.h"

namespace ral {
namespace cuda {

class Policy {
 public:
  Policy(const ral_policy_params& call, bool is_backward, const ral_policy_span_lists* lists,
         int64_t limit, float* memory, void* stream)
      : call_(call),
        stream_(stream),
        chunks_(call.common, call.policy.num_heads, 0, limit),
        scratch_(memory),
        gradient_(scratch_, chunks_, call.common, call.policy, is_backward,
                  is_backward && call.dhead_weights != nullptr) {
    if (lists != nullptr) lists_ = *lists;
    const ral_policy_common& common = call.common;
    const int64_t of_heads = common.batch_size * call.policy.num_heads * common.num_rows;
    const int64_t of_parts = chunks_.pieces.count * chunks_.num_rows() * call.policy.num_heads;
    rows_ = scratch_.take(chunks_.num_rows() * chunks_.stride);
    w_ = scratch_.take(of_heads);
    u_ = scratch_.take(of_heads, is_backward);
    w_parts_ = scratch_.take(of_parts, is_backward);
    u_parts_ = scratch_.take(of_parts, is_backward);
  }

  int64_t scratch_used() const { return scratch_.used(); }

  int forward() const {
    const bool on_hopper =
        call_.common.isa == RAL_CUDA_HOPPER && takes_statistics_sm90(call_.common, call_.policy);
    const int error = policy_statistics(call_.common, call_.policy, w_, on_hopper, stream_);
    if (error != 0) return error;
    return chunks_.for_each(call_.common, [&](const RowChunk& chunk) { return forward_of(chunk); });
  }

  int backward() const {
    const int error =
        chunks_.for_each(call_.common, [&](const RowChunk& chunk) { return backward_of(chunk); });
    if (error != 0) return error;
    return gradient_.head_weights(call_.common, call_.policy.num_heads, call_.dhead_weights,
                                  stream_);
  }

 private:
  PolicyOutcomesParams outcomes(const RowChunk& chunk) const {
    const ral_policy_common& common = call_.common;
    PolicyOutcomesParams params{common, call_.policy, chunk, rows_, call_.p, call_.dp, lists_, 1};
    // As many lanes as a span has keys on average.
    while (params.lanes < kWarpSize && params.lanes * common.num_spans < common.seqlen_k)
      params.lanes *= 2;
    return params;
  }

  int terms(const PolicyTermsParams& params) const {
    RAL_DISPATCH(call_.policy.dtype, call_.policy.head_dim, policy_terms, params, stream_);
  }

  int forward_of(const RowChunk& chunk) const {
    PolicyTermsParams params{};
    params.common = call_.common;
    params.side = call_.policy;
    params.chunk = chunk;
    params.num_row_blocks = int32_t(blocks_of_rows(call_.common, chunk.num_rows, kChunkBlockQ));
    params.num_key_blocks = int32_t(chunks_.stride / kTermKeys);
    params.other_left = call_.policy.window_left;
    params.other_right = call_.policy.window_right;
    params.p = rows_;
    const int error = terms(params);
    if (error != 0) return error;
    return run<policy_outcomes_kernel>(int64_t(chunk.num_samples) * chunk.num_rows, outcomes(chunk),
                                       stream_);
  }

  int backward_of(const RowChunk& chunk) const {
    int error = run<policy_outcome_gradients_kernel>(int64_t(chunk.num_samples) * chunk.num_rows,
                                                     outcomes(chunk), stream_);
    if (error != 0) return error;
    PolicyBwdParams params = gradient_.params(call_.common, call_.policy, chunks_, chunk, rows_);
    params.dq = call_.dq;
    params.dk = call_.dk;
    error = policy_moments(PolicyMomentsParams{params, u_parts_, w_parts_, u_, w_}, stream_);
    if (error == 0) error = rows(chunk);
    if (error == 0) error = policy_bwd_dq(params, stream_);
    return error == 0 ? policy_bwd_dk(params, stream_) : error;
  }

  int rows(const RowChunk& chunk) const {
    PolicyRowsParams params{};
    params.common = call_.common;
    params.policy = params.reference = call_.policy;  // nothing to compare it with
    params.u = u_;
    params.w = w_;
    return gradient_.rows(params, chunk, stream_);
  }

  ral_policy_params call_;
  ral_policy_span_lists lists_{};
  void* stream_;
  Chunks chunks_;
  Scratch scratch_;
  GradientScratch gradient_;
  float *rows_, *w_, *u_, *w_parts_, *u_parts_;
};

static bool passes(const ral_policy_params* call, bool is_backward) {
  return check_policy(Memory::kDevice, call, is_backward) == RAL_OK;
}

static int64_t scratch_of(const ral_policy_params* call, bool is_backward, int64_t limit) {
  if (!passes(call, is_backward)) return 0;
  return Policy(*call, is_backward, nullptr, limit, nullptr, nullptr).scratch_used();
}

}  // namespace cuda
}  // namespace ral

// Floats of scratch memory that the entry point of that name needs, with the same `limit`. 0 for a
// call that it refuses.
extern "C" RAL_EXPORT int64_t ral_cuda_policy_fwd_scratch(const ral_policy_params* call,
                                                          int64_t limit) {
  return ral::cuda::scratch_of(call, false, limit);
}
extern "C" RAL_EXPORT int64_t ral_cuda_policy_bwd_scratch(const ral_policy_params* call,
                                                          int64_t limit) {
  return ral::cuda::scratch_of(call, true, limit);
}

// `limit`: floats that a chunk of rows over keys may take, as for `policy_divergence`. `lists`: of
// a call with spans, else null.
extern "C" RAL_EXPORT int32_t ral_cuda_policy_fwd(const ral_policy_params* call, int64_t limit,
                                                  float* scratch, void* stream,
                                                  const ral_policy_span_lists* lists) {
  using namespace ral::cuda;
  RAL_CHECK(scratch != nullptr && passes(call, false));
  RAL_CHECK(call->common.num_spans == 0 ||
            (lists != nullptr && lists->keys != nullptr && lists->starts != nullptr));
  return Policy(*call, false, lists, limit, scratch, stream).forward();
}
extern "C" RAL_EXPORT int32_t ral_cuda_policy_bwd(const ral_policy_params* call, int64_t limit,
                                                  float* scratch, void* stream) {
  using namespace ral::cuda;
  // p tells which outcomes are constants.
  RAL_CHECK(scratch != nullptr && passes(call, true) && call->p != nullptr);
  return Policy(*call, true, nullptr, limit, scratch, stream).backward();
}
