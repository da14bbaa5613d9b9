// Threads that give way to each other by name, on stacks of their own.
#pragma once

#include <stddef.h>

#if !(defined(__x86_64__) && defined(__linux__)) && !defined(RAL_HOST_UCONTEXT)
#define RAL_HOST_UCONTEXT
#endif
#ifdef RAL_HOST_UCONTEXT
#include <ucontext.h>
#endif

namespace ral {
namespace cuda {
namespace host {

class Fiber {
 public:
  // Makes the next switch to this fiber call `entry`, which must never return, on stack `index`.
  void prepare(int index, void (*entry)());
  // Stops here, in the running fiber, and goes on in `next`.
  void switch_to(Fiber& next);

 private:
#ifdef RAL_HOST_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace host
}  // namespace cuda
}  // namespace ral
