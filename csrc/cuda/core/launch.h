// Dispatches a call to the kernel compiled for its dtype and head dim, and records failed launches.
#pragma once

#include <typeinfo>

#include "core/device.h"
#include "ral/attention.h"
#include "ral/check.h"

#define RAL_EXPORT __attribute__((visibility("default")))

// Calls function<T, kHeadDim>, or reports that there is none. Python refuses such calls earlier.
#define RAL_DISPATCH(dtype, head_dim, function, ...)           \
  do {                                                         \
    if ((dtype) == RAL_BFLOAT16 && (head_dim) == 64)           \
      return function<ral::cuda::Bf16, 64>(__VA_ARGS__);       \
    if ((dtype) == RAL_BFLOAT16 && (head_dim) == 128)          \
      return function<ral::cuda::Bf16, 128>(__VA_ARGS__);      \
    if ((dtype) == RAL_FLOAT16 && (head_dim) == 64)            \
      return function<ral::cuda::Fp16, 64>(__VA_ARGS__);       \
    if ((dtype) == RAL_FLOAT16 && (head_dim) == 128)           \
      return function<ral::cuda::Fp16, 128>(__VA_ARGS__);      \
    return ral::cuda::failed(#function, ral::cuda::kNoKernel); \
  } while (false)

// The same for `attention`, which has kernels for 96 columns too (kernel_head_dim).
#define RAL_DISPATCH_ATTENTION(dtype, head_dim, function, ...)                        \
  do {                                                                                \
    if (ral::cuda::kernel_head_dim(head_dim) == 96) {                                 \
      if ((dtype) == RAL_BFLOAT16) return function<ral::cuda::Bf16, 96>(__VA_ARGS__); \
      if ((dtype) == RAL_FLOAT16) return function<ral::cuda::Fp16, 96>(__VA_ARGS__);  \
    }                                                                                 \
    RAL_DISPATCH(dtype, head_dim, function, __VA_ARGS__);                             \
  } while (false)

// The same for the general kernels of `attention` and those for Hopper, which have 64, 128 or 256
// columns.
#define RAL_DISPATCH_GENERAL(dtype, columns, function, ...)                            \
  do {                                                                                 \
    if ((columns) == 256) {                                                            \
      if ((dtype) == RAL_BFLOAT16) return function<ral::cuda::Bf16, 256>(__VA_ARGS__); \
      if ((dtype) == RAL_FLOAT16) return function<ral::cuda::Fp16, 256>(__VA_ARGS__);  \
    }                                                                                  \
    RAL_DISPATCH(dtype, columns, function, __VA_ARGS__);                               \
  } while (false)

// Leaves an entry point whose call does not pass its check in ral/check.h.
#define RAL_CHECK(passes)                                                       \
  do {                                                                          \
    if (!(passes)) return ral::cuda::failed(__func__, ral::cuda::kBadArgument); \
  } while (false)

namespace ral {
namespace cuda {

// Statuses besides those of cudaError_t, which are positive.
constexpr int kNoKernel = -1;
constexpr int kNotTaken = -2;  // another kernel takes the call; this one launched nothing
constexpr int kBadArgument = -3;

// Records the name of what failed in this thread, for ral_cuda_failed_kernel. Returns `error`.
int failed(const char* kernel, int error);

// What one kernel uses, for tests that read the machine code; see ral_cuda_kernel.
struct KernelFacts {
  const char* type;  // mangled: the end of the kernel's symbol
  int32_t threads, shared_bytes;
};

// A list of the library's kernels. Loading the library fills it.
struct ListedKernel {
  KernelFacts facts;
  const ListedKernel* next;
  explicit ListedKernel(const KernelFacts& facts);
};

template <typename Kernel>
struct Listed {
  static const ListedKernel kernel;
};
template <typename Kernel>
const ListedKernel Listed<Kernel>::kernel{
    {typeid(Kernel).name(), Kernel::kThreads, int32_t(Kernel::kSharedBytes)}};

inline int64_t cdiv(int64_t x, int64_t y) {
  return (x + y - 1) / y;
}

// Launches a kernel. Returns 0, or the error after recording it.
template <typename Kernel>
int run(int64_t num_blocks, const typename Kernel::Params& params, void* stream) {
  static_cast<void>(&Listed<Kernel>::kernel);
  const int error = launch<Kernel>(num_blocks, params, stream);
  return error == 0 ? 0 : failed(Kernel::name(), error);
}

}  // namespace cuda
}  // namespace ral
