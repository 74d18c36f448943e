// Threads that share the steps of one sequence: they meet after every step, spinning, for a step is
// shorter than waking up a thread would be. No header with inline code of its own: kernels include
// this (see vec.h), and so do the bindings.
#pragma once

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
};

// The shares [first, last) of total that a thread has of the work.
struct Team {
  int64_t first = 0, last = 1, total = 1;
  Meeting* meeting = nullptr;
  void* scratch = nullptr;  // zeros, which all of them see

  bool is_first() const { return first == 0; }
  // Of count things, where the shares begin and end.
  int64_t begin(int64_t count) const { return count * first / total; }
  int64_t end(int64_t count) const { return count * last / total; }

  // What runs while waiting: a core may have been taken away from one that is waited for.
  static void pause(int64_t turn) {
    if (turn % 4096 == 4095) sched_yield();
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  // Before anything else: whether this thread takes part. A pool may have promised threads that are
  // busy elsewhere, even waiting like this one: the first does not wait for them for ever, and what
  // it then does alone is the same work, to the bit.
  bool gather() {
    if (last - first == total) return true;
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

  // Returns when all are here; what they wrote before is seen by all.
  void meet() const {
    if (last - first == total) return;
    const int64_t round = __atomic_load_n(&meeting->round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&meeting->arrived, last - first, __ATOMIC_ACQ_REL) == total) {
      __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&meeting->round, round + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int64_t turn = 0; __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE) == round; ++turn)
      pause(turn);
  }
};

}  // namespace fastseq
