// What the general kernels of `attention` take besides the plain ones: soft cap (2), span_bias and
// attn_mask (3), and head dims of q and v that differ or are not those of a plain kernel. It is
// compiled apart, so a plain call does not pay for it.
#pragma once

#include "core/keys.h"
#include "core/softmax.h"
#include "core/tiles.h"

namespace ral {
namespace cuda {

// Columns of the general kernels for a call; its own come first, and zeros follow. 0: there is no
// kernel.
inline int32_t general_columns(const ral_attention_params& call) {
  const int64_t widest = call.head_dim > call.head_dim_v ? call.head_dim : call.head_dim_v;
  if (call.head_dim % kChunk != 0 || call.head_dim_v % kChunk != 0) return 0;
  return widest <= 64 ? 64 : widest <= 128 ? 128 : widest <= 256 ? 256 : 0;
}

// Whether a call has options that only the general kernels take.
inline bool has_options(const ral_attention_params& call) {
  return call.span_bias.data != nullptr || call.attn_mask.data != nullptr || call.softcap > 0.0f;
}

// Whether a call needs the general kernels.
inline bool is_general(const ral_attention_params& call) {
  return has_options(call) || call.head_dim != call.head_dim_v ||
         kernel_head_dim(call.head_dim) == 0;
}

// Columns of the kernels for all GPUs that run a call.
inline int32_t columns_of(const ral_attention_params& call) {
  return is_general(call) ? general_columns(call) : kernel_head_dim(call.head_dim);
}

// Columns of the kernels for Hopper: a tensor map gives zeros past the head dim. 0: they do not
// take the call.
inline int32_t hopper_columns(const ral_attention_params& call) {
  return has_options(call) ? 0 : general_columns(call);
}

// A bias times log2 e. finfo.min stays finite: such keys count where a row has no others.
RAL_DEVICE float in_base_2(float bias) {
  const float x = bias * kLog2e;
  return x == minus_infinity() && bias != x ? -3.402823466e38f : x;
}

// tanh to float32's accuracy: near 0, where exp2 cancels, by a polynomial (Cephes).
RAL_DEVICE float tanh(float x) {
  const float size = x < 0.0f ? -x : x, square = x * x;
  float series = -5.70498872745e-3f * square + 2.06390887954e-2f;
  series = series * square - 5.37397155531e-2f;
  series = series * square + 1.33314422036e-1f;
  series = series * square - 3.33332819422e-1f;
  const float e = exp2(size * (-2.0f * kLog2e));
  const float far = (1.0f - e) * reciprocal(1.0f + e);
  return size < 0.625f ? x + x * square * series : x < 0.0f ? -far : far;
}

// dy/dx (2) of a warp's 16 rows.
template <bool kGeneral, int kTiles>
struct GeneralSlopes {
  float values[1][kTiles][4];

  // Turns ds into dx (13). A hidden key may have no slope, but its ds is 0.
  RAL_DEVICE void multiply(float (&ds)[1][kTiles][4]) const {
    RAL_UNROLL for (int c = 0; c < kTiles; ++c) RAL_UNROLL
      for (int e = 0; e < 4; ++e) ds[0][c][e] = gradient_of_product(ds[0][c][e], values[0][c][e]);
  }

 private:
  RAL_DEVICE static float gradient_of_product(float ds, float slope) {
    return ds == 0.0f ? 0.0f : ds * slope;
  }
};
template <int kTiles>
struct GeneralSlopes<false, kTiles> {
  RAL_DEVICE void multiply(float (&)[1][kTiles][4]) const {}
};

// Scores in base 2 of one head of a sequence.
template <bool kGeneral>
struct GeneralScores {
  const ral_attention_params& call;
  int32_t length_q;
  float scale, cap, inverse_cap;  // cap: c log2 e; without a soft cap both are 0
  const float* bias;              // of query 0 of the sequence, or null
  const char* mask;               // of its query 0 and key 0, or null

  RAL_DEVICE GeneralScores(const ral_attention_params& call, const Sequence& sequence, int64_t b,
                           int64_t h)
      : call(call),
        length_q(sequence.length_q),
        scale(call.softcap > 0.0f ? call.scale / call.softcap : call.scale * kLog2e),
        cap(call.softcap * kLog2e),
        inverse_cap(call.softcap > 0.0f ? 1.0f / cap : 0.0f),
        bias(nullptr),
        mask(nullptr) {
    if (call.span_bias.data != nullptr) {
      const ral_broadcast& x = call.span_bias;
      bias = static_cast<const float*>(x.data) + b * x.stride_b + h * x.stride_h +
             sequence.q_start * x.stride_t;
    }
    if (call.attn_mask.data != nullptr) {
      const ral_broadcast& x = call.attn_mask;
      const int64_t first = b * x.stride_b + h * x.stride_h + sequence.q_start * x.stride_t +
                            sequence.k_start * x.stride_s;
      mask = static_cast<const char*>(x.data) + first * bytes_of_mask();
    }
  }

  // Turns products q kᵀ into y (1), (2).
  template <int kRowTiles, int kTiles>
  RAL_DEVICE void bend(float (&s)[kRowTiles][kTiles][4]) const {
    RAL_UNROLL for (int r = 0; r < kRowTiles; ++r) RAL_UNROLL
      for (int c = 0; c < kTiles; ++c) RAL_UNROLL
        for (int e = 0; e < 4; ++e) {
          const float x = s[r][c][e] * scale;
          s[r][c][e] = cap > 0.0f ? cap * tanh(x) : x;
        }
  }

  // y: what `bend` leaves.
  template <int kTiles>
  RAL_DEVICE void differentiate(GeneralSlopes<true, kTiles>& slopes,
                                const float (&y)[1][kTiles][4]) const {
    RAL_UNROLL for (int c = 0; c < kTiles; ++c) RAL_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float t = y[0][c][e] * inverse_cap;
        slopes.values[0][c][e] = 1.0f - t * t;
      }
  }

  // Adds bias and mask (3) of keys from `first` on. Rows are queries from warp_query on.
  template <typename T, int kRowTiles>
  RAL_DEVICE void add(float (&s)[kRowTiles][kBlockK / 8][4], const KeyBlock& keys, int32_t first,
                      int32_t warp_query) const {
    constexpr int kRows = 2 * kRowTiles;
    if (bias != nullptr && keys.is_one_span()) {
      const int32_t span = keys.span_of(0);
      RAL_UNROLL for (int i = 0; i < kRows; ++i) {
        const float of_row = bias_of(warp_query + row_in_warp(i), span);
        RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
          for (int e = 0; e < 2; ++e) s[i / 2][c][i % 2 * 2 + e] += of_row;
      }
    } else if (bias != nullptr) {
      RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int32_t span = keys.span_of_column(c, e);
          RAL_UNROLL for (int i = 0; i < kRows; ++i)
            s[i / 2][c][i % 2 * 2 + e] += bias_of(warp_query + row_in_warp(i), span);
        }
    }
    if (mask == nullptr) return;
    const int mine = 2 * (lane_index() % 4);
    RAL_UNROLL for (int c = 0; c < kBlockK / 8; ++c) RAL_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * c + e;
        const bool real = (keys.real >> mine >> column & 1) != 0;
        RAL_UNROLL for (int i = 0; i < kRows; ++i)
          s[i / 2][c][i % 2 * 2 + e] +=
              mask_of<T>(warp_query + row_in_warp(i), first + mine + column, real);
      }
  }

  // The same where rows are keys (WarpKeys) and columns are queries from `first_query` on. Their
  // products with strides are formed anew in each turn, for want of registers.
  template <typename T, int kTiles, typename Keys>
  RAL_DEVICE void add_transposed(float (&s)[1][kTiles][4], const Keys& keys,
                                 int32_t first_query) const {
    const int32_t query = first_query + 2 * (lane_index() % 4);
    if (bias != nullptr) {
      RAL_UNROLL for (int c = 0; c < kTiles; ++c) RAL_UNROLL
        for (int e = 0; e < 4; ++e)
          s[0][c][e] += bias_of(query + 8 * c + e % 2, opaque(keys.span[e / 2]));
    }
    if (mask == nullptr) return;
    RAL_UNROLL for (int c = 0; c < kTiles; ++c) RAL_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int32_t key = opaque(keys.first_key) + keys.warp_key + row_in_warp(e / 2);
        s[0][c][e] += mask_of<T>(query + 8 * c + e % 2, key, keys.real[e / 2]);
      }
  }

 private:
  RAL_DEVICE float bias_of(int32_t query, int32_t span) const {
    if (span < 0 || query >= length_q) return 0.0f;
    return in_base_2(
        load_global(bias + query * call.span_bias.stride_t + span * call.span_bias.stride_s));
  }

  RAL_DEVICE int bytes_of_mask() const {
    return call.attn_mask_dtype == RAL_BOOL ? 1 : call.attn_mask_dtype == RAL_FLOAT32 ? 4 : 2;
  }
  // T: the type of q, which a mask may have. Keys that are not real have no mask.
  template <typename T>
  RAL_DEVICE float mask_of(int32_t query, int32_t key, bool real) const {
    if (!real || query >= length_q) return 0.0f;
    const ral_broadcast& x = call.attn_mask;
    const char* at = mask + (query * x.stride_t + key * x.stride_s) * bytes_of_mask();
    if (call.attn_mask_dtype == RAL_BOOL)
      return load_global(reinterpret_cast<const uint8_t*>(at)) != 0 ? 0.0f : minus_infinity();
    if (call.attn_mask_dtype == RAL_FLOAT32)
      return in_base_2(load_global(reinterpret_cast<const float*>(at)));
    return in_base_2(unpack<T>(load_global(reinterpret_cast<const uint16_t*>(at))).x);
  }
};
template <>
struct GeneralScores<false> {
  RAL_DEVICE GeneralScores(const ral_attention_params&, const Sequence&, int64_t, int64_t) {}
  template <typename S>
  RAL_DEVICE void bend(S&) const {}
  template <typename Slopes, typename S>
  RAL_DEVICE void differentiate(Slopes&, const S&) const {}
  template <typename T, typename S>
  RAL_DEVICE void add(S&, const KeyBlock&, int32_t, int32_t) const {}
  template <typename T, typename S, typename Keys>
  RAL_DEVICE void add_transposed(S&, const Keys&, int32_t) const {}
};

}  // namespace cuda
}  // namespace ral
