// C functions around csrc/cuda/hopper/layout.h, for tests/native/test_hopper_layout.py.
#include "hopper/layout.h"

using namespace ral::cuda;

extern "C" uint64_t columns(uint32_t tile, int step) {
  return columns_descriptor(tile, step);
}

extern "C" uint64_t rows(uint32_t tile, int step) {
  return rows_descriptor(tile, step);
}

// Null, or why there is no map; sizes and strides as cuTensorMapEncodeTiled gets them.
extern "C" const char* shape_of_map(const ral_tensor* x, const int64_t sizes[4],
                                    uint64_t found[7]) {
  MapShape shape;
  const char* reason = map_shape(*x, sizes[0], sizes[1], sizes[2], sizes[3], shape);
  if (reason != nullptr) return reason;
  for (int i = 0; i < 4; ++i) found[i] = shape.sizes[i];
  for (int i = 0; i < 3; ++i) found[4 + i] = shape.strides[i];
  return nullptr;
}

// stage, parity and parity_before of the n-th user of a ring of four.
extern "C" void turn_of_ring(int n, int32_t found[3]) {
  Ring<4> ring;
  for (int i = 0; i < n; ++i) ring.advance();
  found[0] = ring.stage;
  found[1] = int32_t(ring.parity());
  found[2] = int32_t(ring.parity_before());
}
