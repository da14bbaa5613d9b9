// bfloat16 and float16 as bits, converted as the GPU's cvt.rn does.
#pragma once

#include <stdint.h>
#include <string.h>

namespace ral {
namespace cuda {
namespace host {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

constexpr uint32_t kSignless = 0x7fffffffu, kInfinity = 0x7f800000u;

inline uint16_t bf16_of(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & kSignless) > kInfinity) return 0x7fff;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t fp16_of(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  uint32_t bits = bits_of(x) & kSignless;
  if (bits > kInfinity) return 0x7fff;
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520, halfway to 2^16, and more
  // Below 2^-14 a unit is 2^-24, that of float32 at 1/2: the sum rounds.
  if (bits < 0x38800000u) return uint16_t(sign | (bits_of(float_of(bits) + 0.5f) - 0x3f000000u));
  bits += 0xfffu + ((bits >> 13) & 1u);
  return uint16_t(sign | ((bits - 0x38000000u) >> 13));
}

inline float float_of_bf16(uint32_t half) {
  return float_of(half << 16);
}

inline float float_of_fp16(uint32_t half) {
  // As float32 bits the exponent is 112 too low, for subnormal numbers too.
  const uint32_t magnitude = bits_of(float_of((half & 0x7fffu) << 13) * 0x1p112f);
  const uint32_t special = (half & 0x7c00u) == 0x7c00u ? kInfinity : 0u;
  return float_of(magnitude | special | (half & 0x8000u) << 16);
}

}  // namespace host
}  // namespace cuda
}  // namespace ral
