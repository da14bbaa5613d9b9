// Chooses the CPU variant at run time.
#include "core/kernels.h"

#include <string.h>

#ifdef RAL_HAVE_AVX2
#include <cpuid.h>
#endif
#ifdef RAL_HAVE_AMX_BF16
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define RAL_EXPORT extern "C" __attribute__((visibility("default")))

namespace ral {
namespace {

struct Isa {
  const char* name;
  const Kernels& (*kernels)();
  bool (*supported)();
};

#ifdef RAL_HAVE_AVX2
bool has_f16c() {  // clang's builtin does not know it
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & 1u << 29);
}
bool supports_avx2() {
  static const bool supported =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  return supported;
}
#endif
#ifdef RAL_HAVE_AVX512
bool supports_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#ifdef RAL_HAVE_AVX512_BF16
bool supports_avx512_bf16() {
  return supports_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif

#ifdef RAL_HAVE_AMX_BF16
// Whether the processor has AMX and the system grants it to this process. A process must ask for
// it.
bool request_amx_bf16() {
  unsigned eax, ebx, ecx, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx & kAmxBf16) || !(edx & kAmxTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
bool supports_amx_bf16() {
  static const bool granted = supports_avx512_bf16() && request_amx_bf16();
  return granted;
}

// AMX if all is bfloat16, else float32. Without AMX an FMA of bfloat16 pairs takes these processors
// twice the time of two float32 FMAs (Emerald Rapids, 2026-11).
const Kernels& amx_or_not(bool bfloat16) {
  return bfloat16 ? amx_bf16::kKernels : avx512::kKernels;
}
bool in_bfloat16(const ral_policy_params& x) {
  return x.policy.dtype == RAL_BFLOAT16;
}
bool in_bfloat16(const ral_policy_divergence_params& x) {
  return x.policy.dtype == RAL_BFLOAT16 && x.reference.dtype == RAL_BFLOAT16;
}
template <class Params, int (*Kernels::*kOp)(const Params&)>
int amx_policy_op(const Params& x) {
  return (amx_or_not(in_bfloat16(x)).*kOp)(x);
}

const Kernels kAmxKernels{
    [](const ral_attention_params& x, const ral_attention_outputs& outputs) {
      return amx_or_not(x.dtype == RAL_BFLOAT16 && !has_few_queries(x)).attention_fwd(x, outputs);
    },
    [](const ral_attention_params& x, const ral_attention_outputs& outputs,
       const ral_attention_gradients& gradients) {
      return amx_or_not(x.dtype == RAL_BFLOAT16).attention_bwd(x, outputs, gradients);
    },
    amx_policy_op<ral_policy_params, &Kernels::policy_fwd>,
    amx_policy_op<ral_policy_params, &Kernels::policy_bwd>,
    amx_policy_op<ral_policy_divergence_params, &Kernels::policy_divergence_fwd>,
    amx_policy_op<ral_policy_divergence_params, &Kernels::policy_divergence_bwd>,
    amx_policy_op<ral_policy_divergence_params, &Kernels::policy_loss>,
    [](const ral_divergence_params& x) { return avx512::kKernels.divergence_fwd(x); },
    [](int32_t dtype, int num_threads, int64_t repeats) {
      return amx_or_not(dtype == RAL_BFLOAT16).tile_flops(dtype, num_threads, repeats);
    },
};
#endif

// Best first; the index is `isa` of the C interface.
const Isa kIsas[] = {
#ifdef RAL_HAVE_AMX_BF16
    {"amx_bf16", []() -> const Kernels& { return kAmxKernels; }, supports_amx_bf16},
#endif
#ifdef RAL_HAVE_AVX512_BF16
    {"avx512_bf16", []() -> const Kernels& { return avx512_bf16::kKernels; }, supports_avx512_bf16},
#endif
#ifdef RAL_HAVE_AVX512
    {"avx512", []() -> const Kernels& { return avx512::kKernels; }, supports_avx512},
#endif
#ifdef RAL_HAVE_AVX2
    {"avx2", []() -> const Kernels& { return avx2::kKernels; }, supports_avx2},
#endif
    {"portable", []() -> const Kernels& { return portable::kKernels; }, [] { return true; }},
};
constexpr int kNumIsas = sizeof kIsas / sizeof kIsas[0];

}  // namespace

const Kernels* kernels_of(int32_t isa) {
  if (isa < 0 || isa >= kNumIsas || !kIsas[isa].supported()) return nullptr;
  return &kIsas[isa].kernels();
}

}  // namespace ral

// Name of variant `isa`, best first; null past the last.
RAL_EXPORT const char* ral_cpu_isa_name(int32_t isa) {
  return isa >= 0 && isa < ral::kNumIsas ? ral::kIsas[isa].name : nullptr;
}

RAL_EXPORT int32_t ral_cpu_isa_supported(int32_t isa) {
  return ral::kernels_of(isa) != nullptr;
}

// Whether a variant is worth choosing by default. FMAs of bfloat16 pairs run at 0.25x the rate on
// Intel that they have on AMD (Emerald Rapids against Zen 5, 2026-11). There float32 is faster.
RAL_EXPORT int32_t ral_cpu_isa_advisable(int32_t isa) {
  if (!ral_cpu_isa_supported(isa)) return 0;
#ifdef RAL_HAVE_AVX512_BF16
  if (__builtin_cpu_is("intel")) return strcmp(ral_cpu_isa_name(isa), "avx512_bf16") != 0;
#endif
  return 1;
}
