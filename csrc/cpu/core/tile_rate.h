// The rate of the register tile alone: products whose operands stay in L1, without memory traffic
// or exponentials. Benchmarks compare the ops with this ceiling.
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

  // Returns the floating-point operations of `repeats` tiles per thread.
  static int64_t run(int num_threads, int64_t repeats) {
    static TileRate rate;  // zeros: any finite number takes the same time
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
    volatile float sink = total;  // or the products would be dead code
    (void)sink;
  }
};

}  // namespace RAL_ISA
}  // namespace ral
