// C entry points of the CPU backend: choice of the variant at run time.
#include "ral/attention.h"

#include "attention_kernels.h"

#define RAL_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Isa {
  const char* name;
  const ral::AttentionKernels* kernels;
  bool (*supported)();
};

// Best first; the index is `isa` of the C interface.
const Isa kIsas[] = {
#ifdef RAL_HAVE_AVX512_BF16
    {"avx512_bf16", &ral::avx512_bf16::kAttentionKernels,
     [] {
       return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#ifdef RAL_HAVE_AVX512
    {"avx512", &ral::avx512::kAttentionKernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#ifdef RAL_HAVE_AVX2
    {"avx2", &ral::avx2::kAttentionKernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
    {"portable", &ral::portable::kAttentionKernels, [] { return true; }},
};
constexpr int kNumIsas = sizeof kIsas / sizeof kIsas[0];

bool can_use(int32_t isa) {
  return isa >= 0 && isa < kNumIsas && kIsas[isa].supported();
}

}  // namespace

// Name of variant `isa`, best first; null past the last.
RAL_EXPORT const char* ral_cpu_isa_name(int32_t isa) {
  return isa >= 0 && isa < kNumIsas ? kIsas[isa].name : nullptr;
}

RAL_EXPORT int32_t ral_cpu_isa_supported(int32_t isa) {
  return can_use(isa);
}

// sizeof of the three parameter structs, for the caller to compare with its own.
RAL_EXPORT void ral_cpu_attention_struct_sizes(int64_t sizes[3]) {
  sizes[0] = sizeof(ral_attention_params);
  sizes[1] = sizeof(ral_attention_outputs);
  sizes[2] = sizeof(ral_attention_gradients);
}

RAL_EXPORT int32_t ral_cpu_attention_fwd(const ral_attention_params* params,
                                         const ral_attention_outputs* outputs) {
  if (!can_use(params->isa)) return RAL_ISA_NOT_AVAILABLE;
  return kIsas[params->isa].kernels->forward(*params, *outputs);
}

RAL_EXPORT int32_t ral_cpu_attention_bwd(const ral_attention_params* params,
                                         const ral_attention_outputs* outputs,
                                         const ral_attention_gradients* gradients) {
  if (!can_use(params->isa)) return RAL_ISA_NOT_AVAILABLE;
  return kIsas[params->isa].kernels->backward(*params, *outputs, *gradients);
}
