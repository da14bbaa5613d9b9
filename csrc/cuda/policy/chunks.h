// How the entry points of policies lay out scratch memory and cut rows into chunks: host code.
#pragma once

#include "policy/launches.h"
#include "policy/rows.h"

namespace ral {
namespace cuda {

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

// Chunks of a call's rows, whose rows over keys fit a limit. Some have fewer rows or samples than
// others, but none has more CTAs.
struct Chunks {
  int64_t rows, samples, stride;  // of a chunk
  Pieces pieces{1, 1};

  // `parts`: numbers that a row needs for each block of keys besides those of the keys. `limit`:
  // floats of a chunk's rows. A chunk of kChunkBlockQ rows, or of packed sequences, may take more.
  Chunks(const ral_policy_common& common, int64_t num_heads, int64_t parts, int64_t limit) {
    const bool packed = common.cu_seqlens_q != nullptr;
    const int64_t seqlen_k = packed ? common.max_keys : common.seqlen_k;
    stride = cdiv(seqlen_k, kTermKeys) * kTermKeys;
    int64_t blocks = limit / ((stride + parts * (stride / kBlockK)) * kChunkBlockQ);
    if (blocks < 1) blocks = 1;
    const int64_t of_sample = cdiv(common.num_rows, kChunkBlockQ);
    // The lengths of packed sequences are on the device: a call of them is one chunk.
    const bool whole = packed || blocks >= of_sample;
    rows = whole ? common.num_rows : blocks * kChunkBlockQ;
    samples = whole ? blocks / of_sample : 1;
    if (samples > common.batch_size) samples = common.batch_size;
    if (samples < 1) samples = 1;
    pieces = Pieces(blocks_of_rows(common, rows, kChunkBlockQ) * num_heads * samples, seqlen_k);
  }

  int64_t num_rows() const { return samples * rows; }

  // Calls visit(chunk) until it returns an error, and returns that, or 0.
  template <typename Visit>
  int for_each(const ral_policy_common& common, Visit visit) const {
    for (int64_t b = 0; b < common.batch_size; b += samples)
      for (int64_t t = 0; t < common.num_rows; t += rows) {
        const int64_t more_samples = common.batch_size - b, more_rows = common.num_rows - t;
        const RowChunk chunk{int32_t(b), int32_t(more_samples < samples ? more_samples : samples),
                             int32_t(t), int32_t(more_rows < rows ? more_rows : rows), stride};
        const int error = visit(chunk);
        if (error != 0) return error;
      }
    return 0;
  }
};

// Scratch of the gradients of a chunk. All is null where they are not wanted.
struct GradientScratch {
  float *c, *factor, *delta;  // as in PolicyBwdParams
  float *dq_parts, *dk_so_far;
  float* dhead_weights;  // [B, H, T] terms, or null

  GradientScratch(Scratch& scratch, const Chunks& chunks, const ral_policy_common& common,
                  const ral_policy_side& side, bool wanted, bool wants_head_weights)
      : c(scratch.take(chunks.num_rows(), wanted)),
        factor(scratch.take(chunks.num_rows() * side.num_heads, wanted)),
        delta(scratch.take(chunks.num_rows() * side.num_heads, wanted)),
        dq_parts(
            scratch.take(chunks.pieces.count * chunks.num_rows() * side.num_heads * side.head_dim,
                         wanted && chunks.pieces.count > 1)),
        dk_so_far(scratch.take(side.num_kv_heads * common.seqlen_k * side.head_dim,
                               wanted && chunks.rows < common.num_rows)),
        dhead_weights(scratch.take(common.batch_size * side.num_heads * common.num_rows,
                                   wants_head_weights)) {}

  PolicyBwdParams params(const ral_policy_common& common, const ral_policy_side& side,
                         const Chunks& chunks, const RowChunk& chunk, const float* l) const {
    PolicyBwdParams params{};
    params.common = common;
    params.side = side;
    params.chunk = chunk;
    params.pieces = chunks.pieces.count;
    params.keys_per_piece = chunks.pieces.keys;
    params.l = l;
    params.c = c;
    params.factor = factor;
    params.delta = delta;
    params.dq_parts = dq_parts;
    params.dk_so_far = dk_so_far;
    params.is_first = chunk.first_row == 0;
    params.is_last = chunk.first_row + chunk.num_rows == common.num_rows;
    return params;
  }

  // Forms c, factor and delta of a chunk; the caller has set what it gives and wants besides.
  int rows(PolicyRowsParams params, const RowChunk& chunk, void* stream) const {
    params.chunk = chunk;
    params.c = c;
    params.factor = factor;
    params.delta = delta;
    params.dhead_weights = dhead_weights;
    const int64_t num_rows = int64_t(chunk.num_samples) * chunk.num_rows;
    return run<policy_rows_kernel>(cdiv(num_rows, policy_rows_kernel::kRowsPerBlock), params,
                                   stream);
  }

  // Sums the terms of all chunks, where they are wanted.
  int head_weights(const ral_policy_common& common, int64_t num_heads, float* sums,
                   void* stream) const {
    if (dhead_weights == nullptr) return 0;
    const int64_t samples =
        common.cu_seqlens_q == nullptr ? common.batch_size : common.num_sequences;
    return run<policy_head_weights_kernel>(
        cdiv(samples * num_heads, policy_head_weights_kernel::kPerBlock),
        PolicyHeadWeightsParams{common, num_heads, dhead_weights, sums}, stream);
  }
};

}  // namespace cuda
}  // namespace ral
