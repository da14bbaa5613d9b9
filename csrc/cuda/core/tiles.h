// Tiles of 16-bit numbers in shared memory, and their products on the tensor cores.
//
// A warp accumulates 16 kRowTiles rows. Of row tile r and column tile c, lane l holds [r][c][0..3]:
// row l / 4, columns 2 (l % 4) and + 1, then row l / 4 + 8, same columns.
#pragma once

#include "core/device.h"

namespace ral {
namespace cuda {

constexpr int kChunk = 8;  // numbers in 16 bytes: the unit of copies and of ldmatrix

// Columns of the kernels of `attention` for a head dim. Some are wider than it: there they read
// zeros and write nothing. 0: there is no kernel.
inline int32_t kernel_head_dim(int64_t head_dim) {
  if (64 < head_dim && head_dim <= 96 && head_dim % kChunk == 0) return 96;
  return head_dim == 64 || head_dim == 128 ? int32_t(head_dim) : 0;
}

// Rows of kColumns numbers. A chunk's place in its row is XORed with the row's number. So
// ldmatrix, which reads 8 rows of a chunk at once, has no bank conflicts. A row takes whole
// 128-byte lines.
template <typename T, int kColumns>
struct Tile {
  static_assert(kColumns % 16 == 0, "the inner size of mma.sync");
  static constexpr int kStride = (kColumns + 63) / 64 * 64;  // numbers
  static constexpr int kChunks = kStride / kChunk;
  T* data;  // aligned to 128 bytes

  RAL_DEVICE T* at(int row, int chunk) const { return data + offset(row, chunk); }
  static constexpr int bytes(int rows) { return rows * kStride * int(sizeof(T)); }

  // Offset of a chunk, in numbers. Rows 8 apart are 8 kStride apart. So a product forms all its
  // addresses from one number per lane and constants.
  RAL_DEVICE static int offset(int row, int chunk) {
    return row * kStride + (chunk ^ (row & 7)) * kChunk;
  }
  // offset(row, chunk ^ d), from the offset of a chunk below 8. Only the last three bits are
  // swizzled, so 8 chunks are a constant. nvcc spills less without that constant where a warp has
  // 32 rows, and with it where it has 16.
  template <int kRowTiles>
  RAL_DEVICE static int flipped(int offset, int d) {
    constexpr int kSwizzled = kRowTiles == 1 ? 8 : kChunks;
    return (offset ^ d % kSwizzled * kChunk) + d / kSwizzled * (kSwizzled * kChunk);
  }
};

// Whether a chunk of a row is one of the matrix. A tile of 64, 128 or 256 columns has no others,
// unless matrices of fewer columns are put into it (kFewer).
template <bool kFewer, typename T, int kColumns>
RAL_DEVICE bool has_chunk(Tile<T, kColumns> tile, int chunk, int64_t num_columns) {
  return (tile.kStride == kColumns && !kFewer) || chunk * kChunk < num_columns;
}

// Starts copying kRows rows from `rows`, `stride` numbers apart. Rows where `exists(row)` is false,
// and columns from `num_columns` on, become zeros and are not read. Wide rows are copied in bands
// of columns, which begin where the swizzle repeats.
template <int kRows, int kThreads, bool kFewer = false, typename T, int kColumns, typename Exists>
RAL_DEVICE void copy_rows(Tile<T, kColumns> tile, const T* rows, int64_t stride, Exists exists,
                          int64_t num_columns = kColumns) {
  constexpr int kChunks = Tile<T, kColumns>::kChunks, kStride = Tile<T, kColumns>::kStride;
  constexpr int kBand = kChunks < kThreads / 8 ? kChunks : kThreads / 8;
  constexpr int kStep = kThreads / kBand;  // rows that the CTA copies at once
  static_assert(kStep % 8 == 0 && kRows % kStep == 0, "a thread's rows differ by a multiple of 8");
  static_assert(kBand % 8 == 0 && kChunks % kBand == 0, "all bands are swizzled alike");
  const int row = thread_index() / kBand, chunk = thread_index() % kBand;
  T* to = tile.at(row, chunk);
  const T* from = rows + row * stride + chunk * kChunk;
  RAL_UNROLL for (int i = 0; i < kRows; i += kStep) RAL_UNROLL
    for (int c = 0; c < kChunks; c += kBand)
      copy_async(to + i * kStride + c * kChunk, from + i * stride + c * kChunk,
                 has_chunk<kFewer>(tile, chunk + c, num_columns) && exists(row + i));
}

// The lane's load_matrices offset of a 16 x 16 block: rows [row, row + 16), columns 0 to 15.
template <typename T, int kColumns>
RAL_DEVICE int left_offset(Tile<T, kColumns>, int row) {
  const int lane = lane_index();
  return Tile<T, kColumns>::offset(row + lane % 16, lane / 16);
}

template <int kRowTiles, int kColumnTiles>
RAL_DEVICE void clear(float (&sum)[kRowTiles][kColumnTiles][4]) {
  RAL_UNROLL for (int r = 0; r < kRowTiles; ++r) RAL_UNROLL
    for (int c = 0; c < kColumnTiles; ++c) RAL_UNROLL
      for (int e = 0; e < 4; ++e) sum[r][c][e] = 0.0f;
}

// product += a bᵀ, with a's rows from `a_row` on and the first 8 kColumnTiles rows of b.
template <int kRowTiles, int kColumnTiles, typename T, int kColumns>
RAL_DEVICE void add_product_transposed(float (&product)[kRowTiles][kColumnTiles][4],
                                       Tile<T, kColumns> a, int a_row, Tile<T, kColumns> b) {
  const int lane = lane_index();
  const int a_offset = left_offset(a, a_row);
  const int b_offset = Tile<T, kColumns>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  RAL_UNROLL for (int step = 0; step < kColumns / 16; ++step) {
    uint32_t left[kRowTiles][4];
    RAL_UNROLL for (int r = 0; r < kRowTiles; ++r)
      load_matrices(
          left[r], a.data + a.template flipped<kRowTiles>(a_offset, 2 * step) + 16 * r * a.kStride);
    RAL_UNROLL for (int c = 0; c < kColumnTiles; c += 2) {
      uint32_t right[4];  // of column tiles c and c + 1
      load_matrices(right,
                    b.data + b.template flipped<kRowTiles>(b_offset, 2 * step) + 8 * c * b.kStride);
      RAL_UNROLL for (int r = 0; r < kRowTiles; ++r) {
        multiply_add<T>(product[r][c], left[r], right[0], right[1]);
        multiply_add<T>(product[r][c + 1], left[r], right[2], right[3]);
      }
    }
  }
}

// product = a bᵀ, as above.
template <int kRowTiles, int kColumnTiles, typename T, int kColumns>
RAL_DEVICE void multiply_transposed(float (&product)[kRowTiles][kColumnTiles][4],
                                    Tile<T, kColumns> a, int a_row, Tile<T, kColumns> b) {
  clear(product);
  add_product_transposed(product, a, a_row, b);
}

// sum += weights b. The weights [16 kRowTiles, 8 kInnerTiles] are in registers and are rounded to
// T. b has 8 kInnerTiles rows, of which the sum takes the first 8 kColumnTiles columns.
template <int kRowTiles, int kColumnTiles, int kInnerTiles, typename T, int kColumns>
RAL_DEVICE void add_product(float (&sum)[kRowTiles][kColumnTiles][4],
                            const float (&weights)[kRowTiles][kInnerTiles][4],
                            Tile<T, kColumns> b) {
  const int b_offset = left_offset(b, 0);
  RAL_UNROLL for (int step = 0; step < kInnerTiles / 2; ++step) {
    uint32_t left[kRowTiles][4];
    RAL_UNROLL for (int r = 0; r < kRowTiles; ++r) RAL_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float (&pair)[4] = weights[r][2 * step + i / 2];
        left[r][i] = pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
    RAL_UNROLL for (int c = 0; c < kColumnTiles; c += 2) {
      uint32_t right[4];
      load_matrices_transposed(
          right, b.data + b.template flipped<kRowTiles>(b_offset, c) + 16 * step * b.kStride);
      RAL_UNROLL for (int r = 0; r < kRowTiles; ++r) {
        multiply_add<T>(sum[r][c], left[r], right[0], right[1]);
        multiply_add<T>(sum[r][c + 1], left[r], right[2], right[3]);
      }
    }
  }
}

// Writes a warp's rows [row, row + 16 kRowTiles) of a matrix, the lane's i-th row times factor(i).
// A lane holds only 4 adjacent bytes of a row, so rows pass through `stage`. The warp owns the rows
// of `stage` with the same numbers by now. Columns from `num_columns` on are not written.
template <int kRowTiles, bool kFewer = false, typename T, int kColumns, typename Factor>
RAL_DEVICE void store_rows(T* rows, int64_t stride, int row, int num_rows,
                           const float (&values)[kRowTiles][kColumns / 8][4], Factor factor,
                           Tile<T, kColumns> stage, int64_t num_columns = kColumns) {
  const int lane = lane_index();
  sync_warp();
  RAL_UNROLL for (int r = 0; r < kRowTiles; ++r) RAL_UNROLL
    for (int c = 0; c < kColumns / 8; ++c) RAL_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float scale = factor(2 * r + half);
        const int at_row = row + 16 * r + 8 * half + lane / 4;
        T* at = stage.at(at_row, c) + 2 * (lane % 4);
        store_shared(reinterpret_cast<uint32_t*>(at),
                     pack<T>(values[r][c][2 * half] * scale, values[r][c][2 * half + 1] * scale));
      }
  sync_warp();
  constexpr int kChunks = Tile<T, kColumns>::kChunks;
  RAL_UNROLL for (int i = 0; i < 16 * kRowTiles * kChunks / kWarpSize; ++i) {
    const int n = i * kWarpSize + lane;
    const int at_row = row + n / kChunks, chunk = n % kChunks;
    if (at_row < num_rows && has_chunk<kFewer>(stage, chunk, num_columns))
      store_global(reinterpret_cast<Vector16*>(rows + at_row * stride + chunk * kChunk),
                   load_shared(reinterpret_cast<const Vector16*>(stage.at(at_row, chunk))));
  }
}

// Writes a warp's rows [row, row + 16 kRowTiles) of a float32 matrix whose rows have kStride
// numbers. Four lanes write the 32 bytes of a sector.
template <int kStride, int kRowTiles, int kTiles>
RAL_DEVICE void store_float_rows(float* rows, int row, int num_rows,
                                 const float (&values)[kRowTiles][kTiles][4]) {
  const int first = row + lane_index() / 4;
  float* const to = rows + int64_t(first) * kStride + 2 * (lane_index() % 4);
  RAL_UNROLL for (int i = 0; i < 2 * kRowTiles; ++i) {
    if (first + 8 * i >= num_rows) continue;
    RAL_UNROLL for (int c = 0; c < kTiles; ++c) {
      const float (&pair)[4] = values[i / 2][c];
      store_global(reinterpret_cast<Float2*>(to + 8 * i * kStride + 8 * c),
                   Float2{pair[i % 2 * 2], pair[i % 2 * 2 + 1]});
    }
  }
}

// ---- Rows of accumulators -----------------------------------------------------------------------

// Reductions over the four lanes that share a row.
RAL_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
RAL_DEVICE float quad_maximum(float x) {
  x = maximum(x, shuffle_xor(x, 1));
  return maximum(x, shuffle_xor(x, 2));
}

// Over all lanes of a warp.
RAL_DEVICE float warp_sum(float x) {
  RAL_UNROLL for (int mask = 16; mask > 0; mask /= 2)
    x += shuffle_xor(x, mask);
  return x;
}
RAL_DEVICE int32_t warp_maximum(int32_t x) {
  for (int mask = 1; mask < kWarpSize; mask *= 2) x = maximum(x, shuffle_xor(x, mask));
  return x;
}

// Index of the lane's i-th row, of 2 kRowTiles, among the warp's rows.
RAL_DEVICE int row_in_warp(int i) {
  return 8 * i + lane_index() / 4;
}

}  // namespace cuda
}  // namespace ral
