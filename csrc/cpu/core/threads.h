// Parallel loops and scratch memory for the CPU backend.
#pragma once

#include <cstddef>
#include <cstdint>
#ifdef __SANITIZE_ADDRESS__
#include <vector>
#endif

namespace ral {

// Runs fn(context, task, worker) for every task in [0, num_tasks), on at most num_threads workers
// numbered from 0. Workers claim tasks in ascending order. Which worker gets a task is not fixed,
// so results must not depend on it. Returns when all are done.
void parallel_for(int num_threads, int64_t num_tasks,
                  void (*fn)(void* context, int64_t task, int worker), void* context);

// One turn of a spin loop that waits for another worker. Now and then it yields to the scheduler.
void spin_pause(int64_t iteration);

// Call it before memory is written for the first time. The system then clears it two MiB at a time,
// not four KiB. Only whole pages in [memory, memory + bytes) are advised; contents stay.
void expect_writes(void* memory, size_t bytes);

// One uninitialised allocation, 64-byte aligned, carved into arrays. The last one of at most
// kKeptBytes stays for the next call. The system clears fresh memory page by page, which took a
// fifth of a backward at 1,000 tokens (Zen 5, 2026-11).
class Arena {
 public:
  static constexpr size_t kKeptBytes = size_t{512} << 20;

  // Reserves `count` elements of `size` bytes and returns their offset. Call it before allocate().
  size_t reserve(int64_t count, size_t size);
  bool allocate();
  ~Arena();
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  __attribute__((always_inline)) T* at(size_t offset) const {
    return reinterpret_cast<T*>(data_ + offset);
  }

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
  size_t capacity_ = 0;
#ifdef __SANITIZE_ADDRESS__
  std::vector<size_t> guards_;  // 64 bytes after each array that must not be touched
#endif
};

// Bytes of scratch since the last reset: the largest allocation, and the sum of all.
struct ScratchSizes {
  int64_t largest, total;
};
ScratchSizes scratch_sizes(bool reset);

}  // namespace ral
