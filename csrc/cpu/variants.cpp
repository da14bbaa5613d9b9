// Choice of the CPU variant at run time.
#include "kernels.h"

#define RAL_EXPORT extern "C" __attribute__((visibility("default")))

namespace ral {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

// Best first; the index is `isa` of the C interface.
const Isa kIsas[] = {
#ifdef RAL_HAVE_AVX512_BF16
    {"avx512_bf16", &avx512_bf16::kKernels,
     [] {
       return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#ifdef RAL_HAVE_AVX512
    {"avx512", &avx512::kKernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#ifdef RAL_HAVE_AVX2
    {"avx2", &avx2::kKernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
    {"portable", &portable::kKernels, [] { return true; }},
};
constexpr int kNumIsas = sizeof kIsas / sizeof kIsas[0];

}  // namespace

const Kernels* kernels_of(int32_t isa) {
  if (isa < 0 || isa >= kNumIsas || !kIsas[isa].supported()) return nullptr;
  return kIsas[isa].kernels;
}

}  // namespace ral

// Name of variant `isa`, best first; null past the last.
RAL_EXPORT const char* ral_cpu_isa_name(int32_t isa) {
  return isa >= 0 && isa < ral::kNumIsas ? ral::kIsas[isa].name : nullptr;
}

RAL_EXPORT int32_t ral_cpu_isa_supported(int32_t isa) {
  return ral::kernels_of(isa) != nullptr;
}
