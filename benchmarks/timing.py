"""Timing variants of one call against each other, on CPU and GPU by one path.

All variants of a group take turns, call by call, so that whatever slows the machine for a while
slows all of them, and ratios are taken within each round. What differs between the devices is how a
*run* of some calls is made (a Python loop, or a CUDA graph) and which clock reads it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

import fastseq

from .memory import faults_so_far, settle_heap
from .statistics import Samples

#: A run is made of as many calls as it takes to last this long, so that clocks resolve it and that
#: its start counts little: a call finds another variant's code and data in the caches, which after
#: torch's loop over steps takes a recurrent layer of 0.3 ms as long again.
CPU_RUN_SECONDS = 2e-3
GPU_RUN_SECONDS = 1e-3
MAX_CALLS = 256
#: Rounds: as many as the sampling time has room for. The minimum may take four times as long, or
#: half a second; then least_rounds() do.
MIN_ROUNDS, MAX_ROUNDS = 7, 300
#: Of each of the five rounds that tell a call's time with the host.
_WALL_SECONDS = 0.02
#: From here on a call is not repeated to warm up or to find out how long it takes.
SLOW_SECONDS = 0.05


@dataclass
class Variant:
    """One provider's call in one mode, ready to be timed.

    Attributes:
        name: the provider's.
        calls: one call for each copy of the inputs, all alike.
        backend: forced around every call, outside what is timed.
        gradients: whether autograd records.
        first: seconds that its first call took, 0 where there was none yet.
        counts: whether that call was made as the timed ones are, with as many threads.
    """

    name: str
    calls: list[Callable[[], object]]
    backend: str
    gradients: bool
    first: float = 0.0
    counts: bool = False

    def enter(self) -> None:
        fastseq.use_backend(self.backend)
        torch.set_grad_enabled(self.gradients)


@dataclass
class Run:
    """Some calls in a row, and how many they are.

    Attributes:
        faults: page faults of the latest execution, on a CPU.
    """

    variant: Variant
    execute: Callable[[], object]
    calls: int
    faults: int = 0

    @property
    def slow(self) -> bool:
        """Whether one call of it is long: it was warm after the first."""
        return self.variant.first > SLOW_SECONDS


class CpuTimer:
    """``perf_counter`` around a loop of calls; a long call is a run by itself."""

    def prepare(self, variant: Variant, policy: str) -> Run:
        call = variant.calls[0]
        if variant.first > SLOW_SECONDS:
            return Run(variant, call, 1)
        variant.enter()
        seconds = self._once(call)
        if seconds < 10 * CPU_RUN_SECONDS:  # however cold it was, what is longer is one run
            seconds = min(self._once(call) for _ in range(3))
        count = max(1, min(MAX_CALLS, int(CPU_RUN_SECONDS / max(seconds, 1e-7))))
        if count == 1:
            return Run(variant, call, 1)

        def several() -> None:
            for _ in range(count):
                call()

        return Run(variant, several, count)

    def building(self) -> AbstractContextManager[None]:
        """Where variants are made; nothing to see to on a CPU."""
        return nullcontext()

    def measure(self, run: Run) -> float:
        """Seconds of one run. What the run before left for malloc to do is not this one's."""
        settle_heap()
        before = faults_so_far()
        seconds = self._once(run.execute)
        run.faults = faults_so_far() - before
        return seconds

    @staticmethod
    def _once(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class GpuTimer:
    """CUDA events around the replay of a graph: kernels back to back, without the host.

    Policy ``cold``: the calls go through copies of the inputs that together are larger than three
    times the L2 cache; ``hot``: all calls have the same inputs.

    Everything, warm-up and autograd graphs included, is built on one stream of its own: a backward
    pass runs on the stream its forward ran on, and capture forbids any other.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def prepare(self, variant: Variant, policy: str) -> Run:
        calls = variant.calls if policy == "cold" else variant.calls[:1]
        variant.enter()
        with self.building():
            for call in calls:
                call()
        seconds = self._events(lambda: [call() for call in calls]) / len(calls)
        wanted = int(GPU_RUN_SECONDS / max(seconds, 1e-7))
        rounds = max(1, min(MAX_CALLS, wanted) // len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for _ in range(rounds):
                for call in calls:
                    call()
        torch.cuda.synchronize()
        return Run(variant, graph.replay, rounds * len(calls))

    @contextmanager
    def building(self) -> Iterator[None]:
        """What is made in here belongs to this timer's stream."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.synchronize()

    def measure(self, run: Run) -> float:
        """Seconds of one run, by the GPU's own clock."""
        return self._events(run.execute)

    def _events(self, execute: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            # The GPU sleeps while the host enqueues, or the gap between the two would be timed.
            torch.cuda._sleep(200_000)
            start.record()
            execute()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


Timer = CpuTimer | GpuTimer


def least_rounds(seconds: float) -> int:
    """Rounds that even the slowest calls get, by what a round takes: three, or two of seconds."""
    return 3 if seconds < 1.0 else 2


def interleave(
    timer: Timer, runs: Sequence[Run], seconds: float, min_rounds: int = MIN_ROUNDS
) -> list[Samples]:
    """Seconds a call of every run, round by round, until the time is used up.

    Every round has an order of its own: who comes next finds in the cache what the one before left.

    Returns:
        An array for each run; entry ``i`` of all of them is round ``i``.
    """
    first = [run.variant.first for run in runs if run.slow and run.variant.counts]
    if len(first) < len(runs) or least_rounds(sum(first)) == least_rounds(0):
        first = []
    # Where a round takes seconds the first calls were one.
    samples = [[seconds] for seconds in first] or [[] for _ in runs]
    for run in runs:  # warm-up: caches, clocks, lazy initialisation
        if not run.slow:
            run.variant.enter()
            timer.measure(run)
    start = time.perf_counter() - sum(first)
    rounds = len(samples[0])
    shuffled = random.Random(0)
    while rounds < MAX_ROUNDS:
        passed = time.perf_counter() - start
        if rounds >= min_rounds and passed > seconds:
            break
        if passed > max(4 * seconds, 0.5) and rounds >= least_rounds(passed / rounds):
            break
        for index in shuffled.sample(range(len(runs)), len(runs)):
            run = runs[index]
            run.variant.enter()
            samples[index].append(timer.measure(run) / run.calls)
        rounds += 1
    fastseq.use_backend("auto")
    torch.set_grad_enabled(True)
    return [torch.tensor(column, dtype=torch.float64) for column in samples]


def wall_seconds(variant: Variant, device: torch.device, expected: float) -> float:
    """Seconds a call takes with the host's share: calls one after another, then a wait.

    Args:
        expected: a call's seconds without the host: of long ones a few do.
    """
    count = max(1, min(20, int(_WALL_SECONDS / max(expected, 1e-6))))
    variant.enter()
    times: list[float] = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            variant.calls[0]()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / count)
    fastseq.use_backend("auto")
    torch.set_grad_enabled(True)
    return statistics.median(times)
