// What the register tile alone can do: products whose operands stay in L1, no memory, no
// exponentials. The ceiling that benchmarks hold the ops against.
#pragma once

#include "core/microkernel.h"
#include "core/threads.h"

namespace ral {
namespace RAL_ISA {

template <class Compute>
struct TileRate {
  static constexpr int64_t kSteps = 120;
  alignas(64) uint32_t a[kSteps * kTileRows];
  alignas(64) uint32_t b[kSteps * kPanel];
  int64_t repeats;

  // Floating-point operations of `repeats` tiles a thread.
  static int64_t run(int num_threads, int64_t repeats) {
    static TileRate rate;  // zeros: the processor takes the same time for any finite number
    rate.repeats = repeats;
    parallel_for(num_threads, num_threads, task, &rate);
    return 2 * Compute::kPair * kTileRows * kPanel * kSteps * repeats * num_threads;
  }

 private:
  static void task(void* self, int64_t, int) {
    const TileRate& rate = *static_cast<const TileRate*>(self);
    Vec acc[kTileRows][kTileVectors];
    clear(acc);
    for (int64_t i = 0; i < rate.repeats; ++i) {
      multiply_tile<Compute, AOperand::kPacked, kTileRows, kTileVectors>(acc, rate.a, 0, rate.b,
                                                                         kPanel, kSteps);
    }
    float total = 0.f;
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < kTileVectors; ++v) total += acc[r][v][0];
    }
    volatile float sink = total;  // so that the products are not dead code
    (void)sink;
  }
};

}  // namespace RAL_ISA
}  // namespace ral
