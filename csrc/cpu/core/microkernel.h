// The microkernel: the register tile of every matrix product of the CPU backend, and its operands.
//
//   acc[m][n] += sum_k a[m][k] * b[k][n],   m < 6, n < V * kLanes, k over 32-bit elements
//
// A is read by broadcasts, either packed ([group of 6 rows][k][6]) or row-major with a stride. B is
// read by whole vectors ([k][n]). A tile of 6 x 4 vectors has 24 independent sums, which hide the
// latency of two FMAs per cycle. 10 loads feed 24 FMAs: on Zen 5, 12 cycles of arithmetic against 5
// of loads.
#pragma once

#include "core/compute.h"

namespace ral {
namespace RAL_ISA {

constexpr int64_t kPanel = kTileVectors * kLanes;  // columns of a full-width tile

enum class AOperand { kPacked, kRowMajor };

template <class Compute, AOperand kA, int M, int V>
RAL_INLINE void multiply_tile(Vec (&acc)[M][V], const uint32_t* a, int64_t lda, const uint32_t* b,
                              int64_t ldb, int64_t steps) {
  for (int64_t k = 0; k < steps; ++k) {
    Vec column[V];
    RAL_UNROLL for (int v = 0; v < V; ++v)
      memcpy(&column[v], b + v * kLanes, sizeof column[v]);
    RAL_UNROLL for (int m = 0; m < M; ++m) {
      const uint32_t element = kA == AOperand::kPacked ? a[m] : a[m * lda];
      RAL_UNROLL for (int v = 0; v < V; ++v)
        Compute::multiply_add(acc[m][v], element, column[v]);
    }
    a += kA == AOperand::kPacked ? kTileRows : 1;
    b += ldb;
  }
}

template <int M, int V>
RAL_INLINE void clear(Vec (&acc)[M][V]) {
  RAL_UNROLL for (int m = 0; m < M; ++m) {
    RAL_UNROLL for (int v = 0; v < V; ++v)
      acc[m][v] = Vec{};
  }
}

// acc = a b, for one packed group of rows.
template <class Compute, int V>
RAL_INLINE void multiply_group(Vec (&acc)[kTileRows][V], const uint32_t* a, const uint32_t* b,
                               int64_t ldb, int64_t steps) {
  clear(acc);
  multiply_tile<Compute, AOperand::kPacked, kTileRows, V>(acc, a, 0, b, ldb, steps);
}

// The operands of a matrix product, and the length of its contraction.
struct Product {
  const uint32_t* a;
  int64_t lda;
  const uint32_t* b;
  int64_t ldb;
  int64_t steps;
};

// Hides from the compiler how p was computed. It would keep the addresses of all rows through a
// loop that needs the registers, and spill them.
RAL_INLINE float* forget_origin(float* p) {
  __asm__("" : "+r"(p));
  return p;
}

// c (+)= a b. The old c is prefetched and added last, because sums that start from it would wait
// for memory.
template <class Compute, AOperand kA, int M, int V>
RAL_NOINLINE void accumulate_tile(float* c, int64_t ldc, bool add, const Product& product) {
  Vec acc[M][V];
  clear(acc);
  if (add) {
    RAL_UNROLL for (int m = 0; m < M; ++m) {
      RAL_UNROLL for (int v = 0; v < V; ++v)
        __builtin_prefetch(c + m * ldc + v * kLanes, 1);
    }
  }
  multiply_tile<Compute, kA, M, V>(acc, product.a, product.lda, product.b, product.ldb,
                                   product.steps);
  c = forget_origin(c);
  if (add) {
    RAL_UNROLL for (int m = 0; m < M; ++m) {
      RAL_UNROLL for (int v = 0; v < V; ++v)
        acc[m][v] += load(c + m * ldc + v * kLanes);
    }
  }
  RAL_UNROLL for (int m = 0; m < M; ++m) {
    RAL_UNROLL for (int v = 0; v < V; ++v)
      store(c + m * ldc + v * kLanes, acc[m][v]);
  }
}

template <class Compute, AOperand kA, int V>
RAL_INLINE void accumulate_rows(int64_t rows, float* c, int64_t ldc, bool add,
                                const Product& product) {
  switch (rows) {
    case 1:
      return accumulate_tile<Compute, kA, 1, V>(c, ldc, add, product);
    case 2:
      return accumulate_tile<Compute, kA, 2, V>(c, ldc, add, product);
    case 3:
      return accumulate_tile<Compute, kA, 3, V>(c, ldc, add, product);
    case 4:
      return accumulate_tile<Compute, kA, 4, V>(c, ldc, add, product);
    case 5:
      return accumulate_tile<Compute, kA, 5, V>(c, ldc, add, product);
    default:
      return accumulate_tile<Compute, kA, 6, V>(c, ldc, add, product);
  }
}

// One panel of at most kPanel columns. Vectors past `columns` are not multiplied.
template <class Compute, AOperand kA>
RAL_INLINE void accumulate_panel(int64_t rows, int64_t columns, float* c, int64_t ldc, bool add,
                                 const Product& product) {
  if (columns > 3 * kLanes && kTileVectors >= 4) {
    accumulate_rows<Compute, kA, kTileVectors>(rows, c, ldc, add, product);
  } else if (columns > 2 * kLanes && kTileVectors >= 4) {
    accumulate_rows<Compute, kA, kTileVectors >= 4 ? 3 : 1>(rows, c, ldc, add, product);
  } else if (columns > kLanes) {
    accumulate_rows<Compute, kA, 2>(rows, c, ldc, add, product);
  } else {
    accumulate_rows<Compute, kA, 1>(rows, c, ldc, add, product);
  }
}

// Prefetches the packed A operand of the next product. A product of few steps at a new address ends
// before the hardware prefetcher has begun.
inline void prefetch_packed(const uint32_t* a, int64_t steps) {
  for (int64_t i = 0; i < steps * kTileRows; i += 16) __builtin_prefetch(a + i);
}

// Rows of a source tensor: `prefix_count` from `prefix`, then `count` from `data`. Rows past the
// end and rows that `real` rules out are null: 0 takes their place, because 0 * NaN is NaN.
struct Rows {
  int32_t dtype;
  const char* data;
  int64_t stride_bytes;
  int64_t count;
  const char* prefix = nullptr;
  int64_t prefix_stride_bytes = 0;
  int64_t prefix_count = 0;
  const uint8_t* real = nullptr;  // 0 = not read; or null

  const char* row(int64_t i) const {
    if (real && i < prefix_count + count && !real[i]) return nullptr;
    if (i < prefix_count) return prefix + i * prefix_stride_bytes;
    i -= prefix_count;
    return i < count ? data + i * stride_bytes : nullptr;
  }
};

constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
// Elements in one row of `features` numbers.
template <class Compute>
constexpr int64_t steps_of(int64_t features) {
  return round_up((features + Compute::kPair - 1) / Compute::kPair, Compute::kStepMultiple);
}

// A operand with the source's rows 6g ... 6g+5, contracted over features: [steps][6].
template <class Compute>
void pack_a_rows(const Rows& source, int64_t group, int64_t features, uint32_t* stage,
                 uint32_t* dst) {
  const int64_t steps = steps_of<Compute>(features);
  for (int r = 0; r < kTileRows; ++r) {
    const char* row = source.row(group * kTileRows + r);
    if (row) {
      Compute::load_row(source.dtype, row, features, stage + r * steps);
    } else {
      memset(stage + r * steps, 0, steps * sizeof(uint32_t));
    }
  }
  for (int64_t k = 0; k < steps; ++k) {
    for (int r = 0; r < kTileRows; ++r) dst[k * kTileRows + r] = stage[r * steps + k];
  }
}

// Layout of an A operand whose rows are features, contracted over a sequence's keys. Blocks of
// `block_steps` steps follow one another, each [feature groups][its steps][6]. So the product with
// a block of keys reads one run of memory, which saves 1 % of the forward's P V (8k keys, Zen 5,
// 2026-11).
struct FeatureRows {
  int64_t groups;
  int64_t total_steps;
  int64_t block_steps;

  template <class Compute>
  static FeatureRows of(int64_t features, int64_t key_groups, int64_t block_key_groups) {
    constexpr int64_t kSteps = kTileRows / Compute::kPair;
    return FeatureRows{round_up(features, kTileRows) / kTileRows, key_groups * kSteps,
                       block_key_groups * kSteps};
  }
  // Offset of group 0 at one step, and the distance from there to the next group.
  struct Place {
    int64_t offset, group_stride;
  };
  Place find(int64_t step) const {
    const int64_t first = step / block_steps * block_steps;
    const int64_t left = total_steps - first;
    return Place{(first * groups + step - first) * kTileRows,
                 (left < block_steps ? left : block_steps) * kTileRows};
  }
};

// Packs the steps of one key group of such an operand.
template <class Compute>
void pack_a_columns(const Rows& source, int64_t group, int64_t features, const FeatureRows& layout,
                    uint32_t* stage, uint32_t* dst) {
  constexpr int64_t kSteps = kTileRows / Compute::kPair;
  const FeatureRows::Place place = layout.find(group * kSteps);
  dst += place.offset;
  memset(stage + features, 0, (layout.groups * kTileRows - features) * sizeof(uint32_t));
  for (int64_t step = group * kSteps; step < (group + 1) * kSteps; ++step, dst += kTileRows) {
    Compute::load_row_pair(source.dtype, source.row(step * Compute::kPair),
                           source.row(step * Compute::kPair + 1), features, stage);
    for (int64_t g = 0; g < layout.groups; ++g) {
      memcpy(dst + g * place.group_stride, stage + g * kTileRows, kTileRows * sizeof(uint32_t));
    }
  }
}

}  // namespace RAL_ISA
}  // namespace ral
