// Operations on the tiles of the Hopper kernels. A tile is 64 rows of q, k, v or dout in shared
// memory, in panels of 64 columns (hopper/layout.h). A warpgroup holds 64 rows of accumulators.
#pragma once

#include "core/tiles.h"
#include "hopper/instructions.h"

namespace ral {
namespace cuda {

constexpr int kGroupThreads = 4 * kWarpSize;  // a warpgroup

// Starts the TMA copies of a tile. One thread calls it; `full` must expect kPanels * kPanelBytes.
template <int kPanels>
RAL_DEVICE void copy_tile(char* tile, const TensorMap& map, int32_t token, int32_t head,
                          int32_t batch, Barrier* full) {
  for (int panel = 0; panel < kPanels; ++panel)
    copy_panel(tile + panel * kPanelBytes, map, panel * kPanelColumns, token, head, batch, full);
}

// A warpgroup writes zeros to the tile's rows whose bit is set. Swizzling moves chunks only within
// a row.
template <int kPanels>
RAL_DEVICE void clear_rows(char* tile, uint64_t rows) {
  const uint32_t thread = uint32_t(thread_index()) % kGroupThreads;
  const uint32_t row = thread / 2, half = thread % 2;
  if ((rows >> row & 1) == 0) return;
  RAL_UNROLL for (int panel = 0; panel < kPanels; ++panel) RAL_UNROLL
    for (int chunk = 0; chunk < 4; ++chunk)
      clear_shared(tile + panel * kPanelBytes + row * kPanelRowBytes + (half * 4 + chunk) * 16);
}

// Reads a warp's 16 rows of a tile, from row `row` on, as the A operands of a product that
// contracts over columns: one for each 16 columns.
template <typename T, int kSteps>
RAL_DEVICE void load_left(uint32_t (&left)[kSteps][4], char* tile, int row) {
  RAL_UNROLL for (int step = 0; step < kSteps; ++step) {
    const Tile<T, kPanelColumns> panel{reinterpret_cast<T*>(tile + step / 4 * kPanelBytes)};
    load_matrices(left[step], panel.data + (left_offset(panel, row) ^ 2 * (step % 4) * kChunk));
  }
}

// Starts s = a bᵀ, or s += a bᵀ with kAdds, as one group. a, b: shared addresses of tiles of
// kColumns columns.
template <typename T, int kColumns, bool kAdds = false>
RAL_DEVICE void start_all_scores(float (&s)[8][4], uint32_t a, uint32_t b) {
  pin(s);
  begin_products();
  RAL_UNROLL for (int step = 0; step < kColumns / 16; ++step)
    start_scores<T>(s, columns_descriptor(a, step), columns_descriptor(b, step),
                    kAdds || step != 0);
  commit_products();
}

// Starts s = left rightᵀ, or s += .., as one group, with `left` [64, 16 kSteps] in registers.
// Shared memory, which gives the other operand alone, then keeps up with the tensor cores.
template <typename T, bool kAdds = false, int kSteps>
RAL_DEVICE void start_all_scores(float (&s)[8][4], uint32_t (&left)[kSteps][4], uint32_t right) {
  pin(s);
  pin(left);
  begin_products();
  RAL_UNROLL for (int step = 0; step < kSteps; ++step)
    start_scores<T>(s, left[step], columns_descriptor(right, step), kAdds || step != 0);
  commit_products();
}

// Starts sum += left b as one group, with `left` [64, 64] in registers. b: shared address of a tile
// of 8 kTiles columns.
template <typename T, int kTiles>
RAL_DEVICE void start_all_products(float (&sum)[kTiles][4], uint32_t (&left)[4][4], uint32_t b) {
  pin(sum);
  pin(left);
  begin_products();
  RAL_UNROLL for (int step = 0; step < 4; ++step)
    start_product<T>(sum, left[step], rows_descriptor(b, step));
  commit_products();
}

// Rounds accumulators [64, 64] to the A operand of a product. A lane holds the same elements of
// both.
template <typename T>
RAL_DEVICE void round_left(uint32_t (&left)[4][4], const float (&x)[8][4]) {
  RAL_UNROLL for (int step = 0; step < 4; ++step) RAL_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float (&pair)[4] = x[2 * step + i / 2];
      left[step][i] = pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
    }
}

// Encodes the map of q, k, v or dout, which has `columns` columns. A tile may have more: they are
// zeros. Returns null, or the reason why it cannot.
inline const char* encode_tensor(TensorMap& map, const ral_attention_params& call,
                                 const ral_tensor& x, int64_t columns, bool is_of_keys) {
  MapShape shape;
  const char* reason =
      map_shape(x, columns, is_of_keys ? call.seqlen_k : call.seqlen_q,
                is_of_keys ? call.num_kv_heads : call.num_heads, call.batch_size, shape);
  return reason == nullptr ? encode_map(map, call.dtype, x.data, shape) : reason;
}

}  // namespace cuda
}  // namespace ral
