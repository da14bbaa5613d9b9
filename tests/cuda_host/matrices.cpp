#include "matrices.h"

#include <string.h>

#include "numbers.h"

namespace ral {
namespace cuda {
namespace host {
namespace {

struct Pair {
  float x, y;
};

Pair unpacked(uint32_t packed, bool bfloat16) {
  if (bfloat16) return {float_of_bf16(packed & 0xffffu), float_of_bf16(packed >> 16)};
  return {float_of_fp16(packed & 0xffffu), float_of_fp16(packed >> 16)};
}

typedef float Floats4 __attribute__((vector_size(16)));

}  // namespace

void spread_rows(const MatrixRows& rows, bool transposed, uint32_t* const (&registers)[kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, j = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      const uint16_t (*matrix)[8] = rows + 8 * i;
      registers[lane][i] = transposed ? matrix[j][g] | uint32_t(matrix[j + 1][g]) << 16
                                      : matrix[g][j] | uint32_t(matrix[g][j + 1]) << 16;
    }
  }
}

// Products of two halves are exact in float32; they are added one after the other in float32, while
// tensor cores add groups of them with a few bits more and cut off: results differ in last bits.
void multiply_add_warp(const MultiplyAddOperands& operands, bool bfloat16) {
  float a[16][16];
  alignas(16) float b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, j = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      const Pair pair = unpacked(operands.a[lane][i], bfloat16);
      float* const place = &a[g + 8 * (i % 2)][j + 8 * (i / 2)];
      place[0] = pair.x;
      place[1] = pair.y;
    }
    for (int i = 0; i < 2; ++i) {
      const Pair pair = unpacked(operands.b[lane][i], bfloat16);
      b[j + 8 * i][g] = pair.x;
      b[j + 8 * i + 1][g] = pair.y;
    }
  }
  Floats4 right[16][2];
  memcpy(right, b, sizeof b);
  for (int row = 0; row < 16; ++row) {
    const int first_lane = 4 * (row % 8), half = 2 * (row / 8);
    alignas(16) float sums[8];
    for (int i = 0; i < 4; ++i) memcpy(sums + 2 * i, operands.c[first_lane + i] + half, 8);
    Floats4 low, high;
    memcpy(&low, sums, sizeof low);
    memcpy(&high, sums + 4, sizeof high);
    for (int k = 0; k < 16; ++k) {
      low += a[row][k] * right[k][0];
      high += a[row][k] * right[k][1];
    }
    memcpy(sums, &low, sizeof low);
    memcpy(sums + 4, &high, sizeof high);
    for (int i = 0; i < 4; ++i) memcpy(operands.c[first_lane + i] + half, sums + 2 * i, 8);
  }
}

}  // namespace host
}  // namespace cuda
}  // namespace ral
