// Compute types: what a 32-bit element of a packed operand holds, and how it is multiplied.
//
// An element is one float32, or a pair of bfloat16 that the processor multiplies and adds into
// float32 at once. So packing, loops and register tiles are the same for both.
#pragma once

#include "core/simd.h"
#include "ral/attention.h"

namespace ral {
namespace RAL_ISA {

RAL_INLINE float bfloat16_to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// Rounds to nearest even; NaN stays NaN.
RAL_INLINE uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

RAL_INLINE float float16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t magnitude = x & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {  // inf, NaN
    bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {
    bits = (magnitude << 13) + (112u << 23);
  } else {  // subnormal: a multiple of 2^-24
    const float y = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    memcpy(&bits, &y, sizeof bits);
  }
  bits |= sign;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

RAL_INLINE uint16_t float_to_float16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 rounds to steps of 2^-24
    float y;
    memcpy(&y, &magnitude, sizeof y);
    y += 0.5f;
    uint32_t rounded;
    memcpy(&rounded, &y, sizeof rounded);
    return sign | static_cast<uint16_t>(rounded - 0x3f000000);
  }
  return sign |
         static_cast<uint16_t>((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

RAL_INLINE int64_t element_size(int32_t dtype) {
  return dtype == RAL_FLOAT32 ? 4 : 2;
}

inline void convert_to_float(int32_t dtype, const void* src, int64_t count, float* dst) {
  int64_t i = 0;
  if (dtype == RAL_FLOAT32) {
    memcpy(dst, src, count * sizeof(float));
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(src);
  if (dtype == RAL_BFLOAT16) {
    for (; i < count; ++i) dst[i] = bfloat16_to_float(half[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i));
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(x));
  }
#endif
  for (; i < count; ++i) dst[i] = float16_to_float(half[i]);
}

inline void convert_from_float(int32_t dtype, const float* src, int64_t count, void* dst) {
  int64_t i = 0;
  if (dtype == RAL_FLOAT32) {
    memcpy(dst, src, count * sizeof(float));
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(dst);
  if (dtype == RAL_BFLOAT16) {
    for (; i < count; ++i) half[i] = float_to_bfloat16(src[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i x = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), x);
  }
#endif
  for (; i < count; ++i) half[i] = float_to_float16(src[i]);
}

// The same for one vector.
RAL_INLINE void store_bfloat16(void* to, Vec x) {
  typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
  typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Bits is_nan = (Bits)(x != x);
  const Bits high = (is_nan & (bits >> 16 | 0x40)) | (~is_nan & rounded);
  const Halves halves = __builtin_convertvector(high, Halves);
  memcpy(to, &halves, sizeof halves);
}

// The first `count` elements of a vector; all of them if count >= kLanes.
RAL_INLINE void store_first(int32_t dtype, char* to, Vec x, int64_t count) {
  if (dtype == RAL_FLOAT32) return store_first(reinterpret_cast<float*>(to), x, count);
  if (dtype == RAL_BFLOAT16 && count >= kLanes) return store_bfloat16(to, x);
  alignas(64) float staged[kLanes];
  store(staged, x);
  convert_from_float(dtype, staged, count < kLanes ? count : kLanes, to);
}

struct Float32Compute {
  // whether P is rounded before it is multiplied with V
  static constexpr bool kRoundsWeights = false;
  struct Scope {  // processor state that products need
    Scope() {}
  };
  static constexpr bool kTilesInMemory = false;  // whether a product leaves its sums in memory
  static constexpr int kPair = 1;                // numbers of the contracted dimension per element
  static constexpr int kStepMultiple = 1;  // a row of features has a multiple of this many elements
  // keys per block: P^T, 120 x 64 floats = 30 KiB, stays in L1
  static constexpr int kForwardKeys = 120;
  static constexpr int kBackwardKeys = 96;  // dK, dV, three packed operands, P and dS stay in L2

  static RAL_INLINE void multiply_add(Vec& acc, uint32_t a, Vec b) {
    float scalar;
    memcpy(&scalar, &a, sizeof scalar);
    acc += scalar * b;
  }
  static void load_row(int32_t dtype, const void* src, int64_t features, uint32_t* dst) {
    convert_to_float(dtype, src, features, reinterpret_cast<float*>(dst));
  }
  // Elements that hold rows 2j and 2j + 1 of a source as pairs; here just one row. Null rows are 0.
  static void load_row_pair(int32_t dtype, const void* src, const void*, int64_t features,
                            uint32_t* dst) {
    if (!src) {
      memset(dst, 0, features * sizeof(uint32_t));
      return;
    }
    convert_to_float(dtype, src, features, reinterpret_cast<float*>(dst));
  }
  // Stores one vector of kPair rows, contracted over the rows. If storing rounds, it adds the
  // columns of what it stored to `total`.
  static RAL_INLINE void store_pair(const Vec (&x)[kPair], uint32_t* dst, float*) {
    store(dst, x[0]);
  }
  // Stores R rows of V vectors, contracted over their columns: [R][ld].
  template <int R, int V>
  static RAL_INLINE void store_rows(const Vec (&x)[R][V], uint32_t* dst, int64_t ld) {
    RAL_UNROLL for (int r = 0; r < R; ++r) {
      RAL_UNROLL for (int v = 0; v < V; ++v)
        store(dst + r * ld + v * kLanes, x[r][v]);
    }
  }
  template <int R, int V>
  static RAL_INLINE void store_rows_and_pairs(const Vec (&x)[R][V], uint32_t* rows, int64_t ld_rows,
                                              uint32_t*, int64_t) {
    store_rows(x, rows, ld_rows);  // both forms are the same
  }
  static RAL_INLINE void rescale(uint32_t* element, Vec factor) {
    store(element, bits_to_float(load(reinterpret_cast<int32_t*>(element))) * factor);
  }
};

#if defined(__AVX512BF16__)
struct BFloat16Compute {
  static constexpr bool kRoundsWeights = true;
  using Scope = Float32Compute::Scope;
  static constexpr bool kTilesInMemory = false;
  static constexpr int kPair = 2;
  static constexpr int kStepMultiple = 1;
  // keys per block: P^T, 120 x 64 pairs = 30 KiB, stays in L1
  static constexpr int kForwardKeys = 240;
  static constexpr int kBackwardKeys = 192;  // dK, dV, three packed operands, P and dS stay in L2

  static RAL_INLINE void multiply_add(Vec& acc, uint32_t a, Vec b) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int32_t>(a));
    acc = _mm512_dpbf16_ps(acc, reinterpret_cast<const __m512bh&>(pair),
                           reinterpret_cast<__m512bh&>(b));
  }
  static void load_row(int32_t, const void* src, int64_t features, uint32_t* dst) {
    if (features % 2) dst[features / 2] = 0;
    memcpy(dst, src, features * sizeof(uint16_t));
  }
  static void load_row_pair(int32_t, const void* even, const void* odd, int64_t features,
                            uint32_t* dst) {
    const uint16_t* low = static_cast<const uint16_t*>(even);
    const uint16_t* high = static_cast<const uint16_t*>(odd);
    for (int64_t i = 0; i < features; ++i) {
      dst[i] = (low ? low[i] : 0u) | (high ? static_cast<uint32_t>(high[i]) << 16 : 0u);
    }
  }
  static RAL_INLINE void store_pair(const Vec (&x)[kPair], uint32_t* dst, float* total) {
    constexpr uint32_t kTwoOnes = 0x3f803f80;
    const __m512i words = _mm512_permutexvar_epi16(interleave_halves(), pair_of(x[0], x[1]));
    memcpy(dst, &words, sizeof words);
    Vec sum = load(total);
    multiply_add(sum, kTwoOnes, (Vec)words);
    store(total, sum);
  }
  template <int R, int V>
  static RAL_INLINE void store_rows(const Vec (&x)[R][V], uint32_t* dst, int64_t ld) {
    RAL_UNROLL for (int r = 0; r < R; ++r) {
      RAL_UNROLL for (int v = 0; v + 1 < V; v += 2) {
        const __m512i row = pair_of(x[r][v], x[r][v + 1]);
        memcpy(dst + r * ld + v * kLanes / 2, &row, sizeof row);
      }
      if (V % 2) {
        const __m256bh half = _mm512_cvtneps_pbh(x[r][V - 1]);
        memcpy(dst + r * ld + (V - 1) * kLanes / 2, &half, sizeof half);
      }
    }
  }
  // Both of the above for an even V; it converts once.
  template <int R, int V>
  static RAL_INLINE void store_rows_and_pairs(const Vec (&x)[R][V], uint32_t* rows, int64_t ld_rows,
                                              uint32_t* pairs, int64_t ld_pairs) {
    static_assert(V % 2 == 0, "two vectors of float make one of bfloat16");
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    RAL_UNROLL for (int r = 0; r < R; r += 2) {
      RAL_UNROLL for (int v = 0; v < V; v += 2) {
        const __m512i even = pair_of(x[r][v], x[r][v + 1]);
        const __m512i odd = pair_of(x[r + 1][v], x[r + 1][v + 1]);
        memcpy(rows + r * ld_rows + v * kLanes / 2, &even, sizeof even);
        memcpy(rows + (r + 1) * ld_rows + v * kLanes / 2, &odd, sizeof odd);
        const __m512i first = _mm512_permutex2var_epi16(even, low, odd);
        const __m512i second = _mm512_permutex2var_epi16(even, high, odd);
        memcpy(pairs + r / 2 * ld_pairs + v * kLanes, &first, sizeof first);
        memcpy(pairs + r / 2 * ld_pairs + (v + 1) * kLanes, &second, sizeof second);
      }
    }
  }
  // Exact: the factor is a power of two.
  static RAL_INLINE void rescale(uint32_t* element, Vec factor) {
    const IntVec pair = load(reinterpret_cast<int32_t*>(element));
    const IntVec high =
        float_to_bits(bits_to_float(pair & static_cast<int32_t>(0xffff0000)) * factor);
    const IntVec low = float_to_bits(bits_to_float(pair << 16) * factor);
    const IntVec joined = (high & static_cast<int32_t>(0xffff0000)) | (low >> 16 & 0xffff);
    memcpy(element, &joined, sizeof joined);
  }

 private:
  // 32 bfloat16: those of `low`, then those of `high`.
  static RAL_INLINE __m512i pair_of(Vec low, Vec high) {
    const __m512bh pair = _mm512_cvtne2ps_pbh(high, low);
    return reinterpret_cast<const __m512i&>(pair);
  }
  static RAL_INLINE __m512i interleave_halves() {
    return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                            6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  }
};
#endif

}  // namespace RAL_ISA
}  // namespace ral
