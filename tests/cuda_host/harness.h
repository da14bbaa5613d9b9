// What host_device.h needs of the simulated block: its threads, their collectives, its memory.
//
// Nothing here knows a kernel's types, so that harness.cpp and its mates are compiled once.
#pragma once

#include <stdint.h>

namespace ral {
namespace cuda {
namespace host {

constexpr int kLanes = 32;

// Where a kernel calls; the compiler fills in default arguments at the place of the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// What a thread has stopped for.
enum class Stop : uint8_t {
  kEnd,
  kSyncBlock,
  kSyncWarp,
  kWarpIndex,
  kShuffle,
  kShuffleXor,
  kShuffleUp,
  kBallot,
  kLoadMatrices,
  kLoadMatricesTransposed,
  kMultiplyAddBf16,
  kMultiplyAddFp16,
};

// The running thread and block; written by the scheduler alone.
#define RAL_HOST_HIDDEN __attribute__((visibility("hidden")))  // so that no table is in between
extern RAL_HOST_HIDDEN int current_thread;
extern RAL_HOST_HIDDEN int64_t current_block;
extern RAL_HOST_HIDDEN int64_t current_num_blocks;
// Which of the bugs that `switched` in build.py put into the kernels is there; 0 is none.
extern RAL_HOST_HIDDEN int seeded_bug;

// ---- Collectives: each returns when every thread that must take part has come -------------------

void sync(Stop kind, Site site);
// The value that lane `source` brought.
uint32_t exchange(Stop kind, uint32_t value, int source, Site site);
uint32_t vote(bool predicate, Site site);
void load_matrices(Stop kind, uint32_t* registers, const void* row, Site site);
void multiply_add(Stop kind, float* c, const uint32_t* a, uint32_t b0, uint32_t b1, Site site);

// ---- Memory -------------------------------------------------------------------------------------

// Check and record an access of the running thread; false, after a report, where the address must
// not be touched.
bool may_read_shared(const void* address, int bytes, Site site);
bool may_write_shared(const void* address, int bytes, Site site);
bool may_read_global(const void* address, int bytes, Site site);
bool may_write_global(const void* address, int bytes, Site site);

uint32_t shared_offset(const void* address, Site site);
void copy_async(void* shared, const void* global, bool valid, Site site);
void commit_copies();
void wait_for_copies(int pending);

// ---- Launch -------------------------------------------------------------------------------------

struct LaunchInfo {
  const char* name;
  int64_t threads;
  int64_t shared_bytes;
  void (*run)(const void* params, char* shared);
};

// 0; 1000 when the launch broke a rule (ral_host_report says which); 1 or 9 when it is refused.
int launch(const LaunchInfo& info, int64_t num_blocks, const void* params);

}  // namespace host
}  // namespace cuda
}  // namespace ral

// ---- For tests, by ctypes -----------------------------------------------------------------------

#define RAL_HOST_API extern "C" __attribute__((visibility("default")))

// Kernels may touch these bytes of global memory.
RAL_HOST_API void ral_host_allow(const void* address, int64_t bytes, int32_t writable);
RAL_HOST_API void ral_host_forget_all();
// Order of lanes, warps and blocks; 0 is ascending.
RAL_HOST_API void ral_host_set_order(uint64_t seed);
RAL_HOST_API void ral_host_seed_bug(int32_t number);
// Text of the violations since the last clear, cut to `size` bytes; returns their number.
RAL_HOST_API int64_t ral_host_report(char* buffer, int64_t size);
RAL_HOST_API void ral_host_clear_report();
