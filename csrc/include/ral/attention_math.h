// Scalar formulas of the `attention` op, shared by the CPU and CUDA backends.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define RAL_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Internal linkage: every CPU variant must keep the copy compiled for its own instruction set.
#define RAL_HOST_DEVICE static inline
#endif

namespace ral {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// To users an additive mask of finfo.min is a finite score. It stays finite in base 2, too.
constexpr float kLowestScore = -1.0e38f;
// Stabiliser, in base 2, of a row that has seen no key yet. It is finite, so that (masked score) -
// kEmptyRow is -inf and not NaN. It is below any unmasked score, which then replaces it.
constexpr float kEmptyRow = -3.0e38f;

// Inclusive range of keys; empty when first > last.
struct KeyRange {
  int64_t first, last;
};

// Keys that query `t` of `seqlen_q` may see among `seqlen_k`, before masks.
RAL_HOST_DEVICE KeyRange visible_keys(int64_t t, int64_t seqlen_q, int64_t seqlen_k,
                                      int64_t window_left, int64_t window_right, bool top_left) {
  const int64_t diagonal = t + (top_left ? 0 : seqlen_k - seqlen_q);
  KeyRange range{0, seqlen_k - 1};
  if (window_left >= 0 && diagonal - window_left > range.first)
    range.first = diagonal - window_left;
  if (window_right >= 0 && diagonal + window_right < range.last)
    range.last = diagonal + window_right;
  return range;
}

}  // namespace ral
