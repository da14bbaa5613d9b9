// Runs the threads of a block: who goes on when, what they do together, and the launch.
#include "harness.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <mutex>
#include <numeric>

#include "block.h"
#include "report.h"
#include "shadow.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace ral {
namespace cuda {
namespace host {

int current_thread = 0;
int64_t current_block = 0;
int64_t current_num_blocks = 0;
int seeded_bug = 0;

Block running_block;

std::string Block::place() const {
  return format("%s, block %lld", info->name, static_cast<long long>(current_block));
}

namespace {

constexpr int64_t kMaxThreads = 1024, kMaxSharedBytes = 227 * 1024;
constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kViolation = 1000;

std::mutex one_launch;
Fiber launching;
bool in_a_block = false;
uint64_t order_seed = 0, random_state = 0;

// splitmix64
uint64_t next_random() {
  uint64_t x = (random_state += 0x9e3779b97f4a7c15u);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

const char* name_of(Stop stop) {
  switch (stop) {
    case Stop::kEnd:
      return "its end";
    case Stop::kSyncBlock:
      return "sync_block";
    case Stop::kSyncWarp:
      return "sync_warp";
    case Stop::kWarpIndex:
      return "warp_index";
    case Stop::kShuffle:
      return "shuffle";
    case Stop::kShuffleXor:
      return "shuffle_xor";
    case Stop::kShuffleUp:
      return "shuffle_up";
    case Stop::kBallot:
      return "ballot";
    case Stop::kLoadMatrices:
      return "load_matrices";
    case Stop::kLoadMatricesTransposed:
      return "load_matrices_transposed";
    case Stop::kMultiplyAddBf16:
      return "multiply_add<Bf16>";
    case Stop::kMultiplyAddFp16:
      return "multiply_add<Fp16>";
  }
  return "?";
}

// ---- Who goes on --------------------------------------------------------------------------------

void switch_from(Fiber& from, int thread) {
  current_thread = thread;
  from.switch_to(block().threads[size_t(thread)].fiber);
}

void begin_phase(Warp& warp) {
  warp.num_stopped = 0;
  ++warp.phase;
  if (order_seed == 0) return;
  const uint64_t random = next_random();
  warp.first = int(random % kLanes);
  warp.stride = int(random >> 32 & (kLanes - 1)) | 1;  // odd, so that it comes by every lane
}

int first_thread(const Warp& warp) {
  return warp.index * kLanes + warp.lane_at(0);
}

// The warp to go on with after `warp`: the next one that is not held up; null if all are.
Warp* choose_warp(Warp& warp) {
  std::vector<Warp>& warps = block().warps;
  size_t start = size_t(warp.index);
  if (order_seed != 0 && next_random() % 4 == 0) start = next_random() % warps.size();
  for (size_t i = 0; i < warps.size(); ++i) {
    Warp& candidate = warps[(start + i) % warps.size()];
    if (!candidate.at_barrier && !candidate.ended) return &candidate;
  }
  return nullptr;
}

std::string what_happened(int thread) {
  const Thread& it = block().threads[size_t(thread)];
  if (it.stop == Stop::kEnd) return format("thread %d has ended", thread);
  return format("thread %d waits at %s (%s)", thread, name_of(it.stop), to_text(it.site).c_str());
}

// The block cannot go on: its threads are dropped where they stand.
[[noreturn]] void drop_block() {
  drop_copies();
  block().is_given_up = true;
  Fiber dropped;
  dropped.switch_to(launching);
  abort();
}

[[noreturn]] void give_up(int thread, int other) {
  const Thread &one = block().threads[size_t(thread)], &two = block().threads[size_t(other)];
  report().add({"divergent", number_of(one.site), number_of(two.site), 0}, [&] {
    return block().place() + ": " + what_happened(thread) + " while " + what_happened(other);
  });
  drop_block();
}

// ---- What they do together ----------------------------------------------------------------------

void load_matrices_of(Warp& warp, bool transposed, Site site) {
  MatrixRows rows;
  for (int lane = 0; lane < kLanes; ++lane)
    read_matrix_row(warp.rows[lane], rows[lane], warp.index * kLanes + lane, site);
  spread_rows(rows, transposed, warp.registers);
}

void begin_epoch(Warp& warp) {
  if (++warp.epoch == Stamp::kMaxEpoch)
    report().add({"limit", 0, 0, 0},
                 [] { return block().place() + ": more barriers than races can be told for"; });
}

void release_barrier() {
  for (Warp& warp : block().warps) {
    begin_epoch(warp);
    warp.block_epoch = warp.epoch;
    warp.at_barrier = false;
    begin_phase(warp);
  }
}

// All warps are at the barrier or have ended. False: the block has ended.
bool pass_barrier() {
  const std::vector<Warp>& warps = block().warps;
  const Warp *waiting = nullptr, *ended = nullptr;
  for (const Warp& warp : warps) (warp.ended ? ended : waiting) = &warp;
  if (waiting == nullptr) return false;
  if (ended != nullptr) give_up(first_thread(*waiting), first_thread(*ended));
  release_barrier();
  return true;
}

// All lanes of the running warp have stopped.
void finish_phase(Warp& warp) {
  const Thread* const lanes = &block().threads[size_t(warp.index) * kLanes];
  for (int lane = 1; lane < kLanes; ++lane)
    if (lanes[lane].stop != lanes[0].stop) give_up(warp.index * kLanes, warp.index * kLanes + lane);
  switch (lanes[0].stop) {
    case Stop::kEnd:
      warp.ended = true;
      return;
    case Stop::kSyncBlock:
      warp.at_barrier = true;
      return;
    case Stop::kSyncWarp:
      begin_epoch(warp);
      break;
    case Stop::kLoadMatrices:
      load_matrices_of(warp, false, lanes[0].site);
      break;
    case Stop::kLoadMatricesTransposed:
      load_matrices_of(warp, true, lanes[0].site);
      break;
    case Stop::kMultiplyAddBf16:
      multiply_add_warp(warp.operands, true);
      break;
    case Stop::kMultiplyAddFp16:
      multiply_add_warp(warp.operands, false);
      break;
    default:
      break;  // values are fetched by each lane
  }
  begin_phase(warp);
}

void stop(Stop kind, Site site) {
  const int index = current_thread;
  Thread& thread = block().thread();
  Warp& warp = block().warp();
  thread.stop = kind;
  thread.site = site;
  int next;
  if (++warp.num_stopped < kLanes) {
    next = warp.index * kLanes + warp.lane_at(warp.num_stopped);
  } else {
    finish_phase(warp);
    Warp* chosen = choose_warp(warp);
    if (chosen == nullptr) {
      if (!pass_barrier()) thread.fiber.switch_to(launching);
      chosen = order_seed == 0 ? &block().warps[0] : choose_warp(warp);
    }
    next = first_thread(*chosen);
  }
  if (next != index) switch_from(thread.fiber, next);
}

void run_thread() {
  Block& here = block();
  here.info->run(here.params, here.shared);
  end_copies(here.thread(), current_thread);
  stop(Stop::kEnd, {nullptr, 0});
  abort();  // an ended thread is never resumed
}

// ---- Launch -------------------------------------------------------------------------------------

void run_block(int64_t index) {
  Block& here = block();
  current_block = index;
  ++here.serial;
  here.at_end = nullptr;
  here.is_given_up = false;
  begin_block_memory(order_seed == 0 ? 0 : int(next_random() % 8));
  for (size_t i = 0; i < here.threads.size(); ++i) {
    here.threads[i].fiber.prepare(int(i), run_thread);
    here.threads[i].group = 0;
  }
  for (size_t i = 0; i < here.warps.size(); ++i) {
    Warp& warp = here.warps[i];
    warp.index = int(i);
    warp.at_barrier = warp.ended = false;
    warp.first = 0;
    warp.stride = 1;
    warp.phase = 0;
    warp.epoch = warp.block_epoch = warp.group_epoch = 1;
    std::fill_n(warp.seen, kMaxWarps, 0u);
    begin_phase(warp);
  }
  const size_t first = order_seed == 0 ? 0 : next_random() % here.warps.size();
  in_a_block = true;
  switch_from(launching, first_thread(here.warps[first]));
  in_a_block = false;
  if (here.at_end != nullptr) here.at_end(here.is_given_up);
}

// The GPU's arithmetic knows subnormal numbers, whatever the caller has set.
class DefaultArithmetic {
#if defined(__x86_64__)
 public:
  DefaultArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultArithmetic() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
 public:
  DefaultArithmetic() {}
#endif
};

// A kernel that touches what is not there, going round the harness, is a report and
// no end of the process.
class FaultsAreReported {
 public:
  FaultsAreReported() {
    static char stack[64 * 1024];  // threads of a block have small ones
    stack_t mine = {};
    mine.ss_sp = stack;
    mine.ss_size = sizeof stack;
    sigaltstack(&mine, &stack_before_);
    struct sigaction action = {};
    action.sa_handler = report_fault;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < kSignals; ++i) sigaction(signals_[i], &action, &before_[i]);
  }
  ~FaultsAreReported() {
    for (size_t i = 0; i < kSignals; ++i) sigaction(signals_[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  static void report_fault(int signal) {
    if (!in_a_block) {  // the harness's own
      ::signal(signal, SIG_DFL);
      raise(signal);
    }
    report().add({"fault", 0, 0, signal}, [&] {
      return block().place() + format(": thread %d got signal %d", current_thread, signal);
    });
    drop_block();
  }

  static constexpr size_t kSignals = 4;
  static constexpr int signals_[kSignals] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  struct sigaction before_[kSignals];
  stack_t stack_before_;
};

int refuse(const LaunchInfo& info, const std::string& reason, int error) {
  block().info = &info;
  report().add({"refused", 0, 0, error}, [&] { return std::string(info.name) + ": " + reason; });
  return error;
}

void begin_launch(const LaunchInfo& info, int64_t num_blocks, const void* params) {
  Block& here = block();
  here.info = &info;
  here.params = params;
  here.first_serial_of_launch = here.serial + 1;
  here.order_seed = order_seed;
  here.threads.resize(size_t(info.threads));
  here.warps.resize(size_t(info.threads) / kLanes);
  here.order.resize(size_t(num_blocks));
  std::iota(here.order.begin(), here.order.end(), int64_t(0));
  random_state = order_seed;
  if (order_seed != 0)
    for (size_t i = here.order.size(); i > 1; --i)
      std::swap(here.order[i - 1], here.order[next_random() % i]);
  current_num_blocks = num_blocks;
}

}  // namespace

void sync(Stop kind, Site site) {
  stop(kind, site);
}

uint32_t exchange(Stop kind, uint32_t value, int source, Site site) {
  Warp& warp = block().warp();
  const int set = int(warp.phase & 1);
  warp.values[set][current_thread % kLanes] = value;
  stop(kind, site);
  return warp.values[set][source];
}

uint32_t vote(bool predicate, Site site) {
  Warp& warp = block().warp();
  const int set = int(warp.phase & 1);
  warp.values[set][current_thread % kLanes] = predicate;
  stop(Stop::kBallot, site);
  uint32_t votes = 0;
  for (int lane = 0; lane < kLanes; ++lane) votes |= warp.values[set][lane] << lane;
  return votes;
}

void load_matrices(Stop kind, uint32_t* registers, const void* row, Site site) {
  Warp& warp = block().warp();
  warp.rows[current_thread % kLanes] = row;
  warp.registers[current_thread % kLanes] = registers;
  stop(kind, site);
}

void multiply_add(Stop kind, float* c, const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
  MultiplyAddOperands& operands = block().warp().operands;
  const int lane = current_thread % kLanes;
  operands.c[lane] = c;
  operands.a[lane] = a;
  operands.b[lane][0] = b0;
  operands.b[lane][1] = b1;
  stop(kind, site);
}

int launch(const LaunchInfo& info, int64_t num_blocks, const void* params) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (info.threads <= 0 || info.threads > kMaxThreads || info.threads % kLanes != 0)
    return refuse(info,
                  format("kThreads is %lld: not a multiple of 32 up to 1024",
                         static_cast<long long>(info.threads)),
                  kInvalidConfiguration);
  if (info.shared_bytes < 0 || info.shared_bytes > kMaxSharedBytes)
    return refuse(info,
                  format("kSharedBytes is %lld: more than 227 KiB",
                         static_cast<long long>(info.shared_bytes)),
                  kInvalidValue);
  if (num_blocks < 0 || num_blocks > 0x7fffffff)
    return refuse(info, format("%lld blocks", static_cast<long long>(num_blocks)),
                  kInvalidConfiguration);
  const int64_t before = report().count();
  const DefaultArithmetic arithmetic;
  const FaultsAreReported faults;
  begin_launch(info, num_blocks, params);
  for (const int64_t index : block().order) run_block(index);
  return report().count() == before ? 0 : kViolation;
}

}  // namespace host
}  // namespace cuda
}  // namespace ral

using namespace ral::cuda::host;

void ral_host_set_order(uint64_t seed) {
  order_seed = seed;
}

void ral_host_seed_bug(int32_t number) {
  seeded_bug = number;
}

int64_t ral_host_report(char* buffer, int64_t size) {
  if (size > 0) {
    const std::string text = report().text().substr(0, size_t(size) - 1);
    memcpy(buffer, text.c_str(), text.size() + 1);
  }
  return report().count();
}

void ral_host_clear_report() {
  report().clear();
}
