#include "fibers.h"

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

namespace ral {
namespace cuda {
namespace host {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMaxStacks = 1024;

// Memory is taken as it is touched. Below each stack a page that may not be touched ends a
// recursion that would run into the neighbour.
char* stacks() {
  static char* const memory = [] {
    void* const p = mmap(nullptr, kMaxStacks * kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    for (int i = 0; i < kMaxStacks; ++i)
      mprotect(static_cast<char*>(p) + i * kStackBytes, size_t(sysconf(_SC_PAGESIZE)), PROT_NONE);
    return static_cast<char*>(p);
  }();
  return memory;
}

// Stacks begin at different offsets in a page: at the same one, all would share a few cache lines.
size_t usable_bytes(int index) {
  return kStackBytes - size_t(index % 32) * 1088 / 64 * 64;
}

}  // namespace

#ifdef RAL_HOST_UCONTEXT

void Fiber::prepare(int index, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stacks() + index * kStackBytes;
  context_.uc_stack.ss_size = usable_bytes(index);
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::switch_to(Fiber& next) {
  swapcontext(&context_, &next.context_);
}

#else

// Saves what the calling convention says that a call preserves. swapcontext would also save the
// signal mask, by a system call: a hundred times slower.
extern "C" void ral_host_switch(void** stack_pointer, void* next)
    __attribute__((visibility("hidden")));
asm(R"(
.text
.p2align 4
.globl ral_host_switch
.hidden ral_host_switch
.type ral_host_switch, @function
ral_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ral_host_switch, .-ral_host_switch
)");

void Fiber::prepare(int index, void (*entry)()) {
  // A function finds its stack 8 bytes off a multiple of 16, where its return address lies.
  void** top = reinterpret_cast<void**>(stacks() + index * kStackBytes + usable_bytes(index));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the saved registers
  stack_pointer_ = top;
}

void Fiber::switch_to(Fiber& next) {
  ral_host_switch(&stack_pointer_, next.stack_pointer_);
}

#endif

}  // namespace host
}  // namespace cuda
}  // namespace ral
