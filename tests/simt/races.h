// Who may know of what: the order that barriers make between threads (see races.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace simt {

// Of every thread of a group, up to which of its times all has happened before.
using Known = std::shared_ptr<const std::vector<uint32_t>>;

// A thread's clock: what it knows of the others, and its own time, which passes at each release.
struct Clock {
  Known known;
  uint32_t thread = 0, now = 0;
};

// Whether the kernels are instrumented; if not, the functions below do nothing.
extern bool check_races;

void start_clocks(size_t threads, const std::vector<Clock*>& clocks);
// Hands on what the clock's thread has done; what follows is not part of it.
Clock release(Clock& clock);
Known merge(const std::vector<Clock>& released);
void acquire(Clock& clock, const Known& known);
// All of them meet.
void meet(const std::vector<Clock*>& clocks);

// Memory that is checked, from now on or no more.
void watch(const void* memory, size_t bytes, bool watched);
// An access by the thread that runs now, which is to return to `where`.
void access(const void* memory, size_t bytes, bool write, const void* where);

}  // namespace simt
