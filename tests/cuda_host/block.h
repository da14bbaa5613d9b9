// The block that runs: its threads, warps and shared memory.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "fibers.h"
#include "harness.h"
#include "matrices.h"

namespace ral {
namespace cuda {
namespace host {

constexpr int kMaxWarps = 32;

struct PendingCopy {
  char* to;
  const char* from;  // null: zeros
  char bytes[16];
  int64_t group;
  Site site;
};

struct Thread {
  Fiber fiber;
  Stop stop;
  Site site;
  std::vector<PendingCopy> copies;
  int64_t group;  // that copies issued now belong to
};

// Lanes run one after the other until each has stopped; that is a phase. Then all must have stopped
// for the same thing, which is done, and the next phase begins.
struct Warp {
  int index;
  int num_stopped;
  int first, stride;  // order of the lanes in this phase
  int64_t phase;
  bool at_barrier;
  bool ended;
  // Counts the barriers of the warp and of the block that it has passed; at the last one of the
  // block it became `block_epoch`, at the last one of its warpgroup `group_epoch`.
  uint32_t epoch, block_epoch, group_epoch;
  // What other warps did in epochs before these, it sees through mbarriers.
  uint32_t seen[kMaxWarps];
  // Two sets: a lane may bring its next value before another has fetched this one.
  uint32_t values[2][kLanes];
  const void* rows[kLanes];
  uint32_t* registers[kLanes];
  MultiplyAddOperands operands;

  int lane_at(int position) const { return (first + stride * position) % kLanes; }
};

struct Block {
  const LaunchInfo* info = nullptr;
  const void* params = nullptr;
  // Dynamic shared memory begins some multiple of 128 bytes above the address 0 of all of it.
  char *window = nullptr, *shared = nullptr;
  // What other parts of the harness do when the block is over.
  void (*at_end)(bool is_given_up) = nullptr;
  bool is_given_up = false;
  // Numbers the blocks of all launches in the order in which they ran; 0 is none.
  uint32_t serial = 0, first_serial_of_launch = 1;
  uint64_t order_seed = 0;     // of this launch
  std::vector<int64_t> order;  // block_index of each block of this launch, as they run
  std::vector<Thread> threads;
  std::vector<Warp> warps;

  Warp& warp() { return warps[size_t(current_thread) / kLanes]; }
  Thread& thread() { return threads[size_t(current_thread)]; }
  int64_t index_of(uint32_t serial_of_block) const {
    return order[serial_of_block - first_serial_of_launch];
  }
  // "attention_fwd, block 3"
  std::string place() const;
};

extern RAL_HOST_HIDDEN Block running_block;
inline Block& block() {
  return running_block;
}

// ---- memory.cpp ---------------------------------------------------------------------------------

// Makes shared memory undefined, `shift` multiples of 128 bytes above its begin.
void begin_block_memory(int shift);
// Whether an address of shared memory, as `shared_offset` gives it, is the kernel's.
bool is_shared_address(uint32_t address, int bytes);
// A bulk copy fills these bytes from now on, or has filled them: nobody else may touch them.
void begin_bulk_copy(const void* to, int bytes, Site site);
void end_bulk_copy(const void* to, int bytes);
// False, after a report, for bytes that a copy fills, and for those that are not the kernel's.
bool is_settled(const void* address, int bytes, Site site);
// A copy that has not arrived when its thread ends is reported...
void end_copies(Thread& thread, int index);
// ...but not in a block that was given up.
void drop_copies();
// The 16 bytes of a row of load_matrices, read by the lane `thread`, for its whole warp.
void read_matrix_row(const void* row, uint16_t (&numbers)[8], int thread, Site site);

}  // namespace host
}  // namespace cuda
}  // namespace ral
