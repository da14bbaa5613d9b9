// The order of launches of `policy_divergence`, and the layout of their scratch memory.
//
// Statistics of both sides come first. Then rows are taken in chunks whose l fits the scratch. For
// each chunk policy_terms_kernel writes r, then replaces it by l and adds up D and U. With a
// target, policy_target_rows_kernel writes r if the target has ids; without ids there is no r in
// memory. What a row's gradient needs, dq and dk follow; after the last chunk, the gradient of head
// weights. Nothing depends on the device: the same call gives the same bits everywhere.
#include "policy/launches.h"
#include "policy/rows.h"

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

// Hands out scratch memory. Without memory it counts what is needed.
class Scratch {
 public:
  explicit Scratch(float* data) : data_(data) {}
  // Aligned to 16 bytes. Null without memory, or if not wanted.
  float* take(int64_t numbers, bool wanted = true) {
    if (!wanted) return nullptr;
    float* const taken = data_ == nullptr ? nullptr : data_ + used_;
    used_ += cdiv(numbers, 4) * 4;
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  float* data_;
  int64_t used_ = 0;
};

// Cuts a row's keys into pieces where rows and heads alone do not fill a GPU.
struct Pieces {
  static constexpr int64_t kWantedBlocks = 512, kFewestKeys = 512;
  int32_t count, keys;

  Pieces(int64_t num_blocks, int64_t seqlen_k) {
    const int64_t wanted = kWantedBlocks / num_blocks, most = cdiv(seqlen_k, kFewestKeys);
    const int64_t pieces = wanted < 1 ? 1 : wanted < most ? wanted : most;
    keys = int32_t(cdiv(cdiv(seqlen_k, pieces), kBlockK) * kBlockK);
    count = int32_t(cdiv(seqlen_k, keys));
  }
};

class PolicyDivergence {
 public:
  // `limit`: floats that a chunk's l and its parts of U may take. A chunk of kChunkBlockQ rows, or
  // of packed sequences, may take more.
  PolicyDivergence(const ral_policy_divergence_params& call, const Pass& pass, int64_t limit,
                   float* memory, void* stream)
      : call_(call), pass_(pass), stream_(stream) {
    const ral_policy_common& common = call.common;
    if (has_target()) {  // its valid keys are the policy's
      call_.reference.window_left = call.policy.window_left;
      call_.reference.window_right = call.policy.window_right;
    }
    const int64_t num_heads = call.policy.num_heads;
    const bool packed = common.cu_seqlens_q != nullptr;
    const int64_t seqlen_k = packed ? common.max_keys : common.seqlen_k;
    stride_ = cdiv(seqlen_k, kTermKeys) * kTermKeys;
    const int64_t u_parts = pass.wants_sums ? num_heads * (stride_ / kBlockK) : 0;  // per row
    int64_t blocks = limit / ((stride_ + u_parts) * kChunkBlockQ);
    if (blocks < 1) blocks = 1;
    const int64_t of_sample = cdiv(common.num_rows, kChunkBlockQ);
    // The lengths of packed sequences are on the device: a call of them is one chunk.
    const bool whole = packed || blocks >= of_sample;
    rows_ = whole ? common.num_rows : blocks * kChunkBlockQ;
    samples_ = whole ? blocks / of_sample : 1;
    if (samples_ > common.batch_size) samples_ = common.batch_size;
    if (samples_ < 1) samples_ = 1;
    // Some chunks have fewer rows or samples than others, but none has more CTAs.
    pieces_ = Pieces(blocks_of_rows(common, rows_, kChunkBlockQ) * num_heads * samples_, seqlen_k);

    Scratch scratch(memory);
    const int64_t rows = samples_ * rows_, all_rows = common.batch_size * common.num_rows;
    l_ = scratch.take(rows * stride_);
    value_parts_ = scratch.take(rows * (stride_ / kTermKeys));
    u_parts_ = scratch.take(rows * u_parts, pass.wants_sums);
    c_ = scratch.take(rows, pass.wants_gradient);
    factor_ = scratch.take(rows * num_heads, pass.wants_gradient);
    delta_ = scratch.take(rows * num_heads, pass.wants_gradient);
    dq_parts_ = scratch.take(pieces_.count * rows * num_heads * call.policy.head_dim,
                             pass.wants_gradient && pieces_.count > 1);
    dk_so_far_ = scratch.take(call.policy.num_kv_heads * common.seqlen_k * call.policy.head_dim,
                              pass.wants_gradient && rows_ < common.num_rows);
    ref_w_ = scratch.take(call.reference.num_heads * all_rows,
                          pass.wants_statistics && call.reference_normalised == 0 && !has_target());
    // The loss keeps none of these; the forward gives them to the backward.
    const bool own = pass.wants_statistics && pass.wants_gradient;
    float* const norm = scratch.take(2 * num_heads * all_rows, own);
    float* const z = scratch.take(all_rows, own);
    float* const u = scratch.take(num_heads * all_rows, own);
    float* const w = scratch.take(num_heads * all_rows, own);
    if (own) {
      call_.policy.norm = norm;
      call_.policy.z = z;
      call_.u = u;
      call_.w = w;
    }
    dhead_weights_ = scratch.take(num_heads * all_rows, call.dhead_weights != nullptr);
    scratch_used_ = scratch.used();
  }

  int64_t scratch_used() const { return scratch_used_; }

  int run_all() const {
    if (pass_.wants_statistics) {
      int error = policy_statistics(call_.common, call_.policy, call_.w, stream_);
      if (error == 0 && call_.reference_normalised == 0) error = reference_statistics();
      if (error != 0) return error;
    }
    for (int64_t b = 0; b < call_.common.batch_size; b += samples_)
      for (int64_t t = 0; t < call_.common.num_rows; t += rows_) {
        const int error = run_chunk(b, t);
        if (error != 0) return error;
      }
    return dhead_weights_ == nullptr ? 0 : head_weights();
  }

 private:
  bool has_target() const { return call_.target.values != nullptr; }

  PolicyTargetParams target_params(const RowChunk& chunk) const {
    return PolicyTargetParams{call_.common,      call_.policy, call_.target,
                              call_.reference.z, chunk,        l_};
  }

  int reference_statistics() const {
    if (!has_target()) return policy_statistics(call_.common, call_.reference, ref_w_, stream_);
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
    params.num_key_blocks = int32_t(stride_ / kTermKeys);
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
    params.chunk = chunk;
    params.value_parts = value_parts_;
    params.u_parts = u_parts_;
    params.u = call_.u;
    params.w = call_.w;
    params.value = call_.value;
    params.weight = call_.dvalue;
    params.c = c_;
    params.factor = factor_;
    params.delta = delta_;
    params.dhead_weights = dhead_weights_;
    const int64_t num_rows = int64_t(chunk.num_samples) * chunk.num_rows;
    return run<policy_rows_kernel>(cdiv(num_rows, policy_rows_kernel::kRowsPerBlock), params,
                                   stream_);
  }

  int head_weights() const {
    const ral_policy_common& common = call_.common;
    const int64_t samples =
        common.cu_seqlens_q == nullptr ? common.batch_size : common.num_sequences;
    return run<policy_head_weights_kernel>(
        cdiv(samples * call_.policy.num_heads, policy_head_weights_kernel::kPerBlock),
        PolicyHeadWeightsParams{common, call_.policy.num_heads, dhead_weights_,
                                call_.dhead_weights},
        stream_);
  }

  PolicyBwdParams bwd_params(const RowChunk& chunk) const {
    PolicyBwdParams params{};
    params.common = call_.common;
    params.side = call_.policy;
    params.chunk = chunk;
    params.pieces = pieces_.count;
    params.keys_per_piece = pieces_.keys;
    params.l = l_;
    params.c = c_;
    params.factor = factor_;
    params.delta = delta_;
    params.dq = call_.dq;
    params.dk = call_.dk;
    params.dq_parts = dq_parts_;
    params.dk_so_far = dk_so_far_;
    params.is_first = chunk.first_row == 0;
    params.is_last = chunk.first_row + chunk.num_rows == call_.common.num_rows;
    return params;
  }

  int run_chunk(int64_t b, int64_t t) const {
    const int64_t samples = call_.common.batch_size - b, num_rows = call_.common.num_rows - t;
    const RowChunk chunk{int32_t(b), int32_t(samples < samples_ ? samples : samples_), int32_t(t),
                         int32_t(num_rows < rows_ ? num_rows : rows_), stride_};
    int error = reference_rows(chunk);
    if (error == 0) error = terms(chunk, call_.policy, call_.reference, value_parts_, u_parts_);
    if (error == 0) error = rows(chunk);
    if (error != 0 || !pass_.wants_gradient) return error;
    const PolicyBwdParams params = bwd_params(chunk);
    error = policy_bwd_dq(params, stream_);
    return error == 0 ? policy_bwd_dk(params, stream_) : error;
  }

  ral_policy_divergence_params call_;
  Pass pass_;
  void* stream_;
  int64_t rows_, samples_, stride_;  // of a chunk
  Pieces pieces_{1, 1};
  int64_t scratch_used_;
  float *l_, *value_parts_, *u_parts_, *c_, *factor_, *delta_, *dq_parts_, *dk_so_far_;
  float *ref_w_, *dhead_weights_;
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
extern "C" RAL_EXPORT void ral_cuda_policy_struct_sizes(int64_t sizes[2]) {
  sizes[0] = sizeof(ral_policy_side);
  sizes[1] = sizeof(ral_policy_divergence_params);
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
