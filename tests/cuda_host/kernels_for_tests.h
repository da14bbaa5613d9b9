// What the kernels of test_harness.py share: their arguments and the list of their bugs.
#pragma once

#include "core/device.h"

namespace ral {
namespace cuda {

// Numbered as the names in test_harness.py; kNone is the correct kernel.
enum class Bug : int32_t {
  kNone,
  kNoBarrier,
  kNoSecondBarrier,
  kWarpBarrierOnly,
  kNoWait,
  kNoCommit,
  kWaitsForTooFew,
  kTouchedInFlight,
  kCopiedTwice,
  kSourceChanges,
  kTooFar,
  kTooLow,
  kReadOnly,
  kMisaligned,
  kNeverWritten,
  kWrongSpace,
  kWrongLane,
  kEndsEarly,
  kOtherCollective,
  kWarpEndsEarly,
  kReadsOthers,
  kWritesOthers,
  kWritesWhatOthersRead,
};

struct Arguments {
  Bug bug;
  const void* a;
  const void* b;
  void* out;
};

template <typename T>
RAL_DEVICE const T* first(const Arguments& arguments) {
  return static_cast<const T*>(arguments.a);
}
template <typename T>
RAL_DEVICE T* result(const Arguments& arguments) {
  return static_cast<T*>(arguments.out);
}

// One warp; the other kernels change what they need to.
struct Warp32 {
  static constexpr int kThreads = 32, kMinBlocks = 1;
  static constexpr int64_t kSharedBytes = 2048;
  using Params = Arguments;
};

}  // namespace cuda
}  // namespace ral
