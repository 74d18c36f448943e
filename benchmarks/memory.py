"""Memory on both devices: where fresh CPU tensors come from, and how much a call holds."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable

import torch

# The options of glibc's mallopt, from <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = -1
#: Bytes of heap that ``reused`` faults in at once.
_HEAP = 1 << 29

#: Bytes that malloc merges small blocks for: it does from 1 KiB on, and maps none below 128 KiB.
_SETTLING = 96 << 10

#: On the CPU: whether a call's output lands on pages the process already has.
CPU_POLICIES = ("reused", "fresh")
#: On a GPU: whether a call's inputs may still be in L2.
GPU_POLICIES = ("cold", "hot")


def set_allocation(policy: str) -> bool:
    """Make malloc reuse freed blocks, or map every large one anew, for all callers alike.

    ``reused`` keeps everything freed in the heap, so that no call pays for page faults: a kernel's
    own time. ``fresh`` maps every block above 128 KiB (glibc's threshold at start) and returns it
    when freed: each call faults its outputs in, as the first call of a program does. It must come
    first in a process: the heap that ``reused`` has grown goes on serving large blocks.

    Returns:
        False where the C library has no ``mallopt`` (nothing is changed then).
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    if policy == "reused":
        done = library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, _NEVER)
        _fault_in(library)
        return bool(done)
    done = (
        library.mallopt(_MMAP_MAX, 65536)
        and library.mallopt(_MMAP_THRESHOLD, 128 * 1024)
        and library.mallopt(_TRIM_THRESHOLD, 128 * 1024)
    )
    gc.collect()
    library.malloc_trim(0)
    return bool(done)


def _fault_in(library: ctypes.CDLL) -> None:
    """Leave a large free block of touched pages in the heap.

    glibc asks for a little more than an aligned block needs and gives the rest away, so a block
    that was freed seldom serves the next of its size (before 2.38): only a larger one does.
    """
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    block = library.malloc(_HEAP)
    if block:
        ctypes.memset(block, 1, _HEAP)
        library.free(block)


def settle_heap() -> None:
    """Have malloc put away now what was freed before.

    glibc leaves small freed blocks where they are until somebody asks for a large one; whoever does
    merges and sorts them all. After the thousands of blocks of a graph of torch's nodes this took
    the first large request of the call that came next 0.2 ms.
    """
    torch.empty(_SETTLING, dtype=torch.uint8)


def page_faults(call: Callable[[], object]) -> int:
    """Minor page faults of one call."""
    before = faults_so_far()
    call()
    return faults_so_far() - before


def faults_so_far() -> int:
    """Minor page faults of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory a call holds at once beyond what it began with; None where nobody knows."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    return _peak_bytes_on_cpu(call)


def _peak_bytes_on_cpu(call: Callable[[], object]) -> int | None:
    """From the profiler's allocation events: torch keeps no statistics of CPU memory."""
    # Not torch.profiler, which imports the whole compiler first: seconds.
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        kept = call()
    del kept
    results = profiler.kineto_results
    if results is None:
        return None
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
