// Parallel loops and scratch memory for the CPU backend.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ral {

// Runs fn(context, task, worker) for every task in [0, num_tasks), on at most num_threads workers
// numbered from 0. Tasks are claimed in ascending order, each by one worker; which worker is not
// fixed, so results must not depend on it. Returns when all are done.
void parallel_for(int num_threads, int64_t num_tasks,
                  void (*fn)(void* context, int64_t task, int worker), void* context);

// Lets the processor breathe while another worker finishes; yields to the scheduler now and then.
void spin_pause(int64_t iteration);

// To be told of memory before it is written for the first time: the system then clears it two MiB
// at a time, not four KiB, and only what lies within [memory, memory + bytes). Advice; contents
// stay.
void expect_writes(void* memory, size_t bytes);

// One uninitialised allocation, 64-byte aligned, carved into arrays. The last one of at most
// kKeptBytes stays for the next call: fresh memory is cleared page by page by the system, which was
// a fifth of the time of a backward at 1,000 tokens (Zen 5, 2026-11).
class Arena {
 public:
  static constexpr size_t kKeptBytes = size_t{512} << 20;

  // Reserves room for `count` elements of `size` bytes; returns their offset. Call before
  // allocate().
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
};

}  // namespace ral
