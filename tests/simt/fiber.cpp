#include "fiber.h"

#include <sys/mman.h>

#include "simt.h"

// Defined where the program is linked with the address sanitizer: this file is compiled without.
#ifdef SIMT_SANITIZED
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
// ucontext saves the signal mask by a system call, which more than doubles the time of the tests.
// This saves what the calling convention says a function keeps.
extern "C" void simt_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
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
.size simt_switch, .-simt_switch
)");
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 << 10;

void after_switch([[maybe_unused]] Fiber* self) {
#ifdef SIMT_SANITIZED
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(self == nullptr ? nullptr : self->fake_stack, &bottom, &bytes);
  if (host_fiber.stack == nullptr) {
    host_fiber.stack = static_cast<char*>(const_cast<void*>(bottom));
    host_fiber.stack_bytes = bytes;
  }
#endif
}

}  // namespace

Fiber host_fiber;

void make_fiber(Fiber& fiber, void (*main)(), [[maybe_unused]] size_t number) {
  fiber.stack_bytes = kStackBytes;
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) fault("no memory for the stack of a thread");
  fiber.stack = static_cast<char*>(stack);
#ifdef __x86_64__
  // As simt_switch leaves it: six registers, then where to return to. Above, a null return address
  // in the place where a call would have put one, which also aligns the stack as a call does.
  constexpr size_t kLine = 64, kColours = 61;
  char* end = fiber.stack + kStackBytes - number % kColours * 9 * kLine;
  void** top = reinterpret_cast<void**>(end);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(main);
  fiber.stack_pointer = top - 8;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, main, 0);
#endif
}

void fiber_started() { after_switch(nullptr); }

void switch_fiber(Fiber& from, Fiber& to) {
#ifdef SIMT_SANITIZED
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef __x86_64__
  simt_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  after_switch(&from);
}

}  // namespace simt
