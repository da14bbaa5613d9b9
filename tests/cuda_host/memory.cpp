// Shared and global memory: what may be touched, and the copies from one to the other.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <unordered_map>

#include "block.h"
#include "report.h"
#include "shadow.h"

namespace ral {
namespace cuda {
namespace host {
namespace {

std::string who(int thread, Site site) {
  return block().place() + format(": thread %d (%s) ", thread, to_text(site).c_str());
}

const char* verb(bool writes) {
  return writes ? "writes" : "reads";
}

bool is_aligned(uintptr_t address, int bytes, int thread, bool writes, Site site) {
  if (address % uintptr_t(bytes) == 0) return true;
  report().add({"misaligned", number_of(site), 0, writes}, [&] {
    return who(thread, site) + format("%s %d bytes at an address that is %d above a multiple",
                                      verb(writes), bytes, int(address % uintptr_t(bytes)));
  });
  return false;
}

// ---- Shared memory ------------------------------------------------------------------------------

constexpr int64_t kMaxSharedBytes = 227 * 1024;
constexpr int kBaseStep = 128, kMaxBase = 1024;
alignas(1024) char shared_memory[kMaxBase + kMaxSharedBytes];
Chunk shared_chunks[kMaxSharedBytes / Chunk::kBytes];

int64_t offset_in_shared(uintptr_t address) {
  return int64_t(address - reinterpret_cast<uintptr_t>(block().shared));
}

bool is_shared(uintptr_t address, int bytes) {
  const int64_t offset = offset_in_shared(address);
  return offset >= 0 && offset + bytes <= block().info->shared_bytes;
}

Chunk& shared_chunk(uintptr_t address) {
  return shared_chunks[offset_in_shared(address) / Chunk::kBytes];
}

bool is_in_shared(uintptr_t address, int bytes, int thread, bool writes, Site site) {
  if (is_shared(address, bytes)) return true;
  report().add({"out of range", number_of(site), 0, writes}, [&] {
    return who(thread, site) + format("%s %d bytes at shared + %lld, which has %lld bytes",
                                      verb(writes), bytes,
                                      static_cast<long long>(offset_in_shared(address)),
                                      static_cast<long long>(block().info->shared_bytes));
  });
  return false;
}

void report_in_flight(const Chunk& chunk, uintptr_t address, int thread, const char* does,
                      Site site) {
  report().add({"in flight", number_of(site), chunk.in_flight_site, does[0]}, [&] {
    return who(thread, site) +
           format("%s shared + %lld, while the copy of thread %d (%s) to it is in flight", does,
                  static_cast<long long>(offset_in_shared(address)), chunk.in_flight - 1,
                  to_text(chunk.in_flight_site).c_str());
  });
}

bool may_touch_shared(const void* pointer, int bytes, int thread, bool writes, bool whole_warp,
                      Site site) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (!is_in_shared(address, bytes, thread, writes, site) ||
      !is_aligned(address, bytes, thread, writes, site))
    return false;
  Chunk& chunk = shared_chunk(address);
  if (chunk.in_flight != 0) {
    report_in_flight(chunk, address, thread, verb(writes), site);
    return true;
  }
  record(chunk, {Space::kShared, writes, address, bytes, stamp_of(thread, site, whole_warp)});
  return true;
}

// ---- Global memory ------------------------------------------------------------------------------

struct Range {
  uintptr_t first, end;
  bool writable;
};

constexpr uintptr_t kPageBytes = 4096;

// Chunks are made where kernels come by, so that a range may be larger than memory.
struct Page {
  uint64_t version;  // of `ranges` that the chunks' permissions are of
  Chunk chunks[kPageBytes / Chunk::kBytes];
};

struct FreePage {
  void operator()(Page* page) const { free(page); }
};

std::vector<Range> ranges;
uint64_t ranges_version = 1;
std::unordered_map<uintptr_t, std::unique_ptr<Page, FreePage>> pages;

struct KnownPage {
  uintptr_t number = 0;
  Page* page = nullptr;
};
KnownPage known_pages[256];

void permit(Page& page, uintptr_t number) {
  page.version = ranges_version;
  for (Chunk& chunk : page.chunks) chunk.allowed = chunk.writable = 0;
  for (const Range& range : ranges) {
    const uintptr_t start = number * kPageBytes;
    const uintptr_t first = std::max(range.first, start);
    const uintptr_t end = std::min(range.end, start + kPageBytes);
    for (uintptr_t address = first; address < end; ++address) {
      Chunk& chunk = page.chunks[(address - start) / Chunk::kBytes];
      const uint16_t bit = uint16_t(1u << address % Chunk::kBytes);
      chunk.allowed |= bit;
      if (range.writable) chunk.writable |= bit;
    }
  }
}

Chunk& global_chunk(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  KnownPage& known = known_pages[number % (sizeof known_pages / sizeof *known_pages)];
  if (known.number != number || known.page == nullptr) {
    std::unique_ptr<Page, FreePage>& page = pages[number];
    if (page == nullptr) page.reset(static_cast<Page*>(calloc(1, sizeof(Page))));
    if (page == nullptr) abort();
    known = {number, page.get()};
  }
  if (known.page->version != ranges_version) permit(*known.page, number);
  return known.page->chunks[address % kPageBytes / Chunk::kBytes];
}

// The range that holds or is nearest to an address; null if there is none.
const Range* nearest_range(uintptr_t address) {
  const Range* nearest = nullptr;
  uintptr_t least = UINTPTR_MAX;
  for (const Range& range : ranges) {
    if (range.first == range.end) continue;
    const uintptr_t distance = address < range.first ? range.first - address
                               : address < range.end ? 0
                                                     : address - range.end + 1;
    if (distance < least) {
      least = distance;
      nearest = &range;
    }
  }
  return nearest;
}

void report_forbidden(uintptr_t address, int bytes, int thread, bool writes, bool read_only,
                      Site site) {
  const Range* const range = nearest_range(address);
  std::string text;
  if (is_shared(address, 1))
    text +=
        format("shared + %lld as global memory", static_cast<long long>(offset_in_shared(address)));
  else if (range == nullptr)
    text += "an address while no range is allowed";
  else
    text += format("range %d + %lld, which has %lld bytes", int(range - ranges.data()),
                   static_cast<long long>(address - range->first),
                   static_cast<long long>(range->end - range->first));
  const int range_number = range == nullptr ? -1 : int(range - ranges.data());
  report().add({read_only ? "read-only" : "out of range", number_of(site), 0, range_number}, [&] {
    return who(thread, site) + format("%s %d bytes at ", verb(writes), bytes) + text;
  });
}

bool may_touch_global(const void* pointer, int bytes, int thread, bool writes, Site site) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (!is_aligned(address, bytes, thread, writes, site)) return false;
  Chunk& chunk = global_chunk(address);
  const uint32_t mask = ((1u << bytes) - 1) << address % Chunk::kBytes;
  const bool allowed = (chunk.allowed & mask) == mask;
  if (!allowed || (writes && (chunk.writable & mask) != mask)) {
    report_forbidden(address, bytes, thread, writes, allowed, site);
    return false;
  }
  record(chunk, {Space::kGlobal, writes, address, bytes, stamp_of(thread, site)});
  return true;
}

// ---- Copies -------------------------------------------------------------------------------------

void arrive(const PendingCopy& copy) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(copy.to);
  Chunk& chunk = shared_chunk(address);
  chunk.in_flight = 0;
  memcpy(copy.to, copy.bytes, sizeof copy.bytes);
  record_arrival(chunk, stamp_of(current_thread, copy.site));
  // The GPU reads the source at any time in between.
  if (copy.from != nullptr && memcmp(copy.from, copy.bytes, sizeof copy.bytes) != 0)
    report().add({"in flight", number_of(copy.site), 0, 0}, [&] {
      return who(current_thread, copy.site) +
             "copies a source that changed before the copy was waited for";
    });
}

}  // namespace

bool may_read_shared(const void* address, int bytes, Site site) {
  return may_touch_shared(address, bytes, current_thread, false, false, site);
}

bool may_write_shared(const void* address, int bytes, Site site) {
  return may_touch_shared(address, bytes, current_thread, true, false, site);
}

bool may_read_global(const void* address, int bytes, Site site) {
  return may_touch_global(address, bytes, current_thread, false, site);
}

bool may_write_global(const void* address, int bytes, Site site) {
  return may_touch_global(address, bytes, current_thread, true, site);
}

// All lanes get a part of the row, so an access of any other lane has to be in order with it.
void read_matrix_row(const void* row, uint16_t (&numbers)[8], int thread, Site site) {
  if (may_touch_shared(row, int(sizeof numbers), thread, false, true, site))
    memcpy(numbers, row, sizeof numbers);
  else
    memset(numbers, 0xff, sizeof numbers);
}

uint32_t shared_offset(const void* pointer, Site site) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  // One past the end is an address, too.
  if (!is_shared(address, 0))
    report().add({"out of range", number_of(site), 0, 0}, [&] {
      return who(current_thread, site) + "takes the address in shared memory of what is not there";
    });
  return uint32_t(address - reinterpret_cast<uintptr_t>(shared_memory));
}

bool is_shared_address(uint32_t address, int bytes) {
  return is_shared(reinterpret_cast<uintptr_t>(shared_memory) + address, bytes);
}

void begin_bulk_copy(const void* to, int bytes, Site site) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(to);
  for (uintptr_t address = first; address < first + uintptr_t(bytes); address += Chunk::kBytes) {
    Chunk& chunk = shared_chunk(address);
    if (chunk.in_flight != 0) report_in_flight(chunk, address, current_thread, "copies to", site);
    chunk.in_flight = uint16_t(1 + current_thread);
    chunk.in_flight_site = number_of(site);
  }
}

void end_bulk_copy(const void* to, int bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(to);
  // Written before anything that the block's threads do after their first sync_block: the order of
  // reads after a copy is that of its mbarrier.
  const Stamp begin_of_block{block().serial, 0, 0};
  for (uintptr_t address = first; address < first + uintptr_t(bytes); address += Chunk::kBytes) {
    Chunk& chunk = shared_chunk(address);
    chunk.in_flight = 0;
    record_arrival(chunk, begin_of_block);
  }
}

bool is_settled(const void* pointer, int bytes, Site site) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (!is_in_shared(address, bytes, current_thread, true, site)) return false;
  const Chunk& chunk = shared_chunk(address);
  if (chunk.in_flight == 0) return true;
  report_in_flight(chunk, address, current_thread, verb(true), site);
  return false;
}

void copy_async(void* shared, const void* global, bool valid, Site site) {
  Thread& thread = block().thread();
  PendingCopy copy = {static_cast<char*>(shared), nullptr, {}, thread.group, site};
  const int bytes = int(sizeof copy.bytes);
  const uintptr_t address = reinterpret_cast<uintptr_t>(shared);
  if (valid) {
    if (may_touch_global(global, bytes, current_thread, false, site)) {
      copy.from = static_cast<const char*>(global);
      memcpy(copy.bytes, global, sizeof copy.bytes);
    } else {
      memset(copy.bytes, 0xff, sizeof copy.bytes);
    }
  }
  if (!is_in_shared(address, bytes, current_thread, true, site) ||
      !is_aligned(address, bytes, current_thread, true, site))
    return;
  Chunk& chunk = shared_chunk(address);
  if (chunk.in_flight != 0) {
    report_in_flight(chunk, address, current_thread, "copies to", site);
    return;
  }
  const Stamp stamp = stamp_of(current_thread, site);
  check(chunk, {Space::kShared, true, address, bytes, stamp});
  chunk.in_flight = uint16_t(1 + current_thread);
  chunk.in_flight_site = stamp.site;
  thread.copies.push_back(copy);
}

void commit_copies() {
  ++block().thread().group;
}

// Groups end by commit_copies: copies issued after the last one are never waited for here.
void wait_for_copies(int pending) {
  Thread& thread = block().thread();
  const int64_t arrived = thread.group - pending;
  size_t left = 0;
  for (const PendingCopy& copy : thread.copies) {
    if (copy.group < arrived)
      arrive(copy);
    else
      thread.copies[left++] = copy;
  }
  thread.copies.resize(left);
}

void begin_block_memory(int shift) {
  // Aligned to 128 bytes, but to no more: a kernel may not rely on it.
  block().window = shared_memory;
  block().shared = shared_memory + kBaseStep * (1 + shift % (kMaxBase / kBaseStep));
  // NaN in every format. What the last block left counts as never written: its serial has passed.
  memset(block().shared, 0xff, size_t(block().info->shared_bytes));
}

void end_copies(Thread& thread, int index) {
  for (const PendingCopy& copy : thread.copies) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(copy.to);
    report_in_flight(shared_chunk(address), address, index, "ends without waiting for", copy.site);
    shared_chunk(address).in_flight = 0;
  }
  thread.copies.clear();
}

void drop_copies() {
  for (Thread& thread : block().threads) {
    for (const PendingCopy& copy : thread.copies)
      shared_chunk(reinterpret_cast<uintptr_t>(copy.to)).in_flight = 0;
    thread.copies.clear();
  }
}

std::string place_of(Space space, uintptr_t address) {
  if (space == Space::kShared)
    return format("shared + %lld", static_cast<long long>(offset_in_shared(address)));
  const Range* const range = nearest_range(address);
  return format("range %d + %lld", int(range - ranges.data()),
                static_cast<long long>(address - range->first));
}

}  // namespace host
}  // namespace cuda
}  // namespace ral

using namespace ral::cuda::host;

void ral_host_allow(const void* address, int64_t bytes, int32_t writable) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(address);
  ranges.push_back({first, first + uintptr_t(std::max(bytes, int64_t(0))), writable != 0});
  ++ranges_version;
}

void ral_host_forget_all() {
  ranges.clear();
  pages.clear();
  forget_global_cells();
  for (KnownPage& known : known_pages) known = {};
  ++ranges_version;
}
