#include "simt.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SIMT_SANITIZED 1
#else
#define SIMT_SANITIZED 0
#endif

#if !defined(__x86_64__)
#define SIMT_UCONTEXT
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#else
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
constexpr int kPoison = 0xff;

enum class State { runnable, at_barrier, at_exchange, exited };

struct Fiber {
  State state = State::exited;
  Place place{};
  uint3 index{};
  int linear = 0;
  // What the thread brings to a warp exchange, and what it gets.
  unsigned mask = 0;
  int source_lane = 0;
  uint64_t value = 0, result = 0;

  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
#ifdef SIMT_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

Memory poisoned(size_t bytes) {
  Memory memory(std::malloc(bytes));
  std::memset(memory.get(), kPoison, bytes);
  return memory;
}

struct Block {
  const std::function<void()>* kernel = nullptr;
  int threads = 0, exited = 0, at_barrier = 0;
  std::vector<std::vector<Fiber*>> runnable;  // of each warp
  bool by_priority = false;
  std::vector<size_t> priority;  // the warps, most urgent first
  Memory dynamic;
  std::map<const void*, Memory> statics;
};

std::mt19937_64 generator;
std::vector<std::unique_ptr<Fiber>> fibers;  // kept from block to block: their stacks are costly
Fiber host;                                  // the fiber of the caller of run_grid
Fiber* current = &host;
Block block;

size_t random_below(size_t bound) { return generator() % bound; }

void after_switch([[maybe_unused]] Fiber* self) {
#if SIMT_SANITIZED
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(self == nullptr ? nullptr : self->fake_stack, &bottom, &bytes);
  if (host.stack == nullptr) {
    host.stack = static_cast<char*>(const_cast<void*>(bottom));
    host.stack_bytes = bytes;
  }
#endif
}

void switch_to(Fiber& next) {
  Fiber& self = *current;
  if (&next == &self) return;
  current = &next;
  thread_index = next.index;
#if SIMT_SANITIZED
  __sanitizer_start_switch_fiber(&self.fake_stack, next.stack, next.stack_bytes);
#endif
#ifdef SIMT_UCONTEXT
  swapcontext(&self.context, &next.context);
#else
  simt_switch(&self.stack_pointer, next.stack_pointer);
#endif
  after_switch(&self);
}

std::string describe_waiting() {
  std::map<std::string, int> groups;
  for (int i = 0; i < block.threads; ++i) {
    const Fiber& fiber = *fibers[i];
    char text[256];
    if (fiber.state == State::exited) {
      std::snprintf(text, sizeof(text), "have returned");
    } else {
      std::snprintf(text, sizeof(text), "wait at %s %s:%d",
                    fiber.state == State::at_barrier ? "__syncthreads" : "a warp exchange",
                    fiber.place.file, fiber.place.line);
    }
    ++groups[text];
  }
  std::string description;
  for (const auto& [text, count] : groups) {
    if (!description.empty()) description += ", ";
    description += std::to_string(count) + " threads " + text;
  }
  return description;
}

// A random order of [0, count).
std::vector<size_t> permutation(size_t count) {
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) {
    order[i] = i;
    std::swap(order[i], order[random_below(i + 1)]);
  }
  return order;
}

// The runnable threads of the warp that goes on next, or null.
std::vector<Fiber*>* next_warp() {
  const size_t warps = block.priority.size();
  const size_t first = block.by_priority ? 0 : random_below(warps);
  for (size_t i = 0; i < warps; ++i) {
    std::vector<Fiber*>& threads = block.runnable[block.priority[(first + i) % warps]];
    if (!threads.empty()) return &threads;
  }
  return nullptr;
}

// Gives the processor to a random thread that can run, or back to the host when none is left.
void yield() {
  std::vector<Fiber*>* threads = next_warp();
  if (threads == nullptr) {
    if (block.exited == block.threads) {
      switch_to(host);
      return;
    }
    fault("deadlock in block (%u, %u, %u): %s", block_index.x, block_index.y, block_index.z,
          describe_waiting().c_str());
  }
  Fiber*& pick = (*threads)[random_below(threads->size())];
  Fiber* next = pick;
  pick = threads->back();
  threads->pop_back();
  switch_to(*next);
}

void wake(Fiber& fiber) {
  fiber.state = State::runnable;
  block.runnable[static_cast<size_t>(fiber.linear / kWarp)].push_back(&fiber);
}

// A fiber outlives its thread: in the next block it runs another.
void fiber_main() {
  after_switch(nullptr);
  for (;;) {
    (*block.kernel)();
    current->state = State::exited;
    ++block.exited;
    yield();
  }
}

void make_fiber(Fiber& fiber) {
  fiber.stack_bytes = kStackBytes;
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) fault("no memory for the stack of a thread");
  fiber.stack = static_cast<char*>(stack);
#ifdef SIMT_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#else
  // As simt_switch leaves it: six registers, then where to return to. Above, a null return address
  // in the place where a call would have put one, which also aligns the stack as a call does.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top - 8;
#endif
}

void run_block(const std::function<void()>& kernel, size_t shared_bytes) {
  block.kernel = &kernel;
  block.threads = static_cast<int>(block_size.x * block_size.y * block_size.z);
  block.exited = block.at_barrier = 0;
  const size_t warps = static_cast<size_t>((block.threads + kWarp - 1) / kWarp);
  block.runnable.assign(warps, {});
  block.priority = permutation(warps);
  block.by_priority = random_below(2) == 0;
  block.dynamic = poisoned(shared_bytes);
  block.statics.clear();
  while (fibers.size() < static_cast<size_t>(block.threads)) {
    fibers.push_back(std::make_unique<Fiber>());
    make_fiber(*fibers.back());
  }
  for (int i = 0; i < block.threads; ++i) {
    Fiber& fiber = *fibers[i];
    const unsigned index = static_cast<unsigned>(i);
    fiber.linear = i;
    fiber.index = {index % block_size.x, index / block_size.x % block_size.y,
                   index / (block_size.x * block_size.y)};
    wake(fiber);
  }
  yield();
}

// Lets the exchange happen if all lanes of the mask have come to it.
void try_exchange(Fiber& arrived) {
  const int first = arrived.linear / kWarp * kWarp;
  Fiber* lanes[kWarp] = {};
  for (int l = 0; l < kWarp; ++l) {
    if ((arrived.mask >> l & 1) == 0 || first + l >= block.threads) continue;
    Fiber& fiber = *fibers[first + l];
    if (fiber.state != State::at_exchange) return;
    if (fiber.mask != arrived.mask || fiber.place.line != arrived.place.line) {
      fault("lanes of one warp meet in different exchanges: lane %d with mask %08x at %s:%d, lane "
            "%d with mask %08x at %s:%d", arrived.linear % kWarp, arrived.mask, arrived.place.file,
            arrived.place.line, l, fiber.mask, fiber.place.file, fiber.place.line);
    }
    lanes[l] = &fiber;
  }
  for (int l = 0; l < kWarp; ++l) {
    if (lanes[l] == nullptr) continue;
    const int source = lanes[l]->source_lane;
    if (source < 0 || source >= kWarp || lanes[source] == nullptr) {
      fault("lane %d reads lane %d, which takes no part in the exchange at %s:%d", l, source,
            arrived.place.file, arrived.place.line);
    }
    lanes[l]->result = lanes[source]->value;
  }
  for (Fiber* fiber : lanes) {
    if (fiber != nullptr) wake(*fiber);
  }
}

}  // namespace

void fault(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("simt: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::fflush(nullptr);
  std::_Exit(kFaultStatus);
}

void set_seed(uint64_t seed) { generator.seed(seed); }

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > 1024) fault("a block of %zu threads", size_t(threads));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    fault("a grid of (%u, %u, %u) blocks", grid.x, grid.y, grid.z);
  }
  block_size = size;
  grid_size = grid;
  for (const size_t linear : permutation(size_t{grid.x} * grid.y * grid.z)) {
    block_index = {static_cast<unsigned>(linear % grid.x),
                   static_cast<unsigned>(linear / grid.x % grid.y),
                   static_cast<unsigned>(linear / grid.x / grid.y)};
    run_block(kernel, shared_bytes);
  }
  block.dynamic.reset();
  block.statics.clear();
}

void sync_block(Place place) {
  for (int i = 0; i < block.threads && block.at_barrier > 0; ++i) {
    const Fiber& other = *fibers[i];
    if (other.state != State::at_barrier) continue;
    if (other.place.line != place.line) {
      fault("divergent barrier: a thread at %s:%d, another at %s:%d", place.file, place.line,
            other.place.file, other.place.line);
    }
    break;
  }
  current->state = State::at_barrier;
  current->place = place;
  if (++block.at_barrier == block.threads) {
    block.at_barrier = 0;
    for (int i = 0; i < block.threads; ++i) wake(*fibers[i]);
  }
  yield();
}

uint64_t exchange(unsigned mask, uint64_t value, int source_lane, Place place) {
  Fiber& self = *current;
  if ((mask >> lane() & 1) == 0) {
    fault("lane %d is not in the mask %08x of its exchange at %s:%d", lane(), mask, place.file,
          place.line);
  }
  self.state = State::at_exchange;
  self.place = place;
  self.mask = mask;
  self.value = value;
  self.source_lane = source_lane;
  try_exchange(self);
  yield();
  return self.result;
}

int lane() { return current->linear % kWarp; }

void* dynamic_shared() { return block.dynamic.get(); }

void* static_shared(const void* tag, size_t bytes) {
  Memory& memory = block.statics[tag];
  if (memory == nullptr) memory = poisoned(bytes);
  return memory.get();
}

}  // namespace simt
