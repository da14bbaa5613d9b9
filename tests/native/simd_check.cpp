// What simd.h, compute.h and divergence_terms.h promise of single vectors: exponentials within
// their error, exact where they say so, one rounding to bfloat16 whether it is done by vectors or
// one by one, and divergences of any two floats without overflow of their bits.
#include <float.h>
#include <math.h>
#include <stdio.h>

#include <initializer_list>

#include "core/compute.h"
#include "policy/divergence_terms.h"

using namespace ral::RAL_ISA;

namespace {

int failures = 0;

void expect(bool ok, const char* what, float x, float got) {
  if (ok) return;
  if (++failures < 10) printf("%s: x = %.9g, got %.9g\n", what, x, got);
}

template <class Exp2>
void check_exp2(const char* name, Exp2 exp2_of, float highest) {
  const auto at = [&](float x) { return exp2_of(broadcast(x))[0]; };
  double worst = 0;
  for (float x = -126.f; x <= highest; x += 0.000701f) {
    const double exact = ::exp2(static_cast<double>(x));
    worst = fmax(worst, fabs(at(x) - exact) / exact);
  }
  printf("%s: relative error %.2g\n", name, worst);
  expect(worst < 1.8e-7, name, 0.f, static_cast<float>(worst));
  for (int n = -126; n <= static_cast<int>(highest); ++n) {
    expect(at(static_cast<float>(n)) == ldexpf(1.f, n), "a power of two", n, at(n));
  }
  for (const float x : {-126.5f, -150.f, -1000.f, -1e6f, -3e38f, -INFINITY}) {
    expect(at(x) >= 0.f && at(x) < 1.1755e-38f, "what underflows", x, at(x));
  }
  expect(at(-INFINITY) == 0.f, "2^-inf", -INFINITY, at(-INFINITY));
  expect(isnan(at(NAN)), "NaN", NAN, at(NAN));
}

void check_bfloat16(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  uint16_t halves[kLanes];
  store_bfloat16(halves, bits_to_float(broadcast(static_cast<int32_t>(bits))));
  expect(halves[kLanes - 1] == float_to_bfloat16(x), "bfloat16", x,
         bfloat16_to_float(halves[kLanes - 1]));
}

void check_divergence(int32_t kind, float p, float r) {
  const float value = divergence_term(kind, broadcast(p), broadcast(r)).value[0];
  if (isnan(p) && r > 0.f) {
    expect(isnan(value), "divergence of NaN", r, value);
  } else if (p <= 1.f && r <= 1.f) {
    expect(p == r ? value == 0.f : value >= 0.f, "divergence", p, value);
  }
}

}  // namespace

int main() {
  check_exp2("exp2", [](Vec x) { return exp2(x); }, 127.f);
  check_exp2("exp2_bounded", [](Vec x) { return exp2_bounded(x); }, 127.f);
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 9973) {
    check_bfloat16(static_cast<uint32_t>(bits));
  }
  for (const uint32_t bits : {0x3f808000u, 0x3f818000u, 0x7f7fffffu, 0x7f800000u, 0x7f800001u,
                              0x7fffffffu, 0xffffffffu, 0xff800000u, 0x00000001u}) {
    check_bfloat16(bits);
  }
  const auto numbers = {0.f, 1e-45f, FLT_MIN, 1e-30f, 0.5f, 1.f, FLT_MAX, INFINITY, NAN, -NAN};
  for (const int32_t kind : {RAL_JSD, RAL_KL, RAL_REVERSE_KL}) {
    for (const float p : numbers) {
      for (const float r : numbers) check_divergence(kind, p, r);
    }
  }
  if (failures == 0) printf("simd_check: ok\n");
  return failures != 0;
}
