// Terms of the divergences between two probabilities, without cancellation where they nearly agree.
// Equations (4) to (10) and (12) of ral_kernels/ops/divergence/README.md, one element at a time.
// csrc/cpu/policy/divergence_terms.h takes a vector at a time.
#pragma once

#include "core/device.h"
#include "ral/divergence_math.h"
#include "ral/policy.h"

namespace ral {
namespace cuda {

struct DivergenceTerm {
  float value;     // this element's share, >= 0
  float gradient;  // d value / d p, up to a constant where the caller renormalises
};

// atanh(s) for |s| <= 0.18, to one rounding.
RAL_DEVICE float atanh_series(float s) {
  const float z = s * s;
  float series = z * kAtanh11 + kAtanh9;
  series = series * z + kAtanh7;
  series = series * z + kAtanh5;
  series = series * z + kAtanh3;
  return s + s * z * series;
}

// log x for x > 0, subnormal too. log2 takes subnormal numbers for 0.
RAL_DEVICE float natural_log(float x) {
  const bool small = x < kSmallestNormal;
  return (log2(small ? x * kSubnormalScale : x) - (small ? kSubnormalScaleLog2 : 0.0f)) * kLn2;
}

// log(a / b) for a, b > 0, with s = (a - b) / (a + b) from the unrounded difference: (5).
RAL_DEVICE float log_quotient(float a, float b, float s) {
  if (s < kAtanhSeriesBelow && s > -kAtanhSeriesBelow) return 2.0f * atanh_series(s);
  const float y = a / b;
  if (y > kSmallestNormal && y < kLargestQuotient) return log2(y) * kLn2;
  return natural_log(a) - natural_log(b);
}

// (p log(p / m) + r log(r / m)) / 2 with m = (p + r) / 2.
RAL_DEVICE float jsd_term(float p, float r, float x) {
  const float z = x * x, m = 0.5f * (p + r);
  if (z < kJsdSeriesBelow) return m * z * jsd_series(z);  // (6)
  const float from_p = p == 0.0f ? 0.0f : p * log_quotient(p, m, x / (2.0f + x));
  const float from_r = r == 0.0f ? 0.0f : r * log_quotient(r, m, -x / (2.0f - x));
  return 0.5f * (from_p + from_r);
}

// a log(a / b) - a + b, +inf where b = 0 < a; x belongs to (a, b).
RAL_DEVICE float kl_term(float a, float b, float x) {
  if (a == 0.0f) return b;
  if (b == 0.0f) return -minus_infinity();
  const float z = x * x;
  if (z < kKlSeriesBelow) return (a + b) * z * (x * (1.0f + x) * kl_series(z) + 1.0f);  // (7)
  return a * log_quotient(a, b, x) - a + b;
}

// -r log p, +inf where p = 0 < r.
RAL_DEVICE float cross_entropy_term(float p, float r) {
  if (r == 0.0f) return 0.0f;
  return p == 0.0f ? -minus_infinity() : -r * natural_log(p);  // (12)
}

// The gradient is 0 where p is 0, and where r = 0 < p makes the row infinite.
RAL_DEVICE DivergenceTerm divergence_term(int32_t kind, float p, float r) {
  const float total = p + r;
  if (total == 0.0f) return {0.0f, 0.0f};
  const float x = (p - r) / total;  // (4)
  if (kind == RAL_JSD) {
    const float l = p == 0.0f ? 0.0f : 0.5f * log_quotient(p, 0.5f * total, x / (2.0f + x));
    return {jsd_term(p, r, x), l};  // (8)
  }
  if (kind == RAL_KL)
    return {kl_term(p, r, x), p == 0.0f || r == 0.0f ? 0.0f : log_quotient(p, r, x)};  // (9)
  const float l = p == 0.0f ? 0.0f : maximum(kLowestReverseKlGradient, (p - r) / p);   // (10)
  return {kind == RAL_REVERSE_KL ? kl_term(r, p, -x) : cross_entropy_term(p, r), l};
}

}  // namespace cuda
}  // namespace ral
