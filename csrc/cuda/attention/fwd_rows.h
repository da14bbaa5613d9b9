// What the forward kernels of `attention` do around their loop over keys: they set up the marginals
// before it and write the results after it.
#pragma once

#include "attention/general.h"
#include "attention/marginals.h"
#include "core/blocks.h"

namespace ral {
namespace cuda {

// Parts of the keys, where queries are too few to fill the GPU. Each has results of its own, which
// attention_fwd_join_kernel combines in the order of the parts.
struct KeyParts {
  int32_t num_parts, columns;  // columns of out: those of the kernel
  float* out;                  // [num_parts, B, H, T, columns]
  Float2* sums;                // [num_parts, B, H, T]: maximum m in base 2, sum of 2^(s - m)
  float* marginals;            // [num_parts, B, H, R, S]
};

struct AttentionFwdParams {
  ral_attention_params call;
  ral_attention_outputs outputs;
  CtaOrder order;
  KeyParts parts;  // of attention_fwd_split_kernel alone
};

// With kSplit the block's share is its part of the keys.
template <bool kGeneral = false, bool kSplit = false>
RAL_DEVICE QueriesOfBlock queries_of_block(const AttentionFwdParams& params, int32_t block_q) {
  const bool has_bias = kGeneral && params.call.span_bias.data != nullptr;
  return {params.call, params.order, block_q, params.outputs.marginals != nullptr || has_bias,
          kSplit ? params.parts.num_parts : 1};
}

// The keys [low, high] of a part, of all from 0 to length_k - 1. Parts begin where blocks begin.
struct KeysOfPart {
  int32_t low, high;

  RAL_DEVICE KeysOfPart(const KeyParts& parts, int32_t part, int32_t length_k) {
    const int64_t blocks = (length_k + kBlockK - 1) / kBlockK;
    low = int32_t(part * blocks / parts.num_parts) * kBlockK;
    high = minimum(int32_t((part + 1) * blocks / parts.num_parts) * kBlockK, length_k) - 1;
  }
};

// The marginals of a warp's rows. `num_queries` rows begin at token `first_token`; warp_row is the
// warp's first among them. `at`: 16 bytes of shared memory that the warp owns.
template <typename SpanSums, bool kSplit = false>
RAL_DEVICE SpanSums begin_marginals(const AttentionFwdParams& params, const QueriesOfBlock& block,
                                    int64_t first_token, int32_t num_queries, int warp_row,
                                    MarginalRows* at) {
  constexpr int kWarpQ = 8 * SpanSums::kRows;
  const ral_attention_params& call = params.call;
  SpanSums marginals{};
  if (block.ids == nullptr) return marginals;
  const int64_t num_rows = call.row_stop - call.row_start;
  const int64_t row = first_token + warp_row - call.row_start;
  const int32_t first = int32_t(row < -kWarpQ ? kWarpQ : row < 0 ? -row : 0);
  const int64_t end = num_rows - row < kWarpQ ? num_rows - row : kWarpQ;
  const int32_t stop = minimum(int32_t(end), num_queries - warp_row);
  const int64_t part = kSplit ? block.share * call.batch_size : 0;
  float* data = (kSplit ? params.parts.marginals : params.outputs.marginals) +
                (((part + block.b) * call.num_heads + block.h) * num_rows + row) * call.num_spans;
  if (first < stop) marginals.begin(at, {data, first, stop}, int32_t(call.num_spans));
  return marginals;
}

// Writes lse, marginals and out of a warp's rows, counted as in begin_marginals, or with kSplit
// those of the part. m is in base 2; normaliser holds each lane's part of the sum. The warp owns
// its rows of `stage`.
template <int kRowTiles, bool kGeneral = false, bool kSplit = false, typename T, int kHeadDim,
          typename SpanSums>
RAL_DEVICE void finish(const AttentionFwdParams& params, const QueriesOfBlock& block,
                       int64_t first_token, int32_t num_queries, int warp_row,
                       Tile<T, kHeadDim> stage, const float (&out)[kRowTiles][kHeadDim / 8][4],
                       const float (&m)[2 * kRowTiles], const float (&normaliser)[2 * kRowTiles],
                       SpanSums& marginals) {
  const ral_attention_params& call = params.call;
  float inverse[2 * kRowTiles], lse_log2[2 * kRowTiles];
  const int64_t part = kSplit ? block.share * call.batch_size : 0;
  const int64_t first_row =
      ((part + block.b) * call.num_heads + block.h) * call.seqlen_q + first_token;
  float* const lse = params.outputs.lse + first_row;
  RAL_UNROLL for (int i = 0; i < 2 * kRowTiles; ++i) {
    const float sum = quad_sum(normaliser[i]);
    // A row that saw no key has sum = 0 and gives 0.
    inverse[i] = sum > 0.0f ? 1.0f / sum : 0.0f;
    lse_log2[i] = sum > 0.0f ? stabiliser(m[i]) + log2(sum) : minus_infinity();
    const int row = warp_row + row_in_warp(i);
    if (lane_index() % 4 != 0 || row >= num_queries) continue;
    if (kSplit)
      store_global(params.parts.sums + first_row + row, Float2{m[i], sum});
    else
      store_global(lse + row, lse_log2[i] * kLn2);
  }
  if (marginals.num_spans != 0) marginals.end(lse_log2, m);
  if (kSplit) {
    float shares[kRowTiles][kHeadDim / 8][4];
    RAL_UNROLL for (int r = 0; r < kRowTiles; ++r) RAL_UNROLL
      for (int c = 0; c < kHeadDim / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 4; ++e) shares[r][c][e] = out[r][c][e] * inverse[2 * r + e / 2];
    store_float_rows<kHeadDim>(params.parts.out + first_row * kHeadDim, warp_row, num_queries,
                               shares);
    return;
  }
  store_rows<kRowTiles, kGeneral>(
      rows_of<T>(params.outputs.out, block.b, block.h, first_token), params.outputs.out.stride_t,
      warp_row, num_queries, out, [&](int i) { return inverse[i]; }, stage,
      kGeneral ? call.head_dim_v : call.head_dim);
}

}  // namespace cuda
}  // namespace ral
