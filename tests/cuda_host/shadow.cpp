#include "shadow.h"

#include <memory>
#include <vector>

#include "block.h"
#include "report.h"

namespace ral {
namespace cuda {
namespace host {
namespace {

// ---- Cells of a chunk ---------------------------------------------------------------------------

// Cells of many chunks, given back all at once.
class CellPool {
 public:
  Cell* take(int count) {
    if (used_ + count > kBlock) {
      blocks_.emplace_back(new Cell[kBlock]);
      used_ = 0;
    }
    used_ += count;
    return &blocks_.back()[used_ - count];
  }
  void give_back_all() {
    blocks_.clear();
    used_ = kBlock;
  }

 private:
  static constexpr int kBlock = 4096;
  std::vector<std::unique_ptr<Cell[]>> blocks_;
  int used_ = kBlock;  // cells of the last block
};

CellPool shared_cells, global_cells;

void split(Chunk& chunk, int log2_parts, Space space) {
  const Cell* const before = chunk.log2_parts == 0 ? &chunk.whole : chunk.parts;
  if (chunk.log2_capacity < log2_parts) {
    chunk.parts = (space == Space::kShared ? shared_cells : global_cells).take(1 << log2_parts);
    chunk.log2_capacity = uint8_t(log2_parts);
  }
  // From the end, as both may be the same cells.
  const int shift = log2_parts - chunk.log2_parts;
  for (int i = (1 << log2_parts) - 1; i >= 0; --i) chunk.parts[i] = before[i >> shift];
  chunk.log2_parts = uint8_t(log2_parts);
}

int log2_of(int power) {
  return __builtin_ctz(unsigned(power));
}

// ---- Order --------------------------------------------------------------------------------------

enum class Gap { kNone, kLanes, kWarps, kBlocks };

// What is missing between an earlier access and one of the running thread.
Gap gap_between(const Stamp& earlier, const Stamp& now, Space space) {
  if (earlier.serial != now.serial) {
    const bool other_block = space == Space::kGlobal && earlier.serial != 0 &&
                             earlier.serial >= block().first_serial_of_launch;
    return other_block ? Gap::kBlocks : Gap::kNone;
  }
  if (earlier.warp() != now.warp()) {
    const Warp& warp = block().warps[size_t(earlier.warp())];
    const bool same_group = earlier.warp() / 4 == now.warp() / 4;
    const bool met =
        earlier.epoch() < warp.block_epoch || (same_group && earlier.epoch() < warp.group_epoch) ||
        earlier.epoch() < block().warps[size_t(now.warp())].seen[earlier.warp()];
    return met ? Gap::kNone : Gap::kWarps;
  }
  if (earlier.epoch() != now.epoch()) return Gap::kNone;
  const bool alone = earlier.thread() == now.thread() && !earlier.whole_warp() && !now.whole_warp();
  return alone ? Gap::kNone : Gap::kLanes;
}

std::string text_of(Gap gap, const Stamp& earlier, bool earlier_wrote, const Access& access) {
  std::string text = block().place() + ": thread " + std::to_string(access.stamp.thread());
  text += format(" (%s) %s %s (%d bytes), which thread %d", to_text(access.stamp.site).c_str(),
                 access.writes ? "writes" : "reads", place_of(access.space, access.address).c_str(),
                 access.bytes, earlier.thread());
  if (gap == Gap::kBlocks)
    text += format(" of block %lld", static_cast<long long>(block().index_of(earlier.serial)));
  text += format(" %s (%s)", earlier_wrote ? "wrote" : "read", to_text(earlier.site).c_str());
  if (gap == Gap::kLanes) text += ", without a sync_warp or sync_block between";
  if (gap == Gap::kWarps) text += ", without a sync_block between";
  return text;
}

bool is_ordered(const Stamp& earlier, bool earlier_wrote, const Access& access) {
  const Gap gap = gap_between(earlier, access.stamp, access.space);
  if (gap == Gap::kNone) return true;
  const char* const kind = gap == Gap::kBlocks ? "race between blocks" : "race";
  report().add({kind, access.stamp.site, earlier.site, int(gap)},
               [&] { return text_of(gap, earlier, earlier_wrote, access); });
  return false;
}

// At most one report for a cell.
bool check_cell(const Cell& cell, const Access& access) {
  if (!access.writes) return is_ordered(cell.writer, true, access);
  return is_ordered(cell.writer, true, access) && is_ordered(cell.reader, false, access) &&
         is_ordered(cell.other_reader, false, access) &&
         is_ordered(cell.reader_of_earlier_block, false, access);
}

void remember_read(Cell& cell, const Stamp& now) {
  const auto other_warp = [&now](const Stamp& reader) {
    return reader.serial == now.serial && reader.warp() != now.warp() &&
           reader.epoch() >= block().warps[size_t(reader.warp())].block_epoch;
  };
  if (cell.reader.serial != now.serial) {
    if (cell.reader.serial != 0) cell.reader_of_earlier_block = cell.reader;
    cell.other_reader = Stamp{};
  } else if (!other_warp(cell.other_reader)) {
    if (other_warp(cell.reader)) {
      cell.other_reader = cell.reader;
    } else if (now.whole_warp() || cell.reader.epoch() != now.epoch() ||
               cell.reader.warp() != now.warp()) {
      cell.other_reader = Stamp{};
    } else if (cell.reader.whole_warp()) {
      return;
    } else if (cell.reader.thread() != now.thread()) {
      cell.other_reader = cell.reader;
    }
  }
  cell.reader = now;
}

void record_in_cell(Cell& cell, const Access& access) {
  const Stamp& now = access.stamp;
  if (!access.writes && cell.reader.serial == now.serial && cell.reader.when == now.when)
    return;  // a write since would have forgotten the reader
  if (!access.writes && access.space == Space::kShared && cell.writer.serial != now.serial) {
    report().add({"uninitialised", now.site, 0, 0}, [&] {
      return block().place() + format(
                                   ": thread %d (%s) reads %s (%d bytes), which this block never "
                                   "wrote",
                                   now.thread(), to_text(now.site).c_str(),
                                   place_of(access.space, access.address).c_str(), access.bytes);
    });
  }
  check_cell(cell, access);
  if (access.writes)
    cell = Cell{now, {}, {}, {}};
  else
    remember_read(cell, now);
}

}  // namespace

Stamp stamp_of(int thread, Site site, bool whole_warp) {
  const uint32_t epoch = block().warps[size_t(thread) / kLanes].epoch;
  return {
      block().serial,
      epoch << (Stamp::kThreadBits + 1) | (whole_warp ? Stamp::kWholeWarp : 0u) | uint32_t(thread),
      number_of(site)};
}

void record(Chunk& chunk, const Access& access) {
  const int needed = log2_of(Chunk::kBytes / access.bytes);
  if (chunk.log2_parts < needed) split(chunk, needed, access.space);
  if (chunk.log2_parts == 0) {
    record_in_cell(chunk.whole, access);
    return;
  }
  const int log2_width = log2_of(Chunk::kBytes) - chunk.log2_parts;
  const int first = int(access.address % Chunk::kBytes) >> log2_width;
  for (int i = 0; i < access.bytes >> log2_width; ++i)
    record_in_cell(chunk.parts[first + i], access);
  if (access.writes && access.bytes == Chunk::kBytes) record_arrival(chunk, access.stamp);
}

void record_arrival(Chunk& chunk, Stamp stamp) {
  chunk.whole = Cell{stamp, {}, {}, {}};
  chunk.log2_parts = 0;
}

void forget_global_cells() {
  global_cells.give_back_all();
}

void check(Chunk& chunk, const Access& access) {
  const int count = 1 << chunk.log2_parts;
  const Cell* const cells = count == 1 ? &chunk.whole : chunk.parts;
  for (int i = 0; i < count; ++i)
    if (!check_cell(cells[i], access)) return;
}

}  // namespace host
}  // namespace cuda
}  // namespace ral
