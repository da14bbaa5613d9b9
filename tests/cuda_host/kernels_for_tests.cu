// Small kernels, each right with Bug::kNone and broken in one way with another bug.
#include "kernels_for_tests.h"

namespace ral {
namespace cuda {
namespace {

// ---- Collectives and numbers --------------------------------------------------------------------

// out [64, 6]: what each collective gives to each thread of two warps.
struct Exchange : Warp32 {
  static constexpr int kThreads = 64;
  static const char* name() { return "exchange"; }
  static RAL_DEVICE void run(const Arguments& arguments, char*) {
    const int thread = thread_index(), lane = lane_index();
    float* const out = result<float>(arguments) + 6 * thread;
    const float value = load_global(first<float>(arguments) + thread);
    store_global(out, shuffle(value, 5 * lane));
    store_global(out + 1, shuffle_xor(value, 9));
    store_global(out + 2, shuffle_up(value, 3));
    store_global(out + 3, float(shuffle(int32_t(lane) - 40, 31 - lane)));
    store_global(out + 4, float(ballot(value > 0.f) >> 16));
    store_global(out + 5, float(warp_index()));
  }
};

// out [16, 32] = a [16, 32] b^T for b [32, 32], by load_matrices alone, and then the product with b
// itself, by load_matrices_transposed.
template <typename T>
struct Product : Warp32 {
  static constexpr int kPitch = 40;  // 16-bit numbers in a row of shared memory
  static constexpr int64_t kSharedBytes = 2 * 48 * kPitch;
  static const char* name() { return "product"; }
  static RAL_DEVICE void run(const Arguments& arguments, char* shared) {
    const int lane = lane_index();
    uint16_t* const tile = reinterpret_cast<uint16_t*>(shared);
    for (int i = lane; i < 48 * 4; i += kWarpSize) {
      const uint16_t* const row = i < 64 ? first<uint16_t>(arguments) + 8 * i
                                         : static_cast<const uint16_t*>(arguments.b) + 8 * (i - 64);
      store_shared(reinterpret_cast<Vector16*>(tile + i / 4 * kPitch + i % 4 * 8),
                   load_global(reinterpret_cast<const Vector16*>(row)));
    }
    sync_warp();
    const int shift = arguments.bug == Bug::kWrongLane ? 1 : 0;
    for (int transposed = 0; transposed < 2; ++transposed)
      for (int n = 0; n < 32; n += 8) {
        float c[4] = {0.f, 0.f, 0.f, 0.f};
        for (int k = 0; k < 32; k += 16) {
          uint32_t a[4], b[4];
          load_matrices(a, tile + (lane % 16) * kPitch + k + lane / 16 * 8);
          if (transposed)
            load_matrices_transposed(b, tile + (16 + k + lane % 16) * kPitch + n);
          else
            load_matrices(b, tile + (16 + n + lane % 8) * kPitch + k + lane / 8 % 2 * 8);
          multiply_add<T>(c, a, b[0 + shift], b[1 - shift]);
        }
        float* const out =
            result<float>(arguments) + transposed * 512 + lane / 4 * 32 + n + 2 * (lane % 4);
        store_global(reinterpret_cast<Float2*>(out), Float2{c[0], c[1]});
        store_global(reinterpret_cast<Float2*>(out + 8 * 32), Float2{c[2], c[3]});
      }
  }
};

// out [32, 6] of a [32] and b [32]: packed and unpacked again, 2^a, log2 a, the larger one.
template <typename T>
struct Numbers : Warp32 {
  static const char* name() { return "numbers"; }
  static RAL_DEVICE void run(const Arguments& arguments, char*) {
    const int lane = lane_index();
    const float a = load_global(first<float>(arguments) + lane);
    const float b = load_global(static_cast<const float*>(arguments.b) + lane);
    float* const out = result<float>(arguments) + 6 * lane;
    const Float2 halves = unpack<T>(pack<T>(a, b));
    store_global(reinterpret_cast<Float2*>(out), halves);
    store_global(out + 2, cuda::exp2(a));
    store_global(out + 3, cuda::log2(a));
    store_global(out + 4, maximum(a, minus_infinity()));
    store_global(out + 5, float(lowest_bit(uint64_t(3) << (lane + 17))));
  }
};

// ---- Order between threads ----------------------------------------------------------------------

// Threads of two warps hand numbers round through shared memory, twice.
struct Hand : Warp32 {
  static constexpr int kThreads = 64;
  static const char* name() { return "hand"; }
  static RAL_DEVICE void run(const Arguments& arguments, char* shared) {
    const Bug bug = arguments.bug;
    const int thread = thread_index();
    float* const numbers = reinterpret_cast<float*>(shared);
    float value = load_global(first<float>(arguments) + thread);
    for (int round = 0; round < 2; ++round) {
      store_shared(numbers + thread, value);
      if (bug == Bug::kWarpBarrierOnly)
        sync_warp();
      else if (bug != Bug::kNoBarrier)
        sync_block();
      value = load_shared(numbers + (thread + 37) % kThreads);
      if (bug != Bug::kNoSecondBarrier) sync_block();
    }
    store_global(result<float>(arguments) + thread, value);
  }
};

// The same within one warp, of 2-byte numbers: neighbours are no concern of each other.
struct HandInWarp : Warp32 {
  static const char* name() { return "hand_in_warp"; }
  static RAL_DEVICE void run(const Arguments& arguments, char* shared) {
    const Bug bug = arguments.bug;
    const int lane = lane_index();
    uint16_t* const numbers = reinterpret_cast<uint16_t*>(shared);
    uint16_t value = load_global(first<uint16_t>(arguments) + lane);
    for (int round = 0; round < 2; ++round) {
      store_shared(numbers + lane, value);
      if (bug != Bug::kNoBarrier)
        sync_warp();
      else
        shuffle(lane, 0);
      value = load_shared(numbers + (lane + 5) % kWarpSize);
      if (bug != Bug::kNoSecondBarrier) sync_warp();
    }
    store_global(result<uint16_t>(arguments) + lane, value);
  }
};

// Rows that lanes write are read by load_matrices, whoever gives their addresses; then the lanes
// write again.
struct Rows : Warp32 {
  static const char* name() { return "rows"; }
  static RAL_DEVICE void run(const Arguments& arguments, char* shared) {
    const int lane = lane_index();
    Vector16* const row = reinterpret_cast<Vector16*>(shared) + lane;
    store_shared(row, load_global(first<Vector16>(arguments) + lane));
    if (arguments.bug != Bug::kNoBarrier) sync_warp();
    uint32_t registers[4];
    load_matrices(registers, row);
    if (arguments.bug != Bug::kNoSecondBarrier) sync_warp();
    for (int i = 0; i < 4; ++i) store_shared(reinterpret_cast<uint32_t*>(row) + i, registers[i]);
    store_global(result<Vector16>(arguments) + lane, load_shared(row));
  }
};

// Every thread writes the same number to the same place, one after the other.
struct SameValue : Warp32 {
  static const char* name() { return "same_value"; }
  static RAL_DEVICE void run(const Arguments& arguments, char* shared) {
    float* const number = reinterpret_cast<float*>(shared);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lane == lane_index()) store_shared(number, 3.f);
      if (arguments.bug != Bug::kNoBarrier) sync_warp();
    }
    store_global(result<float>(arguments) + lane_index(), load_shared(number));
  }
};

// The same through global memory, between two warps.
struct HandInGlobal : Warp32 {
  static constexpr int kThreads = 64;
  static const char* name() { return "hand_in_global"; }
  static RAL_DEVICE void run(const Arguments& arguments, char*) {
    const int thread = thread_index();
    float* const out = result<float>(arguments) + kThreads * block_index();
    store_global(out + thread, load_global(first<float>(arguments) + thread));
    if (arguments.bug != Bug::kNoBarrier) sync_block();
    const float value = load_global(out + (thread + 37) % kThreads);
    if (arguments.bug != Bug::kNoSecondBarrier) sync_block();
    store_global(out + thread, value);
  }
};

// Blocks write neighbouring 2-byte numbers, or each other's.
struct Blocks : Warp32 {
  static const char* name() { return "blocks"; }
  static RAL_DEVICE void run(const Arguments& arguments, char*) {
    uint16_t* const out = result<uint16_t>(arguments);
    const int64_t block = block_index(), other = (block + 1) % num_blocks();
    if (lane_index() != 0) return;
    if (arguments.bug == Bug::kReadsOthers || arguments.bug == Bug::kWritesWhatOthersRead) {
      if (arguments.bug == Bug::kReadsOthers || block % 2 == 0) load_global(out + other);
      if (arguments.bug == Bug::kWritesWhatOthersRead && block % 2 == 0) return;
    }
    if (arguments.bug == Bug::kWritesOthers) store_global(out + other, uint16_t(block));
    store_global(out + block, uint16_t(block));
  }
};

// The last to write wins: what is left tells the order.
struct LastWins : Warp32 {
  static constexpr int kThreads = 128;
  static const char* name() { return "last_wins"; }
  static RAL_DEVICE void run(const Arguments& arguments, char*) {
    store_global(result<int32_t>(arguments) + block_index(), thread_index());
    store_global(result<int32_t>(arguments) + num_blocks(), int32_t(block_index()));
  }
};

// ---- Copies -------------------------------------------------------------------------------------

// Rows copied in two groups, turned round between the lanes, the last one left zero.
struct Copy : Warp32 {
  static constexpr int kThreads = 64;
  static const char* name() { return "copy"; }
  static RAL_DEVICE void run(const Arguments& arguments, char* shared) {
    const Bug bug = arguments.bug;
    const int thread = thread_index();
    Vector16* const rows = reinterpret_cast<Vector16*>(shared);
    const Vector16* const source = first<Vector16>(arguments);
    const int column = bug == Bug::kMisaligned ? 1 : 0;
    const uint32_t* const unaligned = reinterpret_cast<const uint32_t*>(source) + column;
    const bool valid = thread != kThreads - 1;
    if (thread < 32) copy_async(rows + thread, unaligned + 4 * thread, true);
    if (bug == Bug::kCopiedTwice && thread == 31) copy_async(rows + 31, source, true);
    commit_copies();
    if (thread >= 32) copy_async(rows + thread, valid ? source + thread : nullptr, valid);
    if (bug != Bug::kNoCommit) commit_copies();
    if (bug == Bug::kTouchedInFlight) store_shared(rows + thread, Vector16{{0, 0, 0, 0}});
    if (bug == Bug::kSourceChanges && thread == 0)
      store_global(result<int32_t>(arguments), load_global(result<int32_t>(arguments)) + 1);
    if (bug == Bug::kWaitsForTooFew)
      wait_for_copies<1>();
    else if (bug != Bug::kNoWait)
      wait_for_copies<0>();
    if (bug != Bug::kNoBarrier) sync_block();
    const Vector16 row = load_shared(rows + (thread + 37) % kThreads);
    if (bug != Bug::kSourceChanges) store_global(result<Vector16>(arguments) + thread, row);
  }
};

// ---- Scripts ------------------------------------------------------------------------------------

// Each thread does what a [num_blocks, 64, 8, 3] says, step by step: (action, offset, bytes).
struct Script : Warp32 {
  static constexpr int kThreads = 64, kSteps = 8;
  static constexpr int64_t kSharedBytes = 512;
  enum Action { kNothing, kRead, kWrite, kSyncWarp, kSyncBlock, kLoadMatrices };
  static const char* name() { return "script"; }

  template <typename V>
  static RAL_DEVICE void touch(bool writes, bool shared, char* address) {
    V* const place = reinterpret_cast<V*>(address);
    if (writes && shared) store_shared(place, V{});
    if (writes && !shared) store_global(place, V{});
    if (!writes && shared) load_shared(place);
    if (!writes && !shared) load_global(place);
  }

  static RAL_DEVICE void run(const Arguments& arguments, char* shared) {
    const int thread = thread_index();
    const bool in_shared = arguments.out == nullptr;
    char* const memory = in_shared ? shared : result<char>(arguments);
    if (thread < 32)
      store_shared(reinterpret_cast<Vector16*>(shared) + thread, Vector16{{0, 0, 0, 0}});
    sync_block();
    const int32_t* step =
        first<int32_t>(arguments) + (block_index() * kThreads + thread) * kSteps * 3;
    for (int i = 0; i < kSteps; ++i, step += 3) {
      const int action = load_global(step);
      char* const address = memory + load_global(step + 1);
      const int bytes = load_global(step + 2);
      uint32_t registers[4];
      if (action == kSyncWarp) sync_warp();
      if (action == kSyncBlock) sync_block();
      if (action == kLoadMatrices) load_matrices(registers, address);
      if (action != kRead && action != kWrite) continue;
      if (bytes == 1) touch<uint8_t>(action == kWrite, in_shared, address);
      if (bytes == 2) touch<uint16_t>(action == kWrite, in_shared, address);
      if (bytes == 4) touch<float>(action == kWrite, in_shared, address);
      if (bytes == 8) touch<Float2>(action == kWrite, in_shared, address);
      if (bytes == 16) touch<Vector16>(action == kWrite, in_shared, address);
    }
  }
};

// ---- Where memory ends --------------------------------------------------------------------------

// Reverses 32 numbers through shared memory.
struct Ranges : Warp32 {
  static constexpr int64_t kSharedBytes = 128;
  static const char* name() { return "ranges"; }
  static RAL_DEVICE void run(const Arguments& arguments, char* shared) {
    const Bug bug = arguments.bug;
    const int lane = lane_index();
    float* const numbers = reinterpret_cast<float*>(shared);
    const float* const a = first<float>(arguments);
    const int shift = bug == Bug::kTooFar ? 1 : bug == Bug::kTooLow ? -1 : 0;
    float value = load_global(a + lane + shift);
    if (bug == Bug::kReadOnly) store_global(const_cast<float*>(a) + lane, value);
    if (bug == Bug::kWrongSpace) value += load_global(numbers + lane);
    if (bug != Bug::kNeverWritten || lane != 3) store_shared(numbers + lane + shift, value);
    sync_warp();
    value = load_shared(numbers + 31 - lane + shift);
    if (bug == Bug::kMisaligned) {
      const char* const odd = shared + 2 + 4 * (lane % 16);
      value = load_shared(reinterpret_cast<const float*>(odd)) +
              load_global(reinterpret_cast<const float*>(reinterpret_cast<const char*>(a) + 1));
    }
    store_global(result<float>(arguments) + lane + shift, value);
  }
};

// ---- Who comes to a collective ------------------------------------------------------------------

struct Meeting : Warp32 {
  static constexpr int kThreads = 64;
  static const char* name() { return "meeting"; }
  static RAL_DEVICE void run(const Arguments& arguments, char*) {
    const Bug bug = arguments.bug;
    const int thread = thread_index();
    if (bug == Bug::kEndsEarly && thread == 5) return;
    if (bug == Bug::kWarpEndsEarly && thread >= 32) return;
    int value = thread;
    if (bug == Bug::kOtherCollective && thread == 5)
      sync_warp();
    else
      value = shuffle(value, 0);
    sync_block();
    store_global(result<int32_t>(arguments) + block_index() * kThreads + thread, value);
  }
};

struct TooManyThreads : Warp32 {
  static constexpr int kThreads = 1056;
  static const char* name() { return "too_many_threads"; }
  static RAL_DEVICE void run(const Arguments&, char*) {}
};

struct OddThreads : Warp32 {
  static constexpr int kThreads = 48;
  static const char* name() { return "odd_threads"; }
  static RAL_DEVICE void run(const Arguments&, char*) {}
};

struct TooMuchShared : Warp32 {
  static constexpr int64_t kSharedBytes = 227 * 1024 + 16;
  static const char* name() { return "too_much_shared"; }
  static RAL_DEVICE void run(const Arguments&, char*) {}
};

struct Entry {
  const char* name;
  int (*launch)(int64_t num_blocks, const Arguments&, void* stream);
};

const Entry kEntries[] = {
    {"exchange", launch<Exchange>},
    {"product_bf16", launch<Product<Bf16>>},
    {"product_fp16", launch<Product<Fp16>>},
    {"numbers_bf16", launch<Numbers<Bf16>>},
    {"numbers_fp16", launch<Numbers<Fp16>>},
    {"hand", launch<Hand>},
    {"hand_in_warp", launch<HandInWarp>},
    {"rows", launch<Rows>},
    {"same_value", launch<SameValue>},
    {"hand_in_global", launch<HandInGlobal>},
    {"blocks", launch<Blocks>},
    {"last_wins", launch<LastWins>},
    {"script", launch<Script>},
    {"copy", launch<Copy>},
    {"ranges", launch<Ranges>},
    {"meeting", launch<Meeting>},
    {"too_many_threads", launch<TooManyThreads>},
    {"odd_threads", launch<OddThreads>},
    {"too_much_shared", launch<TooMuchShared>},
};

}  // namespace
}  // namespace cuda
}  // namespace ral

// Launches a kernel by name; -1 where there is none of it.
extern "C" __attribute__((visibility("default"))) int launch_for_tests(
    const char* name, int64_t num_blocks, const ral::cuda::Arguments* arguments) {
  for (const ral::cuda::Entry& entry : ral::cuda::kEntries)
    if (strcmp(entry.name, name) == 0) return entry.launch(num_blocks, *arguments, nullptr);
  return -1;
}
