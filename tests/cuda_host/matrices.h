// ldmatrix and mma of a whole warp.
#pragma once

#include <stdint.h>

#include "harness.h"

namespace ral {
namespace cuda {
namespace host {

// Row r of matrix i is rows[8 i + r], eight 16-bit numbers.
using MatrixRows = uint16_t[kLanes][8];

void spread_rows(const MatrixRows& rows, bool transposed, uint32_t* const (&registers)[kLanes]);

struct MultiplyAddOperands {
  float* c[kLanes];
  const uint32_t* a[kLanes];
  uint32_t b[kLanes][2];
};

void multiply_add_warp(const MultiplyAddOperands& operands, bool bfloat16);

}  // namespace host
}  // namespace cuda
}  // namespace ral
