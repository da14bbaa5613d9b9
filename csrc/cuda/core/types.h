// Numbers as bits, for kernels, nvcc and the host compiler alike.
#pragma once

#include <stdint.h>

namespace ral {
namespace cuda {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// What one copy or one wide load moves.
struct alignas(16) Vector16 {
  uint32_t words[4];
};

struct alignas(8) Float2 {
  float x, y;
};

}  // namespace cuda
}  // namespace ral
