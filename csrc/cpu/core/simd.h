// The vector type of one CPU variant, and the few operations that the kernels need.
//
// The code uses the compiler's vector extensions, and intrinsics only where an instruction has no
// operator. It is compiled once per variant, in a namespace of that name (RAL_ISA).
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__clang__)
#include <utility>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define RAL_INLINE inline __attribute__((always_inline))
#define RAL_NOINLINE __attribute__((noinline))
#define RAL_UNROLL _Pragma("GCC unroll 16")

namespace ral {
namespace RAL_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileVectors = 4;  // 6 x 4 accumulators + 4 operands + 1 broadcast of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileVectors = 2;  // 6 x 2 accumulators + 2 operands + 1 broadcast of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kTileVectors = 2;
#endif
#if defined(RAL_AMX)
constexpr int kTileRows = 32;  // two AMX tiles, see amx.h
constexpr int kFewRows = 8;    // rows of a tile that vector code takes at a time
constexpr int kFeaturePadding = 32;
#else
constexpr int kTileRows = 6;
constexpr int kFewRows = kTileRows;
constexpr int kFeaturePadding = kLanes;  // write_columns reads features in multiples of this
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));  // wraps round

RAL_INLINE Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof x);
  return x;
}
RAL_INLINE IntVec load(const int32_t* p) {
  IntVec x;
  memcpy(&x, p, sizeof x);
  return x;
}
RAL_INLINE void store(float* p, Vec x) {
  memcpy(p, &x, sizeof x);
}
RAL_INLINE void store(uint32_t* p, Vec x) {
  memcpy(p, &x, sizeof x);
}
RAL_INLINE Vec broadcast(float x) {
  return x - Vec{};
}
RAL_INLINE IntVec broadcast(int32_t x) {
  return x - IntVec{};
}
RAL_INLINE Vec bits_to_float(IntVec x) {
  return (Vec)x;
}
RAL_INLINE IntVec float_to_bits(Vec x) {
  return (IntVec)x;
}

// Blocks FMA contraction: x is rounded before it is added, so equal inputs give equal sums. One
// copy of the code could otherwise be fused where another is not.
RAL_INLINE Vec rounded(Vec x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}

RAL_INLINE Vec select(IntVec condition, Vec yes, Vec no) {
  return bits_to_float((condition & float_to_bits(yes)) | (~condition & float_to_bits(no)));
}

// The larger of two numbers; b if either is NaN, as the hardware's maximum does.
RAL_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return select(a > b, a, b);
#endif
}
RAL_INLINE Vec min(Vec a, Vec b) {
  return select(a < b, a, b);
}

RAL_INLINE bool any_greater(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#else
  const IntVec greater = a > b;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
#endif
}

RAL_INLINE Vec floor(Vec x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_floor_ps(x);
#else
  // From 2^23 on every float is an integer, and the conversion below would overflow.
  const IntVec small = (x < 8388608.f) & (x > -8388608.f);
  const Vec bounded = select(small, x, Vec{});
  const Vec truncated = __builtin_convertvector(__builtin_convertvector(bounded, IntVec), Vec);
  const Vec floored = truncated - select(truncated > bounded, broadcast(1.f), Vec{});
  return select(small, floored, x);
#endif
}

// 2^f on [0, 1): minimax in relative error, with p(0) = 1 exactly. The error is 8e-8, with float32
// rounding 1.4e-7.
RAL_INLINE Vec exp2_polynomial(Vec f) {
  Vec p = f * 0.00186713f + 0.009017031f;
  p = p * f + 0.055799913f;
  p = p * f + 0.24016444f;
  p = p * f + 0.6931513f;
  return p * f + 1.f;
}

// 2^x with 2^-inf = 0 and NaN kept. Results below 2^-126 may be flushed to zero.
RAL_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_polynomial(f), x);  // scales by 2^floor(x)
#else
  const Vec n = floor(x);
  const Vec clamped = min(max(n, broadcast(-126.f)), broadcast(127.f));
  const IntVec exponent = (__builtin_convertvector(clamped, IntVec) + 127) << 23;
  const Vec f = select(float_to_bits(n) == float_to_bits(clamped), x - n, Vec{});
  Vec y = exp2_polynomial(f) * bits_to_float(exponent);
  y = select(x < -126.f, Vec{}, y);
  y = select(x >= 128.f, broadcast(__builtin_inff()), y);
  return select(x == x, y, x);
#endif
}

#if defined(__AVX512F__)
// Bits of 2^(j/32), minus j << 18.
alignas(64) constexpr uint32_t kExp2Table[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3,
};
#endif

// exp2 for x <= 127 in three multiplications instead of five: 2^x = 2^(i/32) 2^r with i = round(32
// x) and |r| <= 1/64. Adding 1.5 * 2^18 leaves i in the last bits of the sum. Its last five bits
// choose an entry of the table. The other bits move to the exponent and are added to the entry. 2^r
// - 1 is r times a minimax line. The error is 5e-8, with float32 rounding 1.7e-7.
RAL_INLINE Vec exp2_bounded(Vec x) {
#if defined(__AVX512F__)
  const Vec shifted = x + 393216.f;
  const Vec r = x - (shifted - 393216.f);
  const __m512i index = _mm512_castps_si512(shifted);
  const __m512i low = _mm512_load_si512(kExp2Table), high = _mm512_load_si512(kExp2Table + 16);
  const __m512i entry = _mm512_permutex2var_epi32(low, index, high);
  const Vec power = _mm512_castsi512_ps(_mm512_add_epi32(entry, _mm512_slli_epi32(index, 18)));
  const Vec q = r * 0.2402266f + 0.6931573f;
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return _mm512_maskz_mov_ps(normal, (power * r) * q + power);
#else
  return exp2(x);
#endif
}

// tanh to 2 ulp. Near 0, where 1 - 2/(e^2x + 1) would cancel, it is an odd polynomial
// (coefficients: Cephes).
RAL_INLINE Vec tanh(Vec x) {
  const Vec a = max(x, -x);
  const Vec z = x * x;
  Vec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const Vec near = p * z * x + x;
  const Vec far = 1.f - 2.f / (exp2(a * 2.8853900817779268f) + 1.f);
  const Vec signed_far = select(x < 0.f, -far, far);
  return select(x == x, select(a < 0.625f, near, signed_far), x);
}

// The first `count` elements, then 0; all of them if count >= kLanes.
RAL_INLINE Vec load_first(const float* from, int64_t count) {
  if (__builtin_expect(count >= kLanes, 1)) return load(from);
  alignas(64) float x[kLanes] = {};
  memcpy(x, from, count * sizeof(float));
  return load(x);
}
RAL_INLINE void store_first(float* to, Vec x, int64_t count) {
  if (__builtin_expect(count >= kLanes, 1)) return store(to, x);
  alignas(64) float staged[kLanes];
  store(staged, x);
  memcpy(to, staged, count * sizeof(float));
}

// One step of a transpose, on rows kStep apart. `a` gets the even blocks of kStep lanes of both,
// `b` the odd ones.
#if defined(__clang__)
template <int kStep, class V, int... kLane>
RAL_INLINE void exchange(V& a, V& b, std::integer_sequence<int, kLane...>) {
  const V low = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane : kLane + kStep)...);
  a = low;
}
template <int kStep, class V>
RAL_INLINE void exchange(V& a, V& b) {
  exchange<kStep>(a, b, std::make_integer_sequence<int, kLanes>());
}
#else
template <int kStep, class V>
RAL_INLINE void exchange(V& a, V& b) {
  IntVec low, high;
  RAL_UNROLL for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = (lane & kStep) ? kLanes + lane - kStep : lane;
    high[lane] = (lane & kStep) ? kLanes + lane : lane + kStep;
  }
  const V first = a;
  a = __builtin_shuffle(first, b, low);
  b = __builtin_shuffle(first, b, high);
}
#endif

// In-place transpose of a kLanes x kLanes block of 32-bit elements.
template <int kStep, class V>
RAL_INLINE void transpose_stage(V (&x)[kLanes]) {
  RAL_UNROLL for (int i = 0; i < kLanes; ++i) {
    if (!(i & kStep)) exchange<kStep>(x[i], x[i + kStep]);
  }
}
template <class V>
RAL_INLINE void transpose(V (&x)[kLanes]) {
  transpose_stage<1>(x);
  transpose_stage<2>(x);
  if constexpr (kLanes >= 8) transpose_stage<4>(x);
  if constexpr (kLanes >= 16) transpose_stage<8>(x);
}

// dst[j][i] = src[i][j] for 32-bit elements; rows and columns are multiples of kLanes.
RAL_INLINE void transpose_block(const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                                int64_t rows, int64_t columns) {
  const int32_t* from = static_cast<const int32_t*>(src);
  int32_t* to = static_cast<int32_t*>(dst);
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      IntVec x[kLanes];
      RAL_UNROLL for (int r = 0; r < kLanes; ++r)
        x[r] = load(from + (i + r) * src_stride + j);
      transpose(x);
      RAL_UNROLL for (int r = 0; r < kLanes; ++r)
        memcpy(to + (j + r) * dst_stride + i, &x[r], sizeof x[r]);
    }
  }
}

}  // namespace RAL_ISA
}  // namespace ral
