// Scalar formulas of the divergences between two probabilities, shared by the CPU and CUDA
// backends: equations (4) to (10) of ral_kernels/ops/divergence/README.md. V is float, or a vector
// of floats.
//
// Literals stay plain: a test compares them with those of the Triton backend.
#pragma once

#include "ral/attention_math.h"

namespace ral {

// log(a / b) = 2 atanh(s) with s = (a - b) / (a + b): atanh(s) = s + s^3/3 + s^5/5 + ...
constexpr float kAtanh3 = 1.0f / 3.0f;
constexpr float kAtanh5 = 1.0f / 5.0f;
constexpr float kAtanh7 = 1.0f / 7.0f;
constexpr float kAtanh9 = 1.0f / 9.0f;
constexpr float kAtanh11 = 1.0f / 11.0f;
constexpr float kAtanh13 = 1.0f / 13.0f;

// (6): the jsd term over m x^2 is 1/2 + x^2/12 + x^4/30 + ..., x^2n over (2n + 1)(2n + 2).
constexpr float kJsd0 = 0.5f;
constexpr float kJsd2 = 1.0f / 12.0f;
constexpr float kJsd4 = 1.0f / 30.0f;
constexpr float kJsd6 = 1.0f / 56.0f;
constexpr float kJsd8 = 1.0f / 90.0f;
constexpr float kJsd10 = 1.0f / 132.0f;

// The series of (6) and (7) are used where x^2 is below these; elsewhere logarithms do not cancel.
constexpr float kJsdSeriesBelow = 0.0625f;
constexpr float kKlSeriesBelow = 0.1f;
// The series of (5), where |s| is below this. The CPU backend takes its logarithm instead.
constexpr float kAtanhSeriesBelow = 0.17f;

// A quotient between these is a normal number, and its logarithm is taken directly.
constexpr float kSmallestNormal = 1.17549435e-38f;
constexpr float kLargestQuotient = 3.4e38f;
// The logarithm of a subnormal number is that of its multiple by 2^24, minus log 2^24.
constexpr float kSubnormalScale = 16777216.0f;
constexpr float kSubnormalScaleLog2 = 24.0f;

// (10) is bounded below, so that a subnormal p does not make sums over the row infinite.
constexpr float kLowestReverseKlGradient = -1e34f;

// 2^-100, of the weight of all heads on the valid keys. A row with less has no policy: 1 / (Z H),
// or its product with a row's weight, could overflow.
constexpr float kSmallestWeight = 7.8886090522101181e-31f;

// A target whose weights on a row's valid keys sum to 1 up to 2^-20 is taken as it is. Weights that
// are a policy already are then not rounded again: against itself a policy has a gradient of 0.
constexpr float kNormalisedWithin = 9.5367431640625e-07f;

// The factor on a target's weights whose sum on a row's valid keys is z; 0 where they are none.
RAL_HOST_DEVICE float target_inverse(float z) {
  if (z < kSmallestWeight) return 0.f;
  return z - 1.f <= kNormalisedWithin && 1.f - z <= kNormalisedWithin ? 1.f : 1.f / z;
}

// (6) over m z, where z = x^2.
template <typename V>
RAL_HOST_DEVICE V jsd_series(V z) {
  V series = z * kJsd10 + kJsd8;
  series = series * z + kJsd6;
  series = series * z + kJsd4;
  series = series * z + kJsd2;
  return series * z + kJsd0;
}

// 1/3 + z/5 + z^2/7 + ... of (7), where z = x^2.
template <typename V>
RAL_HOST_DEVICE V kl_series(V z) {
  V series = z * kAtanh13 + kAtanh11;
  series = series * z + kAtanh9;
  series = series * z + kAtanh7;
  series = series * z + kAtanh5;
  return series * z + kAtanh3;
}

}  // namespace ral
