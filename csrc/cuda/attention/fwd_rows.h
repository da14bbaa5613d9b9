// What the forward kernels of `attention` do around their loop over keys: they set up the marginals
// before it and write the results after it.
#pragma once

#include "attention/general.h"
#include "attention/marginals.h"
#include "core/blocks.h"

namespace ral {
namespace cuda {

struct AttentionFwdParams {
  ral_attention_params call;
  ral_attention_outputs outputs;
  CtaOrder order;
};

template <bool kGeneral = false>
RAL_DEVICE QueriesOfBlock queries_of_block(const AttentionFwdParams& params, int32_t block_q) {
  const bool has_bias = kGeneral && params.call.span_bias.data != nullptr;
  return {params.call, params.order, block_q, params.outputs.marginals != nullptr || has_bias};
}

// The marginals of a warp's rows. `num_queries` rows begin at token `first_token`; warp_row is the
// warp's first among them. `at`: 16 bytes of shared memory that the warp owns.
template <typename SpanSums>
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
  float* data = params.outputs.marginals +
                ((block.b * call.num_heads + block.h) * num_rows + row) * call.num_spans;
  if (first < stop) marginals.begin(at, {data, first, stop}, int32_t(call.num_spans));
  return marginals;
}

// Writes lse, marginals and out of a warp's rows, counted as in begin_marginals. m is in base 2;
// normaliser holds each lane's part of the sum. The warp owns its rows of `stage`.
template <int kRowTiles, bool kGeneral = false, typename T, int kHeadDim, typename SpanSums>
RAL_DEVICE void finish(const AttentionFwdParams& params, const QueriesOfBlock& block,
                       int64_t first_token, int32_t num_queries, int warp_row,
                       Tile<T, kHeadDim> stage, const float (&out)[kRowTiles][kHeadDim / 8][4],
                       const float (&m)[2 * kRowTiles], const float (&normaliser)[2 * kRowTiles],
                       SpanSums& marginals) {
  const ral_attention_params& call = params.call;
  float inverse[2 * kRowTiles], lse_log2[2 * kRowTiles];
  float* lse =
      params.outputs.lse + (block.b * call.num_heads + block.h) * call.seqlen_q + first_token;
  RAL_UNROLL for (int i = 0; i < 2 * kRowTiles; ++i) {
    const float sum = quad_sum(normaliser[i]);
    // A row that saw no key has sum = 0 and gives 0.
    inverse[i] = sum > 0.0f ? 1.0f / sum : 0.0f;
    lse_log2[i] = sum > 0.0f ? stabiliser(m[i]) + log2(sum) : minus_infinity();
    const int row = warp_row + row_in_warp(i);
    if (lane_index() % 4 == 0 && row < num_queries) store_global(lse + row, lse_log2[i] * kLn2);
  }
  if (marginals.num_spans != 0) marginals.end(lse_log2, m);
  store_rows<kRowTiles, kGeneral>(
      rows_of<T>(params.outputs.out, block.b, block.h, first_token), params.outputs.out.stride_t,
      warp_row, num_queries, out, [&](int i) { return inverse[i]; }, stage,
      kGeneral ? call.head_dim_v : call.head_dim);
}

}  // namespace cuda
}  // namespace ral
