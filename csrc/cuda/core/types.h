// 16-bit floats as bits, and the types of wide accesses, for nvcc and the host compiler.
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

// The unit of a copy or a wide load.
struct alignas(16) Vector16 {
  uint32_t words[4];
};

struct alignas(8) Float2 {
  float x, y;
};
struct alignas(16) Float4 {
  float x[4];
};

}  // namespace cuda
}  // namespace ral
