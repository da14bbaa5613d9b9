// Terms of the divergences between two probabilities, without cancellation where they nearly agree.
// Equations (4) to (10) of ral_kernels/ops/divergence/README.md, a vector at a time.
#pragma once

#include "core/simd.h"
#include "ral/divergence_math.h"
#include "ral/policy.h"

namespace ral {
namespace RAL_ISA {

// log(y) to a few ulp for normal y > 0. t = y - 1 comes apart, free of the rounding of y.
RAL_INLINE Vec log_normal(Vec y, Vec t) {
  // y = 2^k f with f in [sqrt(1/2), sqrt(2)).
  const IntVec bits = (IntVec)((UintVec)y + (0x3f800000u - 0x3f3504f3u));
  const IntVec k = (bits >> 23) - 127;
  const Vec f = (Vec)((bits & 0x7fffff) + 0x3f3504f3);
  const Vec u = select(k == 0, t, f - 1.f);
  const Vec s = u / (u + 2.f);
  const Vec z = s * s;
  Vec p = z * 0.22222222f + 0.28571430f;
  p = p * z + 0.4f;
  p = p * z + 0.66666668f;
  return __builtin_convertvector(k, Vec) * kLn2 + (s + s + s * z * p);
}

// log(x) for x > 0, subnormal too.
RAL_INLINE Vec log(Vec x) {
  const IntVec small = x < kSmallestNormal;
  const Vec y = select(small, x * kSubnormalScale, x);
  return log_normal(y, y - 1.f) - select(small, broadcast(kSubnormalScaleLog2 * kLn2), Vec{});
}

// log(a / b) for positive a and b. It uses their difference where they are close, the quotient
// where that is a normal number, and two logarithms elsewhere. `t` is a / b - 1, from the unrounded
// difference.
RAL_INLINE Vec log_quotient(Vec a, Vec b, Vec t) {
  const Vec y = a / b;
  const Vec near = log_normal(y, t);
  const IntVec normal = (y > kSmallestNormal) & (y < kLargestQuotient);
  return select(normal, near, log(a) - log(b));
}

RAL_INLINE Vec log_quotient(Vec a, Vec b) {
  return log_quotient(a, b, (a - b) / b);
}

// a log(a / b) with 0 log 0 = 0.
RAL_INLINE Vec times_log_quotient(Vec a, Vec b) {
  return select(a > 0.f, a * log_quotient(a, b), select(a == a, Vec{}, a));
}

struct DivergenceTerm {
  Vec value;     // this element's share
  Vec gradient;  // d value / d p, up to a constant where the caller renormalises
};

// (p log(p / m) + r log(r / m)) / 2 with m = (p + r) / 2. Where the two logarithms would cancel, it
// is a series in x = (p - r) / (p + r).
RAL_INLINE Vec jsd_term(Vec p, Vec r, Vec m, Vec x) {
  const Vec z = x * x;
  const Vec direct = 0.5f * (times_log_quotient(p, m) + times_log_quotient(r, m));
  return select(z < kJsdSeriesBelow, m * jsd_series(z) * z, direct);
}

// a log(a / b) - a + b where the two are so close that it would cancel. It is a series in
// s = (a - b) / (a + b): (a + b) s^2 (1 + s (1 + s) (1/3 + s^2/5 + s^4/7 + ...)), where z = s^2.
RAL_INLINE Vec close_kl_term(Vec a, Vec b, Vec s, Vec z) {
  return (a + b) * z * (s * (1.f + s) * kl_series(z) + 1.f);
}

// a log(a / b) - a + b.
RAL_INLINE Vec kl_term(Vec a, Vec b, Vec s) {
  const Vec z = s * s;
  const Vec direct = times_log_quotient(a, b) - a + b;
  return select(z < kKlSeriesBelow, close_kl_term(a, b, s, z), direct);
}

// a log(a / b), +inf where b = 0 < a. Only close elements form it from the series above: in rows
// far from normalised, - a + b would cancel with what takes it back.
RAL_INLINE Vec literal_kl_term(Vec a, Vec b) {
  const Vec s = (a - b) / (a + b);
  const Vec z = s * s;
  const IntVec infinite = (b == 0.f) & (a > 0.f);
  const Vec direct = select(infinite, broadcast(__builtin_inff()), times_log_quotient(a, b));
  const Vec close = close_kl_term(a, b, s, z) + (a - b);
  return select(z < kKlSeriesBelow, close, select(b == b, direct, b));
}

// -r log(p), +inf where p = 0 < r.
RAL_INLINE Vec cross_entropy_term(Vec p, Vec r) {
  const Vec term = select(p > 0.f, -r * log(p), select(p == p, broadcast(__builtin_inff()), p));
  return select(r > 0.f, term, select((r == r) & (p == p), Vec{}, p + r));
}

// Terms between p and r of two distributions that each sum to 1. Two zeros give exactly 0. A
// Kullback-Leibler divergence is +inf where its second argument is 0 and its first is not; its
// gradient there is 0. Cross-entropy has the gradient of the reverse one.
template <ral_divergence_kind kKind>
RAL_INLINE DivergenceTerm divergence_term(Vec p, Vec r) {
  const Vec zero{};
  const IntVec none = (p == 0.f) & (r == 0.f);
  const IntVec both = (p > 0.f) & (r > 0.f);
  const Vec x = select(none, zero, (p - r) / (p + r));
  if (kKind == RAL_JSD) {
    const Vec m = 0.5f * (p + r);
    return {select(none, zero, jsd_term(p, r, m, x)),
            select(p > 0.f, 0.5f * log_quotient(p, m, x), select(p == p, zero, p))};
  }
  const Vec infinite = broadcast(__builtin_inff());
  const Vec a = kKind == RAL_KL ? p : r;
  const Vec b = kKind == RAL_KL ? r : p;
  const Vec term = kl_term(a, b, kKind == RAL_KL ? x : -x);
  const Vec one_sided = select(a > 0.f, infinite, b);  // one of them is 0
  const Vec value = select((a == 0.f) | (b == 0.f), one_sided, term);
  const Vec l =
      kKind == RAL_KL ? log_quotient(p, r) : max(broadcast(kLowestReverseKlGradient), (p - r) / p);
  const Vec alone = kKind == RAL_KL ? zero : broadcast(1.f);  // where r is 0
  return {kKind == RAL_CROSS_ENTROPY ? cross_entropy_term(p, r) : value,
          select(both, l, select((p > 0.f) & (r == 0.f), alone, zero))};
}

RAL_INLINE DivergenceTerm divergence_term(int32_t kind, Vec p, Vec r) {
  if (kind == RAL_KL) return divergence_term<RAL_KL>(p, r);
  if (kind == RAL_REVERSE_KL) return divergence_term<RAL_REVERSE_KL>(p, r);
  if (kind == RAL_CROSS_ENTROPY) return divergence_term<RAL_CROSS_ENTROPY>(p, r);
  return divergence_term<RAL_JSD>(p, r);
}

}  // namespace RAL_ISA
}  // namespace ral
