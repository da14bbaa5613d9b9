// Parallel loops by OpenMP where a caller set it, else by std::thread; the kept scratch allocation.
#include "core/threads.h"

#include <sched.h>
#include <stdlib.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <atomic>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace ral {
namespace {

// Signature of GOMP_parallel, which compilers call for `#pragma omp parallel`.
using OpenmpParallel = void (*)(void (*fn)(void*), void* data, unsigned num_threads,
                                unsigned flags);
std::atomic<OpenmpParallel> openmp_parallel{nullptr};

struct Loop {
  void (*fn)(void*, int64_t, int);
  void* context;
  int64_t num_tasks;
  std::atomic<int64_t> next_task{0};
  std::atomic<int> next_worker{0};
};

void work(void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  const int worker = loop.next_worker.fetch_add(1);
  for (;;) {
    const int64_t task = loop.next_task.fetch_add(1);
    if (task >= loop.num_tasks) return;
    loop.fn(loop.context, task, worker);
  }
}

}  // namespace

void parallel_for(int num_threads, int64_t num_tasks, void (*fn)(void*, int64_t, int),
                  void* context) {
  Loop loop{fn, context, num_tasks};
  if (num_threads > num_tasks) num_threads = static_cast<int>(num_tasks);
  if (num_threads <= 1) {
    work(&loop);
  } else if (OpenmpParallel run = openmp_parallel.load()) {
    run(work, &loop, static_cast<unsigned>(num_threads), 0);
  } else {
    std::vector<std::thread> helpers;
    for (int i = 1; i < num_threads; ++i) helpers.emplace_back(work, &loop);
    work(&loop);
    for (std::thread& helper : helpers) helper.join();
  }
}

void spin_pause(int64_t iteration) {
  // A spinning worker must not burn the core that a descheduled predecessor needs.
  if (iteration % 256 == 255) {
    sched_yield();
    return;
  }
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

namespace {
constexpr size_t kHugePage = size_t{1} << 21;
}  // namespace

void expect_writes(void* memory, size_t bytes) {
#ifdef __linux__
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & -kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

size_t Arena::reserve(int64_t count, size_t size) {
  const size_t offset = bytes_;
#ifdef __SANITIZE_ADDRESS__
  guards_.push_back(offset + static_cast<size_t>(count) * size);
  bytes_ += 64;
#endif
  bytes_ += (static_cast<size_t>(count) * size + 63) / 64 * 64;
  return offset;
}

namespace {

// The allocation that the last call left behind.
std::mutex kept_mutex;
char* kept_data = nullptr;
size_t kept_capacity = 0;
ScratchSizes sizes{};

}  // namespace

ScratchSizes scratch_sizes(bool reset) {
  std::lock_guard<std::mutex> lock(kept_mutex);
  const ScratchSizes found = sizes;
  if (reset) sizes = {};
  return found;
}

bool Arena::allocate() {
  {
    std::lock_guard<std::mutex> lock(kept_mutex);
    const int64_t size = static_cast<int64_t>(bytes_);
    if (sizes.largest < size) sizes.largest = size;
    sizes.total += size;
    if (kept_data && kept_capacity >= bytes_) {
      data_ = kept_data;
      capacity_ = kept_capacity;
      kept_data = nullptr;
      return true;
    }
  }
  void* memory = nullptr;
  const bool large = bytes_ >= 2 * kHugePage;
  capacity_ = bytes_ + 64;
  if (posix_memalign(&memory, large ? kHugePage : 64, capacity_) != 0) return false;
  if (large) expect_writes(memory, capacity_);
  data_ = static_cast<char*>(memory);
#ifdef __SANITIZE_ADDRESS__
  for (const size_t guard : guards_) ASAN_POISON_MEMORY_REGION(data_ + guard, 64);
#endif
  return true;
}

Arena::~Arena() {
#ifdef __SANITIZE_ADDRESS__
  free(data_);  // kept memory would have the guards of this call
  return;
#endif
  if (data_ && capacity_ <= kKeptBytes) {
    std::lock_guard<std::mutex> lock(kept_mutex);
    if (!kept_data || kept_capacity < capacity_) {
      std::swap(data_, kept_data);
      std::swap(capacity_, kept_capacity);
    }
  }
  free(data_);
}

}  // namespace ral

extern "C" __attribute__((visibility("default"))) void ral_cpu_set_openmp(void* gomp_parallel) {
  ral::openmp_parallel.store(reinterpret_cast<ral::OpenmpParallel>(gomp_parallel));
}
