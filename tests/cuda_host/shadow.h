// Which thread touched which bytes when: the memory of the race checks.
//
// A cell remembers, for some neighbouring bytes that were always touched together, the last write
// and as many of the reads since as tell whether any later write is in order with all of them.
// A chunk holds the cells of 16 bytes: one while all accesses are that wide, more after a narrower
// one, again one after a write of the whole. So the answer is exact to the byte.
#pragma once

#include <stdint.h>

#include <string>

#include "harness.h"

namespace ral {
namespace cuda {
namespace host {

// A moment of a thread. `serial` numbers blocks through all launches, so nothing has to be cleared
// between them; 0 is never.
struct Stamp {
  uint32_t serial;
  uint32_t when;  // epoch of the warp, "is a read for the whole warp", thread
  uint32_t site;

  static constexpr int kThreadBits = 10;
  static constexpr uint32_t kWholeWarp = 1u << kThreadBits;
  static constexpr uint32_t kMaxEpoch = 1u << (31 - kThreadBits);

  int thread() const { return int(when & (kWholeWarp - 1)); }
  int warp() const { return thread() / kLanes; }
  bool whole_warp() const { return (when & kWholeWarp) != 0; }
  uint32_t epoch() const { return when >> (kThreadBits + 1); }
};

struct Cell {
  Stamp writer;
  // Two readers in the running block, of different warps if there were such, else different lanes:
  // what comes after both comes after all. Mbarriers order single warps, so with them a third
  // reader may be missed, but never the last.
  Stamp reader, other_reader;
  Stamp reader_of_earlier_block;
};

struct Chunk {
  static constexpr int kBytes = 16;

  // Zeroed memory is a chunk that no thread has touched.
  Cell whole;
  Cell* parts;
  uint8_t log2_parts, log2_capacity;
  // One bit a byte, of global memory.
  uint16_t allowed, writable;
  // Of shared memory: 1 + the thread whose copy will arrive here, and where it was issued.
  uint16_t in_flight;
  uint32_t in_flight_site;
};

enum class Space { kShared, kGlobal };

// An access that is allowed to happen, of bytes of one chunk.
struct Access {
  Space space;
  bool writes;
  uintptr_t address;
  int bytes;
  Stamp stamp;
};

// Checks an access against those before it, reports it if it races or reads what was never
// written, and remembers it.
void record(Chunk& chunk, const Access& access);
// Remembers a write of the whole chunk that was checked before.
void record_arrival(Chunk& chunk, Stamp stamp);
// All global memory counts as untouched from here on; its chunks are gone.
void forget_global_cells();
// Reports an access that conflicts with those before it, without remembering it.
void check(Chunk& chunk, const Access& access);

// The running block's moment for `thread`.
Stamp stamp_of(int thread, Site site, bool whole_warp = false);
// "shared + 64" or "range 2 + 64", of an address that is there.
std::string place_of(Space space, uintptr_t address);

}  // namespace host
}  // namespace cuda
}  // namespace ral
