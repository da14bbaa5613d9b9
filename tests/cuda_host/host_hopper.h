// The names of csrc/cuda/hopper/instructions.h for the host compiler: see README.md. Included by
// hopper/instructions.h alone.
//
// What runs beside the threads on a GPU runs here as badly timed as it may. A copy spoils its panel
// with NaN when it is issued, and arrives at once or at some later time; a product is computed, and
// reads its registers and its shared memory, when it is issued or when it is waited for. Which of
// them, the order of threads decides (set_order; 0 would wait for ever).
#pragma once

#include <stdint.h>
#include <string.h>

#include <deque>
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
  uint64_t a, b;
};

struct HopperLane {
  std::vector<std::deque<Product>> groups{1};  // the last one is not committed yet
  bool begun = false;
  bool unpublished = false;  // it has stored what the async proxy does not see yet
};

struct Hopper {
  std::deque<Copy> copies;
  std::vector<HopperLane> lanes{1024};
  int met[16] = {};  // warps that came to a group's barrier
  uint64_t random = 0;
  bool hopeless = false;  // somebody has waited for ever
};
RAL_HOST_HIDDEN inline Hopper& hopper() {  // hidden: one for each library
  static Hopper state;
  return state;
}

inline uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
inline bool toss() {
  return mixed(hopper().random += 0x9e3779b97f4a7c15u) & 1;
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
  copy.barrier->bytes -= 64 * 128;
  end_phase(*copy.barrier);
}

inline void do_some_copy() {
  std::deque<Copy>& copies = hopper().copies;
  if (copies.empty() || !toss()) return;
  const size_t which = mixed(hopper().random) % copies.size();
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
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0 ||
      at + 2 > uint32_t(block().info->shared_bytes)) {
    complain("a descriptor without 128-byte swizzle, or beyond shared memory", Site::here());
    at = 0;
  }
  return reinterpret_cast<const uint16_t*>(block().shared + at);
}

inline void do_product(const Product& product) {
  const int lane = current_thread % kLanes, warp = current_thread / kLanes % 4;
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
        right[k] = number(element(product.b, product.left == nullptr, column, k), product.is_bf16);
      for (int half = 0; half < 2; ++half) {
        float& sum = product.sum[c][2 * half + e];
        if (!product.accumulate) sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += left[half][k] * right[k];
      }
    }
}

inline void do_products(std::deque<Product>& products) {
  for (; !products.empty(); products.pop_front()) do_product(products.front());
}

// Whether its factor b is in that panel, of 8 KiB; a tile has one, or two side by side.
inline bool reads_panel(const Product& product, uint32_t panel) {
  const uint32_t first = uint32_t(product.b & 0x3fff) << 4 >> 13;
  return panel >= first && panel < first + uint32_t(product.num_tiles) / 8;
}

inline void start(const Product& product, Site site) {
  HopperLane& lane = hopper().lanes[size_t(current_thread)];
  if (!lane.begun) complain("products without begin_products", site);
  lane.groups.back().push_back(product);
  // The same for all lanes of the warp.
  if (exchange(Stop::kShuffle, toss(), 0, site) != 0)
    for (std::deque<Product>& group : lane.groups) do_products(group);
}

}  // namespace host

// ---- Barriers -----------------------------------------------------------------------------------

inline void begin_barrier(Barrier* barrier, uint32_t arrivals) {
  *barrier = Barrier{uint8_t(arrivals), uint8_t(arrivals), 0, 1};
}
inline void publish_barriers(Site site = Site::here()) {
  host::Hopper& state = host::hopper();
  bool unfinished = !state.copies.empty();
  for (host::HopperLane& lane : state.lanes)
    for (std::deque<host::Product>& group : lane.groups) unfinished = unfinished || !group.empty();
  if (unfinished) host::complain("the block before ended with copies or products running", site);
  const uint64_t random = state.random;
  const bool hopeless = state.hopeless;
  state = host::Hopper();
  state.random = random;
  state.hopeless = hopeless;
}
inline void arrive(Barrier* barrier, Site site = Site::here()) {
  if (barrier->pending == 0) return host::complain("one arrival too many", site);
  --barrier->pending;
  host::end_phase(*barrier);
}
inline void arrive_expecting(Barrier* barrier, uint32_t bytes, Site site = Site::here()) {
  if (barrier->begun != 1) host::complain("a barrier that has not begun", site);
  barrier->bytes += int32_t(bytes);
  arrive(barrier, site);
}
inline void wait(Barrier* barrier, uint32_t parity, Site site = Site::here()) {
  constexpr int kPatience = 20000;
  bool& hopeless = host::hopper().hopeless;
  for (int i = 0;; ++i) {
    if (lane_index() == 0) host::do_some_copy();
    if (host::exchange(Stop::kShuffle, barrier->parity != parity, 0, site) != 0) return;
    if (i == kPatience) host::complain("waits for ever", site);
    if (i >= kPatience || hopeless) {
      hopeless = true;
      return;
    }
  }
}
inline void sync_group(int number, Site site = Site::here()) {
  if (host::hopper().lanes[size_t(host::current_thread)].unpublished)
    host::complain("stores without publish_to_async", site);
  int& met = host::hopper().met[number];
  const int turn = met / 4;
  host::sync(Stop::kSyncWarp, site);
  if (lane_index() == 0) ++met;
  while (host::exchange(Stop::kShuffle, met / 4 > turn, 0, site) == 0) {
  }
}

// ---- TMA ----------------------------------------------------------------------------------------

inline void copy_panel(void* panel, const TensorMap& map, int32_t column, int32_t token,
                       int32_t head, int32_t batch, Barrier* barrier, Site site = Site::here()) {
  const uint32_t at = host::shared_offset(panel, site);
  if (at % 1024 != 0) host::complain("a panel off 1024 bytes", site);
  for (const host::HopperLane& lane : host::hopper().lanes)
    for (const std::deque<host::Product>& group : lane.groups)
      for (const host::Product& product : group)
        if (host::reads_panel(product, at >> 13))
          host::complain("a copy to what a product is still to read", site);
  memset(panel, 0xff, 64 * 128);
  host::hopper().copies.push_back(
      {static_cast<char*>(panel), &map, {column, token, head, batch}, barrier});
  host::do_some_copy();
}
inline void clear_shared(void* address) {
  memset(address, 0, 16);
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
void pin(Registers&) {}

inline void begin_products(Site site = Site::here()) {
  host::sync(Stop::kSyncWarp, site);
  host::hopper().lanes[size_t(host::current_thread)].begun = true;
}
inline void commit_products() {
  host::hopper().lanes[size_t(host::current_thread)].groups.emplace_back();
}
template <int kPending>
void wait_for_products() {
  host::HopperLane& lane = host::hopper().lanes[size_t(host::current_thread)];
  while (lane.groups.size() > kPending + 1) {
    host::do_products(lane.groups.front());
    lane.groups.erase(lane.groups.begin());
  }
  lane.begun = false;
}

template <typename T>
void start_scores(float (&s)[8][4], uint64_t a, uint64_t b, bool accumulate,
                  Site site = Site::here()) {
  host::start({std::is_same<T, Bf16>::value, accumulate, s, 8, nullptr, a, b}, site);
}
template <typename T, int kTiles>
void start_product(float (&out)[kTiles][4], const uint32_t (&a)[4], uint64_t b,
                   Site site = Site::here()) {
  host::start({std::is_same<T, Bf16>::value, true, out, kTiles, a, 0, b}, site);
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
