// C entry points of the CPU backend. Each looks up the call's variant and calls its kernel.
#include "core/kernels.h"
#include "core/threads.h"

#define RAL_EXPORT extern "C" __attribute__((visibility("default")))

using ral::Kernels;
using ral::kernels_of;

// sizeof of each parameter struct, for the caller to compare with its own.
RAL_EXPORT void ral_cpu_attention_struct_sizes(int64_t sizes[3]) {
  sizes[0] = sizeof(ral_attention_params);
  sizes[1] = sizeof(ral_attention_outputs);
  sizes[2] = sizeof(ral_attention_gradients);
}

RAL_EXPORT void ral_cpu_policy_struct_sizes(int64_t sizes[3]) {
  sizes[0] = sizeof(ral_policy_params);
  sizes[1] = sizeof(ral_policy_divergence_params);
  sizes[2] = sizeof(ral_divergence_params);
}

RAL_EXPORT int32_t ral_cpu_attention_fwd(const ral_attention_params* params,
                                         const ral_attention_outputs* outputs) {
  const Kernels* kernels = kernels_of(params->isa);
  return kernels ? kernels->attention_fwd(*params, *outputs) : RAL_ISA_NOT_AVAILABLE;
}

RAL_EXPORT int32_t ral_cpu_attention_bwd(const ral_attention_params* params,
                                         const ral_attention_outputs* outputs,
                                         const ral_attention_gradients* gradients) {
  const Kernels* kernels = kernels_of(params->isa);
  return kernels ? kernels->attention_bwd(*params, *outputs, *gradients) : RAL_ISA_NOT_AVAILABLE;
}

RAL_EXPORT int32_t ral_cpu_policy_fwd(const ral_policy_params* params) {
  const Kernels* kernels = kernels_of(params->common.isa);
  return kernels ? kernels->policy_fwd(*params) : RAL_ISA_NOT_AVAILABLE;
}

RAL_EXPORT int32_t ral_cpu_policy_bwd(const ral_policy_params* params) {
  const Kernels* kernels = kernels_of(params->common.isa);
  return kernels ? kernels->policy_bwd(*params) : RAL_ISA_NOT_AVAILABLE;
}

RAL_EXPORT int32_t ral_cpu_policy_divergence_fwd(const ral_policy_divergence_params* params) {
  const Kernels* kernels = kernels_of(params->common.isa);
  return kernels ? kernels->policy_divergence_fwd(*params) : RAL_ISA_NOT_AVAILABLE;
}

RAL_EXPORT int32_t ral_cpu_policy_divergence_bwd(const ral_policy_divergence_params* params) {
  const Kernels* kernels = kernels_of(params->common.isa);
  return kernels ? kernels->policy_divergence_bwd(*params) : RAL_ISA_NOT_AVAILABLE;
}

// value, dq and dk for row weights `dvalue`. It stores nothing for a separate backward.
RAL_EXPORT int32_t ral_cpu_policy_loss(const ral_policy_divergence_params* params) {
  const Kernels* kernels = kernels_of(params->common.isa);
  return kernels ? kernels->policy_loss(*params) : RAL_ISA_NOT_AVAILABLE;
}

RAL_EXPORT int32_t ral_cpu_divergence_fwd(const ral_divergence_params* params) {
  const Kernels* kernels = kernels_of(params->isa);
  return kernels ? kernels->divergence_fwd(*params) : RAL_ISA_NOT_AVAILABLE;
}

RAL_EXPORT void ral_cpu_expect_writes(void* memory, int64_t bytes) {
  ral::expect_writes(memory, static_cast<size_t>(bytes));
}

// Runs `repeats` register tiles per thread in L1. Returns their floating-point operations, for the
// caller to time, or 0 if the variant is not available.
RAL_EXPORT int64_t ral_cpu_tile_flops(int32_t isa, int32_t dtype, int32_t num_threads,
                                      int64_t repeats) {
  const Kernels* kernels = kernels_of(isa);
  return kernels ? kernels->tile_flops(dtype, num_threads, repeats) : 0;
}
