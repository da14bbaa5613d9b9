// The order of launches of `policy_divergence`, and the layout of their scratch memory.
//
// Statistics of both sides come first. Then rows are taken in chunks whose l fits the scratch. For
// each chunk policy_terms_kernel writes r, then replaces it by l and adds up D and U. With a
// target, policy_target_rows_kernel writes r if the target has ids; without ids there is no r in
// memory. What a row's gradient needs, dq and dk follow; after the last chunk, the gradient of head
// weights. Nothing depends on the device: the same call gives the same bits everywhere.
#include "policy/chunks.h"

namespace ral {
namespace cuda {

// What an entry point computes.
struct Pass {
  bool wants_statistics, wants_sums, wants_gradient;
  DivergencePass checked_as;
};
constexpr Pass kFwd{true, true, false, DivergencePass::kForward};
constexpr Pass kBwd{false, false, true, DivergencePass::kBackward};
constexpr Pass kLoss{true, true, true, DivergencePass::kLoss};

class PolicyDivergence {
 public:
  PolicyDivergence(const ral_policy_divergence_params& call, const Pass& pass, int64_t limit,
                   float* memory, void* stream)
      : call_(call),
        pass_(pass),
        stream_(stream),
        chunks_(call.common, call.policy.num_heads, pass.wants_sums ? call.policy.num_heads : 0,
                limit),
        scratch_(memory),
        gradient_(scratch_, chunks_, call.common, call.policy, pass.wants_gradient,
                  call.dhead_weights != nullptr) {
    const ral_policy_common& common = call.common;
    if (has_target()) {  // its valid keys are the policy's
      call_.reference.window_left = call.policy.window_left;
      call_.reference.window_right = call.policy.window_right;
    }
    const int64_t num_heads = call.policy.num_heads, stride = chunks_.stride;
    const int64_t rows = chunks_.num_rows(), all_rows = common.batch_size * common.num_rows;
    l_ = scratch_.take(rows * stride);
    value_parts_ = scratch_.take(rows * (stride / kTermKeys));
    u_parts_ = scratch_.take(rows * num_heads * (stride / kBlockK), pass.wants_sums);
    ref_w_ =
        scratch_.take(call.reference.num_heads * all_rows,
                      pass.wants_statistics && call.reference_normalised == 0 && !has_target());
    // The loss keeps none of these; the forward gives them to the backward.
    const bool own = pass.wants_statistics && pass.wants_gradient;
    float* const norm = scratch_.take(2 * num_heads * all_rows, own);
    float* const z = scratch_.take(all_rows, own);
    float* const u = scratch_.take(num_heads * all_rows, own);
    float* const w = scratch_.take(num_heads * all_rows, own);
    if (own) {
      call_.policy.norm = norm;
      call_.policy.z = z;
      call_.u = u;
      call_.w = w;
    }
  }

  int64_t scratch_used() const { return scratch_.used(); }

  int run_all() const {
    if (pass_.wants_statistics) {
      const bool hopper = on_hopper();
      int error = policy_statistics(call_.common, call_.policy, call_.w, hopper, stream_);
      if (error == 0 && call_.reference_normalised == 0) error = reference_statistics(hopper);
      if (error != 0) return error;
    }
    const int error =
        chunks_.for_each(call_.common, [&](const RowChunk& chunk) { return run_chunk(chunk); });
    if (error != 0) return error;
    return gradient_.head_weights(call_.common, call_.policy.num_heads, call_.dhead_weights,
                                  stream_);
  }

 private:
  bool has_target() const { return call_.target.values != nullptr; }

  PolicyTargetParams target_params(const RowChunk& chunk) const {
    return PolicyTargetParams{call_.common,      call_.policy, call_.target,
                              call_.reference.z, chunk,        l_};
  }

  // Both sides run on the same kernel, so that equal inputs give equal bits.
  bool on_hopper() const {
    return call_.common.isa == RAL_CUDA_HOPPER &&
           takes_statistics_sm90(call_.common, call_.policy) &&
           (has_target() || takes_statistics_sm90(call_.common, call_.reference));
  }

  int reference_statistics(bool hopper) const {
    if (!has_target())
      return policy_statistics(call_.common, call_.reference, ref_w_, hopper, stream_);
    return run<policy_target_share_kernel>(call_.common.batch_size * call_.common.num_rows,
                                           target_params(RowChunk{}), stream_);
  }

  // Writes the reference's r of a chunk, where policy_terms_kernel does not form it itself.
  int reference_rows(const RowChunk& chunk) const {
    if (!has_target()) return terms(chunk, call_.reference, call_.policy, nullptr, nullptr);
    if (call_.target.ids == nullptr) return 0;
    return run<policy_target_rows_kernel>(int64_t(chunk.num_samples) * chunk.num_rows,
                                          target_params(chunk), stream_);
  }

  int terms(const RowChunk& chunk, const ral_policy_side& side, const ral_policy_side& other,
            float* value_parts, float* u_parts) const {
    PolicyTermsParams params{};
    params.common = call_.common;
    params.side = side;
    params.chunk = chunk;
    params.num_row_blocks = int32_t(blocks_of_rows(call_.common, chunk.num_rows, kChunkBlockQ));
    params.num_key_blocks = int32_t(chunks_.stride / kTermKeys);
    params.other_left = other.window_left;
    params.other_right = other.window_right;
    params.p = l_;
    params.value_parts = value_parts;
    params.u_parts = u_parts;
    params.kind = call_.kind;
    if (call_.target.ids == nullptr) params.target = call_.target;
    params.target_z = call_.reference.z;
    RAL_DISPATCH(side.dtype, side.head_dim, policy_terms, params, stream_);
  }

  int rows(const RowChunk& chunk) const {
    PolicyRowsParams params{};
    params.common = call_.common;
    params.policy = call_.policy;
    params.reference = call_.reference;
    params.value_parts = value_parts_;
    params.u_parts = u_parts_;
    params.u = call_.u;
    params.w = call_.w;
    params.value = call_.value;
    params.weight = call_.dvalue;
    return gradient_.rows(params, chunk, stream_);
  }

  int run_chunk(const RowChunk& chunk) const {
    int error = reference_rows(chunk);
    if (error == 0) error = terms(chunk, call_.policy, call_.reference, value_parts_, u_parts_);
    if (error == 0) error = rows(chunk);
    if (error != 0 || !pass_.wants_gradient) return error;
    PolicyBwdParams params = gradient_.params(call_.common, call_.policy, chunks_, chunk, l_);
    params.dq = call_.dq;
    params.dk = call_.dk;
    error = policy_bwd_dq(params, stream_);
    return error == 0 ? policy_bwd_dk(params, stream_) : error;
  }

  ral_policy_divergence_params call_;
  Pass pass_;
  void* stream_;
  Chunks chunks_;
  Scratch scratch_;
  GradientScratch gradient_;
  float *l_, *value_parts_, *u_parts_, *ref_w_;
};

static bool passes(const ral_policy_divergence_params* call, const Pass& pass) {
  return check_policy_divergence(Memory::kDevice, call, pass.checked_as) == RAL_OK;
}

static int64_t scratch_of(const ral_policy_divergence_params* call, const Pass& pass,
                          int64_t limit) {
  return passes(call, pass) ? PolicyDivergence(*call, pass, limit, nullptr, nullptr).scratch_used()
                            : 0;
}

static int32_t run_pass(const ral_policy_divergence_params* call, const Pass& pass, int64_t limit,
                        float* scratch, void* stream) {
  RAL_CHECK(scratch != nullptr && passes(call, pass));
  return PolicyDivergence(*call, pass, limit, scratch, stream).run_all();
}

}  // namespace cuda
}  // namespace ral

// sizeof of each parameter struct, for the caller to compare with its own.
extern "C" RAL_EXPORT void ral_cuda_policy_struct_sizes(int64_t sizes[4]) {
  sizes[0] = sizeof(ral_policy_side);
  sizes[1] = sizeof(ral_policy_params);
  sizes[2] = sizeof(ral_policy_divergence_params);
  sizes[3] = sizeof(ral_policy_span_lists);
}

// Floats of scratch memory that the entry point of that name needs, with the same `limit`. 0 for a
// call that it refuses.
extern "C" RAL_EXPORT int64_t
ral_cuda_policy_divergence_fwd_scratch(const ral_policy_divergence_params* call, int64_t limit) {
  return ral::cuda::scratch_of(call, ral::cuda::kFwd, limit);
}
extern "C" RAL_EXPORT int64_t
ral_cuda_policy_divergence_bwd_scratch(const ral_policy_divergence_params* call, int64_t limit) {
  return ral::cuda::scratch_of(call, ral::cuda::kBwd, limit);
}
extern "C" RAL_EXPORT int64_t
ral_cuda_policy_divergence_loss_scratch(const ral_policy_divergence_params* call, int64_t limit) {
  return ral::cuda::scratch_of(call, ral::cuda::kLoss, limit);
}

// `limit`: floats that l of a chunk of rows and its parts of U may take. A chunk of 64 rows may
// take more, and packed sequences are one chunk. It must be the `limit` that the scratch was sized
// for.
extern "C" RAL_EXPORT int32_t ral_cuda_policy_divergence_fwd(
    const ral_policy_divergence_params* call, int64_t limit, float* scratch, void* stream) {
  return ral::cuda::run_pass(call, ral::cuda::kFwd, limit, scratch, stream);
}
extern "C" RAL_EXPORT int32_t ral_cuda_policy_divergence_bwd(
    const ral_policy_divergence_params* call, int64_t limit, float* scratch, void* stream) {
  return ral::cuda::run_pass(call, ral::cuda::kBwd, limit, scratch, stream);
}
extern "C" RAL_EXPORT int32_t ral_cuda_policy_divergence_loss(
    const ral_policy_divergence_params* call, int64_t limit, float* scratch, void* stream) {
  return ral::cuda::run_pass(call, ral::cuda::kLoss, limit, scratch, stream);
}
