// The names of csrc/cuda/hopper/instructions.h for the host compiler: see README.md. Included by
// hopper/instructions.h alone.
//
// What runs beside the threads on a GPU runs here as badly timed as it may. A copy spoils its panel
// with NaN when it is issued, and arrives at once or at some later time; a product is computed, and
// reads its registers and its shared memory, when it is issued or when it is waited for. Which of
// them, the order of threads decides (set_order; 0 would wait for ever).
//
// Luck must not hide a fault. So a product counts as running until it is waited for, whenever it
// was computed: an arrival remembers the panels that the warp's running products read, and
// registers are compared with what they held when they were pinned, issued or computed.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <deque>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "block.h"
#include "report.h"

namespace ral {
namespace cuda {

struct TensorMap {
  const char* data;
  MapShape shape;
};

// Of 8 bytes, as on the GPU.
struct Barrier {
  uint8_t arrivals, pending, parity, begun;  // parity: of the phase that is not over
  int32_t bytes;                             // that are still to come
};

namespace host {

constexpr int kPanelSize = 64 * 128;

struct Copy {
  char* panel;
  const TensorMap* map;
  int32_t at[4];
  Barrier* barrier;
};

struct Product {
  bool is_bf16, accumulate;
  float (*sum)[4];
  int num_tiles;
  const uint32_t* left;  // in registers; null: in shared memory, as `a` says
  uint64_t a;
  bool b_is_k_major;
  uint64_t b;
  Site site;
};

// Registers of a lane and what they must hold.
struct Kept {
  const void* at;
  std::vector<char> bytes;

  Kept(const void* first, size_t size) : at(first) { take(size); }
  void take(size_t size) {
    const char* const from = static_cast<const char*>(at);
    bytes.assign(from, from + size);
  }
  bool covers(const void* first, size_t size) const {
    const char *const mine = static_cast<const char*>(at), *const its =
                                                               static_cast<const char*>(first);
    return its >= mine && its + size <= mine + bytes.size();
  }
  // Of a part that it covers.
  bool holds(const void* first, size_t size) const {
    const ptrdiff_t offset = static_cast<const char*>(first) - static_cast<const char*>(at);
    return memcmp(first, bytes.data() + offset, size) == 0;
  }
};

// Of the last one that covers it; null if none does.
inline Kept* find(std::vector<Kept>& all, const void* first, size_t size) {
  for (size_t i = all.size(); i > 0; --i)
    if (all[i - 1].covers(first, size)) return &all[i - 1];
  return nullptr;
}

// Addresses in shared memory.
struct Bytes {
  uint32_t first, end;
  bool meets(const Bytes& other) const { return first < other.end && other.first < end; }
};

struct Group {
  std::deque<Product> to_compute;
  std::vector<Bytes> reads;            // of all its products
  std::vector<const void*> registers;  // theirs
};

struct HopperLane {
  std::deque<Group> groups{1};               // that run; the last one is not committed yet
  std::vector<Kept> pinned, running;         // registers
  std::map<const Barrier*, int64_t> passed;  // phases of barriers that it has waited for
  const Barrier* waited_for = nullptr;       // the last one
  bool begun = false;
  bool unpublished = false;  // it has stored what the async proxy does not see yet
};

// A barrier's past: its phases that are over, what warps had done before they arrived (up to which
// epoch of each warp), and what products were still to read then.
struct History {
  int64_t phases = 0;
  uint32_t arrived[kMaxWarps] = {}, over[kMaxWarps] = {};  // in all phases, in those that are over
  std::vector<Bytes> read_in_this_phase, read_in_the_last;
};

// The last copy to a panel, which has arrived once that phase of the barrier is over.
struct Filling {
  const Barrier* barrier;
  int64_t phase;
};

struct Hopper {
  std::deque<Copy> copies;
  std::vector<HopperLane> lanes{1024};
  std::map<const Barrier*, History> barriers;
  std::map<uint32_t, Filling> panels;  // by address
  int met[16] = {};                    // warps that came to a group's barrier
};

// Two things that a block does not begin anew.
RAL_HOST_HIDDEN inline uint64_t& hopper_random() {
  static uint64_t state = 0;
  return state;
}
RAL_HOST_HIDDEN inline bool& hopeless() {  // somebody in this launch has waited for ever
  static bool state = false;
  return state;
}

// Of the running block. Hidden: one for each library.
RAL_HOST_HIDDEN inline Hopper& hopper() {
  static Hopper state;
  if (block().at_end == nullptr) {
    state = Hopper();
    if (block().serial == block().first_serial_of_launch) {
      hopeless() = false;
      hopper_random() = block().order_seed;
    }
    block().at_end = [](bool is_given_up) {
      bool unfinished = !state.copies.empty();
      for (const Copy& copy : state.copies) end_bulk_copy(copy.panel, kPanelSize);
      for (const HopperLane& lane : state.lanes)
        unfinished = unfinished || lane.groups.size() > 1 || !lane.groups[0].reads.empty();
      if (unfinished && !is_given_up)
        report().add({"hopper", 0, 0, 0}, [] {
          return block().place() + ": the block ended with copies or products running";
        });
    };
  }
  return state;
}

inline uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
inline bool toss() {
  return mixed(hopper_random() += 0x9e3779b97f4a7c15u) & 1;
}

inline void complain(const char* what, Site site) {
  report().add({"hopper", number_of(site), 0, 0},
               [&] { return block().place() + ": " + to_text(site) + ": " + what; });
}

// ---- Barriers -----------------------------------------------------------------------------------

inline void end_phase(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.parity ^= 1;
  barrier.pending = barrier.arrivals;
  History& history = hopper().barriers[&barrier];
  ++history.phases;
  std::copy_n(history.arrived, kMaxWarps, history.over);
  history.read_in_the_last.swap(history.read_in_this_phase);
  history.read_in_this_phase.clear();
}

// What the arriving lane may pass on: all that its warp did before it last synchronised, and what
// the warp itself sees of others.
inline void release(History& history) {
  const std::vector<Warp>& warps = block().warps;
  const Warp& warp = block().warp();
  for (size_t other = 0; other < warps.size(); ++other) {
    uint32_t before = warp.seen[other];
    if (int(other) / 4 == warp.index / 4) before = std::max(before, warps[other].group_epoch);
    if (int(other) == warp.index) before = warp.epoch;
    history.arrived[other] = std::max(history.arrived[other], before);
  }
}
inline void acquire(const History& history) {
  uint32_t* const seen = block().warp().seen;
  for (int other = 0; other < kMaxWarps; ++other)
    seen[other] = std::max(seen[other], history.over[other]);
}

// Waits until it is so for lane 0 of the warp. False, after a report, once that is hopeless.
template <typename IsSo>
bool waits_until(Site site, const IsSo& is_so) {
  constexpr int kPatience = 20000;
  for (int i = 0; exchange(Stop::kShuffle, is_so(), 0, site) == 0; ++i) {
    if (i == kPatience) complain("waits for ever", site);
    if (i >= kPatience || hopeless()) {
      hopeless() = true;
      return false;
    }
  }
  return true;
}

// False, after a report, for memory that is no barrier.
inline bool has_begun(const Barrier& barrier, Site site) {
  if (barrier.begun == 1) return true;
  complain("a barrier that has not begun", site);
  return false;
}

// ---- Copies -------------------------------------------------------------------------------------

inline float number(const uint16_t* at, bool is_bf16) {
  return is_bf16 ? float_of_bf16(*at) : float_of_fp16(*at);
}

// CU_TENSOR_MAP_SWIZZLE_128B, as the CUDA programming guide draws it.
inline void do_copy(const Copy& copy) {
  const MapShape& shape = copy.map->shape;
  const auto inside = [&](int dimension, int64_t at) {
    return at >= 0 && at < int64_t(shape.sizes[dimension]);
  };
  for (int row = 0; row < 64; ++row)
    for (int chunk = 0; chunk < 8; ++chunk) {
      char* to = copy.panel + 128 * row + 16 * (chunk ^ (row & 7));
      const int64_t column = copy.at[0] + 8 * chunk, token = int64_t(copy.at[1]) + row;
      memset(to, 0, 16);
      if (!inside(0, column) || !inside(1, token) || !inside(2, copy.at[2]) ||
          !inside(3, copy.at[3]))
        continue;
      const char* from = copy.map->data + 2 * column + token * int64_t(shape.strides[0]) +
                         copy.at[2] * int64_t(shape.strides[1]) +
                         copy.at[3] * int64_t(shape.strides[2]);
      if (may_read_global(from, 16, Site::here())) memcpy(to, from, 16);
    }
  end_bulk_copy(copy.panel, kPanelSize);
  copy.barrier->bytes -= kPanelSize;
  end_phase(*copy.barrier);
}

inline void do_some_copy() {
  std::deque<Copy>& copies = hopper().copies;
  if (copies.empty() || !toss()) return;
  const size_t which = mixed(hopper_random()) % copies.size();
  const Copy copy = copies[which];
  copies.erase(copies.begin() + long(which));
  do_copy(copy);
}

// ---- Products -----------------------------------------------------------------------------------

// Element of an operand in shared memory, by the canonical layouts with 128-byte swizzle (PTX ISA,
// "Strides"; cute/atom/mma_traits_sm90_gmma.hpp), here in bytes:
//   K-major:  ((8, m), 16) : ((128, stride), 2)     MN-major: ((64, m), (8, 2)) : ((2, lead), (128,
//   stride))
// with bits 4 to 6 of the address xored with bits 7 to 9.
inline const uint16_t* element(uint64_t descriptor, bool k_major, int mn, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
  const uint32_t lead = uint32_t(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t m = uint32_t(mn), n = uint32_t(k);
  uint32_t at = start + (k_major ? m % 8 * 128 + m / 8 * stride + 2 * n
                                 : m % 64 * 2 + m / 64 * lead + n % 8 * 128 + n / 8 * stride);
  at ^= at >> 3 & 0x70;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0 || !is_shared_address(at, 2)) {
    complain("a descriptor without 128-byte swizzle, or beyond shared memory", Site::here());
    return reinterpret_cast<const uint16_t*>(block().shared);
  }
  return reinterpret_cast<const uint16_t*>(block().window + at);
}

// What a product reads of shared memory. Swizzling moves chunks only within 128 bytes.
inline void add_reads(const Product& product, std::vector<Bytes>& reads) {
  const auto start_of = [](uint64_t operand) { return (uint32_t(operand & 0x3fff) << 4) & ~127u; };
  const auto add_panel = [&](uint32_t at) { reads.push_back({at, at + kPanelSize}); };
  const uint32_t first = start_of(product.b);
  if (product.left == nullptr) add_panel(start_of(product.a));
  if (product.b_is_k_major) return add_panel(first);
  const uint32_t lead = uint32_t(product.b >> 16 & 0x3fff) << 4;
  for (uint32_t panel = 0; panel < uint32_t(product.num_tiles) / 8; ++panel)
    reads.push_back({first + panel * lead, first + panel * lead + 16 * 128});
}

// Whether the warp has waited for the copies to what it reads, and they have arrived.
inline void compare_panels(const HopperLane& lane, const std::vector<Bytes>& reads, Site site) {
  const Hopper& state = hopper();
  for (const auto& [address, filling] : state.panels) {
    const Bytes panel = {address, address + kPanelSize};
    if (std::none_of(reads.begin(), reads.end(), [&](const Bytes& x) { return x.meets(panel); }))
      continue;
    const auto passed = lane.passed.find(filling.barrier);
    if (passed == lane.passed.end() || passed->second <= filling.phase)
      complain("a product reads a panel whose copy its warp has not waited for", site);
    for (const Copy& copy : state.copies)
      if (copy.panel == block().window + address)
        complain("a product reads a panel whose copy has not arrived", site);
  }
}

// ---- Registers of products ----------------------------------------------------------------------

inline size_t sum_bytes(const Product& product) {
  return size_t(product.num_tiles) * sizeof(float[4]);
}
constexpr size_t kLeftBytes = 4 * sizeof(uint32_t);

// Compares a running product's registers with what they were left at.
inline void compare_running(const HopperLane& lane, const void* registers, size_t size, Site site) {
  for (const Kept& kept : lane.running)
    if (kept.covers(registers, size) && !kept.holds(registers, size))
      complain("registers were written while a product ran on them", site);
}

// Products have been waited for: registers that no other one uses are the thread's again.
inline void end_running(HopperLane& lane, Site site) {
  const auto is_over = [&](const Kept& kept) {
    for (const Group& group : lane.groups)
      for (const void* registers : group.registers)
        if (registers == kept.at) return false;
    return true;
  };
  for (const Kept& kept : lane.running)
    if (is_over(kept)) compare_running(lane, kept.at, kept.bytes.size(), site);
  lane.running.erase(std::remove_if(lane.running.begin(), lane.running.end(), is_over),
                     lane.running.end());
}

// Registers of a product that starts: pinned and left alone since, or of a product that runs.
inline void begin_running(HopperLane& lane, const void* registers, size_t size, Site site) {
  if (find(lane.running, registers, size) != nullptr)
    return compare_running(lane, registers, size, site);
  const Kept* const pinned = find(lane.pinned, registers, size);
  if (pinned == nullptr)
    complain("registers of a product that were not pinned", site);
  else if (!pinned->holds(registers, size))
    complain("registers were written after they were pinned for a product", site);
  lane.running.emplace_back(registers, size);
}

inline void do_product(const Product& product) {
  const int lane = current_thread % kLanes, warp = current_thread / kLanes % 4;
  HopperLane& mine = hopper().lanes[size_t(current_thread)];
  compare_running(mine, product.sum, sum_bytes(product), product.site);
  if (product.left != nullptr) compare_running(mine, product.left, kLeftBytes, product.site);
  float left[2][16];  // rows lane / 4 and + 8
  for (int k = 0; k < 16; ++k)
    for (int half = 0; half < 2; ++half) {
      if (product.left == nullptr) {
        const int row = 16 * warp + lane / 4 + 8 * half;
        left[half][k] = number(element(product.a, true, row, k), product.is_bf16);
        continue;
      }
      const int owner = lane / 4 * 4 + k % 8 / 2;
      const uint32_t pair =
          exchange(Stop::kShuffle, product.left[half + k / 8 * 2], owner, Site::here());
      // k is even: the register that the owner sends does not depend on k's last bit
      const uint16_t bits = uint16_t(pair >> (k % 2 * 16));
      left[half][k] = number(&bits, product.is_bf16);
    }
  for (int c = 0; c < product.num_tiles; ++c)
    for (int e = 0; e < 2; ++e) {
      const int column = 8 * c + 2 * (lane % 4) + e;
      float right[16];
      for (int k = 0; k < 16; ++k)
        right[k] = number(element(product.b, product.b_is_k_major, column, k), product.is_bf16);
      for (int half = 0; half < 2; ++half) {
        float& sum = product.sum[c][2 * half + e];
        if (!product.accumulate) sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += left[half][k] * right[k];
      }
    }
  if (Kept* const kept = find(mine.running, product.sum, sum_bytes(product)))
    kept->take(sum_bytes(product));
}

inline void do_products(std::deque<Product>& products) {
  for (; !products.empty(); products.pop_front()) do_product(products.front());
}

inline void start(const Product& product) {
  HopperLane& lane = hopper().lanes[size_t(current_thread)];
  if (!lane.begun) complain("products without begin_products", product.site);
  begin_running(lane, product.sum, sum_bytes(product), product.site);
  if (product.left != nullptr) begin_running(lane, product.left, kLeftBytes, product.site);
  Group& group = lane.groups.back();
  group.to_compute.push_back(product);
  group.registers.push_back(product.sum);
  if (product.left != nullptr) group.registers.push_back(product.left);
  add_reads(product, group.reads);
  compare_panels(lane, group.reads, product.site);
  // The same for all lanes of the warp.
  if (exchange(Stop::kShuffle, toss(), 0, product.site) != 0)
    for (Group& begun : lane.groups) do_products(begun.to_compute);
}

}  // namespace host

// ---- Barriers -----------------------------------------------------------------------------------

inline void begin_barrier(Barrier* barrier, uint32_t arrivals) {
  *barrier = Barrier{uint8_t(arrivals), uint8_t(arrivals), 0, 1};
}
inline void publish_barriers() {}
inline void arrive(Barrier* barrier, Site site = Site::here()) {
  if (!host::has_begun(*barrier, site)) return;
  if (barrier->pending == 0) return host::complain("one arrival too many", site);
  --barrier->pending;
  host::Hopper& state = host::hopper();
  host::History& history = state.barriers[barrier];
  host::release(history);
  std::vector<host::Bytes>& still_read = history.read_in_this_phase;
  for (const host::Group& group : state.lanes[size_t(host::current_thread)].groups)
    still_read.insert(still_read.end(), group.reads.begin(), group.reads.end());
  host::end_phase(*barrier);
}
inline void arrive_expecting(Barrier* barrier, uint32_t bytes, Site site = Site::here()) {
  if (!host::has_begun(*barrier, site)) return;
  barrier->bytes += int32_t(bytes);
  arrive(barrier, site);
}
inline void wait(Barrier* barrier, uint32_t parity, Site site = Site::here()) {
  if (!host::has_begun(*barrier, site)) return;
  host::HopperLane& lane = host::hopper().lanes[size_t(host::current_thread)];
  lane.waited_for = barrier;
  const bool is_over = host::waits_until(site, [&] {
    if (lane_index() == 0) host::do_some_copy();
    return barrier->parity != parity;
  });
  if (!is_over) return;
  const host::History& history = host::hopper().barriers[barrier];
  lane.passed[barrier] = history.phases;
  host::acquire(history);
}
inline void sync_group(int number, Site site = Site::here()) {
  if (host::hopper().lanes[size_t(host::current_thread)].unpublished)
    host::complain("stores without publish_to_async", site);
  int& met = host::hopper().met[number];
  const int turn = met / 4;
  host::sync(Stop::kSyncWarp, site);
  if (lane_index() == 0 && ++met % 4 == 0) {  // the last warp; the others have waited since theirs
    const int first = host::current_thread / host::kLanes / 4 * 4;
    for (int warp = first; warp < first + 4; ++warp)
      host::block().warps[size_t(warp)].group_epoch = host::block().warps[size_t(warp)].epoch;
  }
  host::waits_until(site, [&] { return met / 4 > turn; });
}

// ---- TMA ----------------------------------------------------------------------------------------

inline void copy_panel(void* panel, const TensorMap& map, int32_t column, int32_t token,
                       int32_t head, int32_t batch, Barrier* barrier, Site site = Site::here()) {
  const uint32_t at = host::shared_offset(panel, site);
  if (at % 1024 != 0) host::complain("a panel off 1024 bytes", site);
  if (!host::is_shared_address(at, host::kPanelSize) || !host::has_begun(*barrier, site))
    return host::complain("a copy beyond shared memory, or that nobody can wait for", site);
  const host::Bytes filled = {at, at + host::kPanelSize};
  host::Hopper& state = host::hopper();
  for (const host::HopperLane& lane : state.lanes)
    for (const host::Group& group : lane.groups)
      for (const host::Bytes& read : group.reads)
        if (read.meets(filled)) host::complain("a copy to what a product is still to read", site);
  const Barrier* const before = state.lanes[size_t(host::current_thread)].waited_for;
  if (before != nullptr)
    for (const host::Bytes& read : state.barriers[before].read_in_the_last)
      if (read.meets(filled))
        host::complain("a copy to what a product was still to read when it was given up", site);
  state.panels[at] = {barrier, state.barriers[barrier].phases};
  host::begin_bulk_copy(panel, host::kPanelSize, site);
  memset(panel, 0xff, host::kPanelSize);
  state.copies.push_back({static_cast<char*>(panel), &map, {column, token, head, batch}, barrier});
  host::do_some_copy();
}
inline void clear_shared(void* address, Site site = Site::here()) {
  // No part of the verdicts on races: consumers may write the same zeros.
  if (host::is_settled(address, 16, site)) memset(address, 0, 16);
  host::hopper().lanes[size_t(host::current_thread)].unpublished = true;
}
inline void publish_to_async() {
  host::hopper().lanes[size_t(host::current_thread)].unpublished = false;
}

template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
}
template <int kRegisters>
void give_registers() {
  take_registers<kRegisters>();
}

// ---- Products -----------------------------------------------------------------------------------

template <typename Registers>
void pin(Registers& registers) {
  std::vector<host::Kept>& pinned = host::hopper().lanes[size_t(host::current_thread)].pinned;
  for (host::Kept& kept : pinned)
    if (kept.at == &registers && kept.bytes.size() == sizeof registers)
      return kept.take(sizeof registers);
  pinned.emplace_back(&registers, sizeof registers);
}

inline void begin_products(Site site = Site::here()) {
  host::exchange(Stop::kShuffle, 0, 0, site);  // the lanes meet, which orders no memory
  host::hopper().lanes[size_t(host::current_thread)].begun = true;
}
inline void commit_products() {
  host::hopper().lanes[size_t(host::current_thread)].groups.emplace_back();
}
template <int kPending>
void wait_for_products(Site site = Site::here()) {
  host::HopperLane& lane = host::hopper().lanes[size_t(host::current_thread)];
  while (lane.groups.size() > kPending + 1) {
    host::do_products(lane.groups.front().to_compute);
    lane.groups.pop_front();
  }
  lane.begun = false;
  host::end_running(lane, site);
}

template <typename T>
void start_scores(float (&s)[8][4], uint64_t a, uint64_t b, bool accumulate,
                  Site site = Site::here()) {
  host::start({std::is_same<T, Bf16>::value, accumulate, s, 8, nullptr, a, true, b, site});
}
template <typename T>
void start_scores(float (&s)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                  Site site = Site::here()) {
  host::start({std::is_same<T, Bf16>::value, accumulate, s, 8, a, 0, true, b, site});
}
template <typename T, int kTiles>
void start_product(float (&out)[kTiles][4], const uint32_t (&a)[4], uint64_t b,
                   Site site = Site::here()) {
  host::start({std::is_same<T, Bf16>::value, true, out, kTiles, a, 0, false, b, site});
}

// ---- Launch -------------------------------------------------------------------------------------

inline bool is_hopper() {
  return true;
}
inline const char* encode_map(TensorMap& map, int32_t, const void* data, const MapShape& shape) {
  map = {static_cast<const char*>(data), shape};
  return nullptr;
}

}  // namespace cuda
}  // namespace ral
