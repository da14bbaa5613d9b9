// Entry points about the library: its kernels, the sizes of its structs, the last failed launch.
#include "core/launch.h"

namespace ral {
namespace cuda {

static thread_local const char* failed_kernel = "";

int failed(const char* kernel, int error) {
  failed_kernel = kernel;
  return error;
}

static const ListedKernel* newest_kernel = nullptr;

ListedKernel::ListedKernel(const KernelFacts& facts) : facts(facts), next(newest_kernel) {
  newest_kernel = this;
}

}  // namespace cuda
}  // namespace ral

// The index-th kernel of the library; null past the last.
extern "C" RAL_EXPORT const ral::cuda::KernelFacts* ral_cuda_kernel(int32_t index) {
  const ral::cuda::ListedKernel* kernel = ral::cuda::newest_kernel;
  for (; index > 0 && kernel != nullptr; --index) kernel = kernel->next;
  return kernel == nullptr ? nullptr : &kernel->facts;
}

// sizeof of each parameter struct, for the caller to compare with its own.
extern "C" RAL_EXPORT void ral_cuda_attention_struct_sizes(int64_t sizes[3]) {
  sizes[0] = sizeof(ral_attention_params);
  sizes[1] = sizeof(ral_attention_outputs);
  sizes[2] = sizeof(ral_attention_gradients);
}

// The CUDA version that the driver supports (0 without a driver), and that of the linked runtime,
// as 1000 major + 10 minor.
extern "C" RAL_EXPORT void ral_cuda_versions(int32_t versions[2]) {
  int driver = 0, runtime = 0;
#ifndef RAL_CUDA_ON_HOST
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
#endif
  versions[0] = driver;
  versions[1] = runtime;
}

// The kernel whose launch failed last in this thread, and the text of an entry point's status.
extern "C" RAL_EXPORT const char* ral_cuda_failed_kernel() {
  return ral::cuda::failed_kernel;
}

extern "C" RAL_EXPORT const char* ral_cuda_error_string(int32_t error) {
  if (error == ral::cuda::kNoKernel) return "there is no kernel for this dtype and head dim";
  if (error == ral::cuda::kBadArgument) return "pointers or sizes that do not fit together";
  if (error == ral::cuda::kNotTaken) return "this kernel leaves the call to another one";
#ifdef RAL_CUDA_ON_HOST
  return "the host harness reports a violation";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}
