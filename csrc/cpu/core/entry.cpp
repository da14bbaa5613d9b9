// C entry points of the CPU backend. Each checks the call, looks up its variant and calls its
// kernel.
#include "core/kernels.h"
#include "core/packed.h"
#include "core/threads.h"
#include "ral/check.h"

#define RAL_EXPORT extern "C" __attribute__((visibility("default")))

using ral::DivergencePass;
using ral::Kernels;
using ral::kernels_of;
using ral::Memory;

// Returns what the call returns, or the status that says why it must not run.
#define RAL_RUN_CALL(status, isa, call)               \
  do {                                                \
    if (const int32_t wrong = (status)) return wrong; \
    const Kernels* kernels = kernels_of(isa);         \
    return kernels ? call : RAL_ISA_NOT_AVAILABLE;    \
  } while (false)
#define RAL_RUN(status, isa, call) RAL_RUN_CALL(status, isa, kernels->call)
#define RAL_RUN_POLICY(status, params, kernel) \
  RAL_RUN_CALL(status, (params)->common.isa, ral::run_policy(*(params), kernels->kernel))

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
  RAL_RUN(ral::check_attention(Memory::kHost, params, outputs, nullptr), params->isa,
          attention_fwd(*params, *outputs));
}

RAL_EXPORT int32_t ral_cpu_attention_bwd(const ral_attention_params* params,
                                         const ral_attention_outputs* outputs,
                                         const ral_attention_gradients* gradients) {
  RAL_RUN(ral::check_attention_bwd(Memory::kHost, params, outputs, gradients), params->isa,
          attention_bwd(*params, *outputs, *gradients));
}

RAL_EXPORT int32_t ral_cpu_policy_fwd(const ral_policy_params* params) {
  RAL_RUN_POLICY(ral::check_policy(Memory::kHost, params, false), params, policy_fwd);
}

RAL_EXPORT int32_t ral_cpu_policy_bwd(const ral_policy_params* params) {
  RAL_RUN_POLICY(ral::check_policy(Memory::kHost, params, true), params, policy_bwd);
}

RAL_EXPORT int32_t ral_cpu_policy_divergence_fwd(const ral_policy_divergence_params* params) {
  RAL_RUN_POLICY(ral::check_policy_divergence(Memory::kHost, params, DivergencePass::kForward),
                 params, policy_divergence_fwd);
}

RAL_EXPORT int32_t ral_cpu_policy_divergence_bwd(const ral_policy_divergence_params* params) {
  RAL_RUN_POLICY(ral::check_policy_divergence(Memory::kHost, params, DivergencePass::kBackward),
                 params, policy_divergence_bwd);
}

// value, dq and dk for row weights `dvalue`. It stores nothing for a separate backward.
RAL_EXPORT int32_t ral_cpu_policy_loss(const ral_policy_divergence_params* params) {
  RAL_RUN_POLICY(ral::check_policy_divergence(Memory::kHost, params, DivergencePass::kLoss), params,
                 policy_loss);
}

RAL_EXPORT int32_t ral_cpu_divergence_fwd(const ral_divergence_params* params) {
  RAL_RUN(ral::check_divergence(params), params->isa, divergence_fwd(*params));
}

RAL_EXPORT void ral_cpu_expect_writes(void* memory, int64_t bytes) {
  if (memory && bytes > 0) ral::expect_writes(memory, static_cast<size_t>(bytes));
}

// Runs `repeats` register tiles per thread in L1. Returns their floating-point operations, for the
// caller to time, or 0 if the variant is not available.
RAL_EXPORT int64_t ral_cpu_tile_flops(int32_t isa, int32_t dtype, int32_t num_threads,
                                      int64_t repeats) {
  const Kernels* kernels = num_threads >= 1 && repeats >= 0 ? kernels_of(isa) : nullptr;
  return kernels ? kernels->tile_flops(dtype, num_threads, repeats) : 0;
}
