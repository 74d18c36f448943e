// Finds two accesses of the same memory, one of them a write, that no barrier, flag or transfer
// puts in an order: under any schedule, not only one where it shows.
//
// Kernels are compiled with -fsanitize=thread, but the functions that their accesses call are those
// here. Every thread has a vector clock; each pair of bytes of watched memory remembers its last
// writer and who has read it since. Shuffles, votes and products of matrices order nothing, as CUDA
// promises nothing of the kind; atomics order as if each were an acquire and a release, which is
// more than they do. Not seen: accesses by blocks that do not run at once, and by plain memcpy.
#include "races.h"

#include <algorithm>
#include <unordered_map>

#include "group.h"

extern "C" const char __executable_start;

namespace simt {
namespace {

constexpr uintptr_t kPage = 4096, kGrain = 2;

struct Access {
  uint32_t thread = 0, time = 0;  // time 0: none
  const void* where = nullptr;
};

struct Cell {
  Access writer;
  std::vector<Access> readers;
  bool watched = false;
};

struct Page {
  Cell cells[kPage / kGrain];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;

bool before(const Access& access, const Clock& clock) {
  return access.time == 0 || access.thread == clock.thread ||
         (*clock.known)[access.thread] >= access.time;
}

uintptr_t offset(const void* where) {
  return reinterpret_cast<uintptr_t>(where) - reinterpret_cast<uintptr_t>(&__executable_start);
}

[[noreturn]] void race(const Access& first, const char* first_kind, const Access& second,
                       bool write) {
  const Thread& a = *group.threads[first.thread];
  const Thread& b = *group.threads[second.thread];
  fault("race: thread %d of block %u %s at <%zx>, thread %d of block %u %s at <%zx>", a.linear,
        a.block->index.x, first_kind, offset(first.where), b.linear, b.block->index.x,
        write ? "writes" : "reads", offset(second.where));
}

// A thread that reads again and again leaves one entry.
void compact(std::vector<Access>& readers) {
  std::stable_sort(readers.begin(), readers.end(), [](const Access& a, const Access& b) {
    return a.thread != b.thread ? a.thread < b.thread : a.time > b.time;
  });
  readers.erase(std::unique(readers.begin(), readers.end(),
                            [](const Access& a, const Access& b) { return a.thread == b.thread; }),
                readers.end());
}

void check(Cell& cell, const Clock& clock, bool write, const void* where) {
  const Access mine{clock.thread, clock.now, where};
  if (!before(cell.writer, clock)) race(cell.writer, "writes", mine, write);
  if (!write) {
    if (!cell.readers.empty() && cell.readers.back().thread == mine.thread) {
      cell.readers.back() = mine;
      return;
    }
    if (cell.readers.size() == cell.readers.capacity()) compact(cell.readers);
    cell.readers.push_back(mine);
    return;
  }
  for (const Access& reader : cell.readers) {
    if (!before(reader, clock)) race(reader, "reads", mine, write);
  }
  cell.readers.clear();
  cell.writer = mine;
}

void check(const void* memory, size_t bytes, bool write, const void* where) {
  if (current->block == nullptr) return;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  for (uintptr_t at = begin / kGrain * kGrain; at < begin + bytes; at += kGrain) {
    const auto page = pages.find(at / kPage);
    if (page == pages.end()) return;
    Cell& cell = page->second->cells[at % kPage / kGrain];
    if (cell.watched) check(cell, current->clock, write, where);
  }
}

}  // namespace

bool check_races = false;

void start_clocks(size_t threads, const std::vector<Clock*>& clocks) {
  if (!check_races) return;
  const auto nothing = std::make_shared<const std::vector<uint32_t>>(threads);
  for (size_t i = 0; i < clocks.size(); ++i) *clocks[i] = {nothing, static_cast<uint32_t>(i), 1};
  for (auto& [number, page] : pages) {
    for (Cell& cell : page->cells) {
      cell.writer = {};
      cell.readers.clear();
    }
  }
}

Clock release(Clock& clock) {
  if (!check_races) return {};
  Clock released = clock;
  ++clock.now;
  return released;
}

Known merge(const std::vector<Clock>& released) {
  if (!check_races || released.empty()) return nullptr;
  std::vector<uint32_t> merged = *released[0].known;
  const std::vector<uint32_t>* last = released[0].known.get();
  for (const Clock& clock : released) {
    if (clock.known.get() != last) {
      last = clock.known.get();
      for (size_t i = 0; i < merged.size(); ++i) merged[i] = std::max(merged[i], (*last)[i]);
    }
    merged[clock.thread] = std::max(merged[clock.thread], clock.now);
  }
  return std::make_shared<const std::vector<uint32_t>>(std::move(merged));
}

void acquire(Clock& clock, const Known& known) {
  if (!check_races || known == nullptr || known == clock.known) return;
  const auto covers = [](const std::vector<uint32_t>& all, const std::vector<uint32_t>& part) {
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i] < part[i]) return false;
    }
    return true;
  };
  if (covers(*clock.known, *known)) return;
  if (covers(*known, *clock.known)) {
    clock.known = known;
    return;
  }
  clock.known = merge({{known, clock.thread, 0}, {clock.known, clock.thread, 0}});
}

void meet(const std::vector<Clock*>& clocks) {
  if (!check_races) return;
  std::vector<Clock> released;
  for (Clock* clock : clocks) released.push_back(release(*clock));
  const Known known = merge(released);
  for (Clock* clock : clocks) clock->known = known;
}

void watch(const void* memory, size_t bytes, bool watched) {
  if (!check_races) return;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  for (uintptr_t at = begin / kGrain * kGrain; at < begin + bytes; at += kGrain) {
    std::unique_ptr<Page>& page = pages[at / kPage];
    if (page == nullptr) page = std::make_unique<Page>();
    Cell& cell = page->cells[at % kPage / kGrain];
    cell = {};
    cell.watched = watched;
  }
}

void access(const void* memory, size_t bytes, bool write, const void* where) {
  if (check_races) check(memory, bytes, write, where);
}

}  // namespace simt

// What the compiler's instrumentation calls.

#define SIMT_ACCESS(name, bytes, write)                                  \
  void __tsan_##name(void* memory) {                                     \
    ::simt::check(memory, bytes, write, __builtin_return_address(0));    \
  }
#define SIMT_ACCESSES(bytes)                  \
  SIMT_ACCESS(read##bytes, bytes, false)      \
  SIMT_ACCESS(write##bytes, bytes, true)      \
  SIMT_ACCESS(unaligned_read##bytes, bytes, false) \
  SIMT_ACCESS(unaligned_write##bytes, bytes, true)

extern "C" {
void __tsan_init() { simt::check_races = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Of a variable that is initialised when its function is first called, on the host alone.
unsigned char __tsan_atomic8_load(const volatile unsigned char* at, int) {
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
void __tsan_read_range(void* memory, size_t bytes) {
  simt::check(memory, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* memory, size_t bytes) {
  simt::check(memory, bytes, true, __builtin_return_address(0));
}
}
