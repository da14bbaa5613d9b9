// Intel AMX: eight registers ("tiles") of 16 rows of 64 bytes, and one instruction that adds the
// product of two to a third,
//
//   c[m][n] += sum_k a[m][k] * b[k][n],   m, n, k < 16, a and b pairs of bfloat16, c float32.
//
// It does 2 * 16 * 16 * 32 operations in 16 cycles. Products go through four sums at once, 32 x 32,
// so that each operand read serves twice. Those are the register tiles of microkernel.h, with
// kTileRows of 32. B lies as there; A lies tile by tile: [step of 16 elements][2][16 rows][16].
//
// The code is assembler for two reasons. The intrinsics of GCC 12 take no template argument for a
// tile's number. They also do not declare what they read, so the compiler may move a store past the
// read of its data.
#pragma once

#include "core/compute.h"
#include "core/microkernel.h"

namespace ral {
namespace RAL_ISA {

constexpr int64_t kAmxRows = 16;
constexpr int64_t kAmxElements = kAmxRows * 16;  // per tile
static_assert(kTileRows == 2 * kAmxRows && kLanes == 16, "two tiles of rows, one of a vector");

// Tiles may be used while an AmxScope exists. It leaves no tile state in the thread, because
// oneDNN's kernels bring their own configuration.
class AmxScope {
 public:
  AmxScope() {
    alignas(64) Configuration all{};
    all.palette = 1;
    for (int i = 0; i < 8; ++i) {
      all.row_bytes[i] = 64;
      all.rows[i] = kAmxRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(all));
  }
  ~AmxScope() { asm volatile("tilerelease"); }
  AmxScope(const AmxScope&) = delete;
  AmxScope& operator=(const AmxScope&) = delete;

 private:
  struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

template <int kTile>
RAL_INLINE void amx_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// `ld`: distance of rows, in 32-bit elements.
template <int kTile>
RAL_INLINE void amx_load(const void* from, int64_t ld) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(ld * 4), "i"(kTile) : "memory");
}
template <int kTile>
RAL_INLINE void amx_store(void* to, int64_t ld) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(ld * 4), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
RAL_INLINE void amx_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// The operands of a product of 32 rows and 32 columns, and the length of its contraction.
struct AmxProduct {
  const uint32_t* a;  // rows 0 to 15, `lda` apart
  int64_t lda;
  int64_t a_half;  // from there to rows 16 to 31
  int64_t a_step;  // and to the next 16 elements
  const uint32_t* b;
  int64_t ldb;
  int64_t steps;  // of 16 elements
};
// A as pack_a_rows and pack_a_columns pack it.
RAL_INLINE AmxProduct packed_product(const uint32_t* a, const uint32_t* b, int64_t ldb,
                                     int64_t steps) {
  return AmxProduct{a, kAmxRows, kAmxElements, 2 * kAmxElements, b, ldb, steps};
}

// Tiles 0 to 3, row by row, += A B. `meanwhile` is called after each step. The vector units then
// work while tiles are multiplied, as far as the processor looks ahead.
template <class Meanwhile>
RAL_INLINE void amx_accumulate(const AmxProduct& product, const Meanwhile& meanwhile) {
  const uint32_t* a = product.a;
  const uint32_t* b = product.b;
  for (int64_t step = 0; step < product.steps; ++step) {
    amx_load<4>(a, product.lda);
    amx_load<6>(b, product.ldb);
    amx_multiply<0, 4, 6>();
    amx_load<7>(b + kAmxRows, product.ldb);
    amx_multiply<1, 4, 7>();
    amx_load<5>(a + product.a_half, product.lda);
    amx_multiply<2, 5, 6>();
    amx_multiply<3, 5, 7>();
    a += product.a_step;
    b += kAmxRows * product.ldb;
    meanwhile();
  }
}

// Tiles 0 to 3 to and from 32 rows of 32 numbers.
RAL_INLINE void amx_zero_sums() {
  amx_zero<0>();
  amx_zero<1>();
  amx_zero<2>();
  amx_zero<3>();
}
RAL_INLINE void amx_load_sums(const float* c, int64_t ldc) {
  amx_load<0>(c, ldc);
  amx_load<1>(c + kAmxRows, ldc);
  amx_load<2>(c + kAmxRows * ldc, ldc);
  amx_load<3>(c + kAmxRows * ldc + kAmxRows, ldc);
}
RAL_INLINE void amx_store_sums(float* c, int64_t ldc) {
  amx_store<0>(c, ldc);
  amx_store<1>(c + kAmxRows, ldc);
  amx_store<2>(c + kAmxRows * ldc, ldc);
  amx_store<3>(c + kAmxRows * ldc + kAmxRows, ldc);
}

// c (+)= a b.
template <class Meanwhile>
RAL_INLINE void amx_accumulate_to(float* c, int64_t ldc, bool add, const AmxProduct& product,
                                  const Meanwhile& meanwhile) {
  if (add) {
    amx_load_sums(c, ldc);
  } else {
    amx_zero_sums();
  }
  amx_accumulate(product, meanwhile);
  amx_store_sums(c, ldc);
}

// Pairs of bfloat16 in tiles. Zeros pad rows of features to whole tiles.
struct AmxCompute : BFloat16Compute {
  using Scope = AmxScope;
  static constexpr bool kTilesInMemory = true;
  static constexpr int kStepMultiple = kAmxRows;
  static constexpr int kForwardKeys = 512;  // P^T of two blocks is 256 KiB, a part of L2
  // larger blocks gained little, and leave fewer for the threads
  static constexpr int kBackwardKeys = 192;

  static void load_row(int32_t dtype, const void* src, int64_t features, uint32_t* dst) {
    BFloat16Compute::load_row(dtype, src, features, dst);
    const int64_t written = (features + 1) / 2;
    memset(dst + written, 0, (round_up(written, kStepMultiple) - written) * sizeof(uint32_t));
  }
};

// The products of microkernel.h, with two vectors of columns.
template <>
RAL_INLINE void multiply_group<AmxCompute, 2>(Vec (&acc)[kTileRows][2], const uint32_t* a,
                                              const uint32_t* b, int64_t ldb, int64_t steps) {
  amx_accumulate_to(reinterpret_cast<float*>(acc), 2 * kLanes, false,
                    packed_product(a, b, ldb, steps / kAmxRows), [] {});
}
template <>
RAL_INLINE void accumulate_rows<AmxCompute, AOperand::kPacked, 2>(int64_t, float* c, int64_t ldc,
                                                                  bool add,
                                                                  const Product& product) {
  amx_accumulate_to(c, ldc, add,
                    packed_product(product.a, product.b, product.ldb, product.steps / kAmxRows),
                    [] {});
}
template <>
RAL_INLINE void accumulate_panel<AmxCompute, AOperand::kRowMajor>(int64_t, int64_t columns,
                                                                  float* c, int64_t ldc, bool add,
                                                                  const Product& product) {
  for (int64_t column = 0; column < columns && column < kPanel; column += 2 * kAmxRows) {
    amx_accumulate_to(c + column, ldc, add,
                      AmxProduct{product.a, product.lda, kAmxRows * product.lda, kAmxRows,
                                 product.b + column, product.ldb, product.steps / kAmxRows},
                      [] {});
  }
}

template <>
inline void pack_a_rows<AmxCompute>(const Rows& source, int64_t group, int64_t features,
                                    uint32_t* stage, uint32_t* dst) {
  const int64_t steps = steps_of<AmxCompute>(features);
  for (int r = 0; r < kTileRows; ++r) {
    const char* row = source.row(group * kTileRows + r);
    if (row) {
      AmxCompute::load_row(source.dtype, row, features, stage);
    } else {
      memset(stage, 0, steps * sizeof(uint32_t));
    }
    for (int64_t k = 0; k < steps; k += kAmxRows) {
      memcpy(dst + k * kTileRows + r * kAmxRows, stage + k, kAmxRows * sizeof(uint32_t));
    }
  }
}

// One group is one step of tiles: kTileRows keys are 16 pairs.
template <>
inline void pack_a_columns<AmxCompute>(const Rows& source, int64_t group, int64_t features,
                                       const FeatureRows& layout, uint32_t* stage, uint32_t* dst) {
  const FeatureRows::Place place = layout.find(group * kAmxRows);
  const int64_t padded = layout.groups * kTileRows;
  for (int64_t step = 0; step < kAmxRows; ++step, stage += padded) {
    const int64_t key = group * kTileRows + 2 * step;
    AmxCompute::load_row_pair(source.dtype, source.row(key), source.row(key + 1), features, stage);
    memset(stage + features, 0, (padded - features) * sizeof(uint32_t));
  }
  stage -= kAmxRows * padded;
  for (int64_t g = 0; g < layout.groups; ++g) {
    transpose_block(stage + g * kTileRows, padded, dst + place.offset + g * place.group_stride,
                    kAmxRows, kAmxRows, kTileRows);
  }
}

}  // namespace RAL_ISA
}  // namespace ral
