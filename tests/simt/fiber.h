// Stacks to switch between, known to the address sanitizer.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// The fiber of the program itself, which has its stack already.
extern Fiber host_fiber;

// Gives a fiber a stack, on which main starts when first switched to; main never returns, and calls
// fiber_started first. The number spreads stacks over the sets of the caches.
void make_fiber(Fiber& fiber, void (*main)(), size_t number);
void fiber_started();
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace simt
