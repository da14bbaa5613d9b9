// What the consumers of a Hopper kernel need to know of a block of keys. One warp of the producer
// finds it out for all of them and notes it in shared memory.
#pragma once

#include "core/keys.h"
#include "core/tiles.h"

namespace ral {
namespace cuda {

// A border is a key whose span is not that of the key before it, in the block.
struct alignas(8) KeyNote {
  // kEachKey: spans of one key that follow one another, and that no other block so far has, nor the
  // key after the block.
  enum Borders : uint32_t { kNone, kOne, kMany, kEachKey };
  static constexpr uint32_t kBegins = 4, kHides = 8, kBorder = 16;

  uint32_t bits;       // borders, kBegins, kHides, and from kBorder on the first border
  int32_t first_span;  // of the block's first key; -1 = none

  RAL_DEVICE uint32_t borders() const { return bits % kBegins; }
  RAL_DEVICE int32_t border() const { return int32_t(bits / kBorder); }
  // Whether the block's first key is in another span than the key before it.
  RAL_DEVICE bool begins() const { return (bits & kBegins) != 0; }
  // Whether some keys are padding, or not of the sequence.
  RAL_DEVICE bool hides() const { return (bits & kHides) != 0; }
  // Whether a run of keys in one span ends or begins.
  RAL_DEVICE bool has_borders() const { return bits % kHides != 0; }
  // The note for rows without marginals.
  RAL_DEVICE KeyNote without_spans() const { return {bits & kHides, -1}; }
};

struct alignas(16) NotedKeys {
  KeyNote note;
  uint64_t real, starts;   // of KeyBlock
  int32_t spans[kBlockK];  // of each key; written if there are spans
};

// Notes one block after the other. A warp owns it.
struct KeyNotes {
  int32_t open = -1;     // span of the run that goes on after the blocks so far
  int32_t highest = -1;  // the largest span in them

  // A collective of the warp. next_span: of the key after the block. Others see the note after the
  // warp has synchronised and one of its lanes has arrived at a barrier that they wait for.
  RAL_DEVICE void write(NotedKeys* at, const LoadedKeys& loaded, int32_t next_span) {
    const KeyBlock keys = describe(loaded);
    const int lane = lane_index();
    KeyNote note{~keys.real != 0 ? KeyNote::kHides : 0, -1};
    if (loaded.has_spans) {
      note.first_span = keys.span_of(0);
      const bool begins = note.first_span != open;
      const uint64_t inner = keys.starts & ~uint64_t(1);
      if (begins) note.bits |= KeyNote::kBegins;
      if (inner != 0) note.bits |= uint32_t(lowest_bit(inner)) * KeyNote::kBorder;
      open = keys.span_of(kBlockK - 1);
      const int32_t of_lane = note.first_span + lane;
      const bool follows = keys.low == of_lane && keys.high == of_lane + kWarpSize;
      if (begins && note.first_span > highest && ballot(!follows) == 0 && next_span != open) {
        note.bits |= KeyNote::kEachKey;
      } else if (inner != 0) {
        note.bits |= (inner & (inner - 1)) == 0 ? KeyNote::kOne : KeyNote::kMany;
      }
      highest = maximum(highest, warp_maximum(maximum(keys.low, keys.high)));
      store_shared(&at->spans[lane], keys.low);
      store_shared(&at->spans[lane + kWarpSize], keys.high);
    }
    if (lane == 0) {
      store_shared(&at->note, note);
      store_shared(&at->real, keys.real);
      store_shared(&at->starts, keys.starts);
    }
  }
};

}  // namespace cuda
}  // namespace ral
