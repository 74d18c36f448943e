// Threads that share the steps of one sequence: they meet after every step, spinning, for a step is
// shorter than waking up a thread would be. No header with inline code of its own: kernels include
// this (see vec.h), and so do the bindings.
#pragma once

#include <time.h>

#include <cstdint>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

extern "C" int sched_yield(void) noexcept;

namespace fastseq {

// What the threads share, in a line of the cache by itself.
struct alignas(64) Meeting {
  int64_t arrived = 0;  // shares that are there
  int64_t round = 0;
  int64_t state = 0;  // 0: gathering, 1: all have come, 2: the first goes on alone
  int64_t slow = 0;   // meetings for which somebody waited too long
  int64_t parts = 0;  // 1: the next meeting is the last, from which the first goes on alone
  bool was_quick() const { return state == 1 && parts == 0; }
};

// The shares [first, last) of total that a thread has of the work.
struct Team {
  int64_t first = 0, last = 1, total = 1;
  Meeting* meeting = nullptr;
  void* scratch = nullptr;  // zeros, which all of them see
  int64_t patience = 0;     // nanoseconds that one may wait for others who work as long

  bool is_first() const { return first == 0; }
  bool is_alone() const { return last - first == total; }
  // Of count things, where the shares begin and end.
  int64_t begin(int64_t count) const { return count * first / total; }
  int64_t end(int64_t count) const { return count * last / total; }

  // What runs while waiting: a core may have been taken away from one that is waited for.
  static void pause(int64_t turn) {
    if (turn % 512 == 511) sched_yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  // Before anything else: whether this thread takes part. A pool may have promised threads that are
  // busy elsewhere, even waiting like this one: the first does not wait for them for ever, and what
  // it then does alone is the same work, to the bit.
  bool gather() {
    if (is_alone()) return true;
    __atomic_add_fetch(&meeting->arrived, last - first, __ATOMIC_ACQ_REL);
    if (!is_first()) {
      for (int64_t turn = 0;; ++turn) {
        const int64_t state = __atomic_load_n(&meeting->state, __ATOMIC_ACQUIRE);
        if (state != 0) return state == 1;
        pause(turn);
      }
    }
    int64_t turn = 0;
    while (__atomic_load_n(&meeting->arrived, __ATOMIC_ACQUIRE) < total && turn < 20000)
      pause(turn++);
    const bool all = __atomic_load_n(&meeting->arrived, __ATOMIC_ACQUIRE) == total;
    if (all)
      __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
    else
      last = total;
    __atomic_store_n(&meeting->state, all ? 1 : 2, __ATOMIC_RELEASE);
    return true;
  }

  // Returns when all are here; what they wrote before is seen by all. False: go home, the first
  // does the rest. Where there are more threads than cores, or others want these, a meeting takes
  // as long as the system lets somebody else run: after a few of those the team parts.
  bool meet() {
    if (is_alone()) return true;
    const int64_t round = __atomic_load_n(&meeting->round, __ATOMIC_RELAXED);
    // The last of the meeting before has written it, so that all read the same.
    const bool parting = __atomic_load_n(&meeting->parts, __ATOMIC_RELAXED) != 0;
    if (__atomic_add_fetch(&meeting->arrived, last - first, __ATOMIC_ACQ_REL) == total) {
      __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
      if (__atomic_load_n(&meeting->slow, __ATOMIC_RELAXED) > 2 + round / 64)
        __atomic_store_n(&meeting->parts, 1, __ATOMIC_RELAXED);
      __atomic_store_n(&meeting->round, round + 1, __ATOMIC_RELEASE);
    } else {
      wait(round);
    }
    if (!parting) return true;
    last = total;
    return is_first();
  }

 private:
  void wait(int64_t round) const {
    int64_t since = 0;
    bool slow = false;
    for (int64_t turn = 0; __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE) == round; ++turn) {
      pause(turn);
      if (turn % 512 != 511 || slow) continue;
      const int64_t now = nanoseconds();
      if (since == 0) since = now;
      slow = now - since > patience;
    }
    // A meeting that is over: it may count for the next one, whose last comes after this thread.
    if (slow) __atomic_add_fetch(&meeting->slow, 1, __ATOMIC_RELAXED);
  }

  static int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<int64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
  }
};

}  // namespace fastseq
