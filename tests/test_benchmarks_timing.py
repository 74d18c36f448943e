"""The harness's clocks: a known ratio is found, on a CPU and on a GPU that is not there."""

import ctypes
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from benchmarks import memory, runner, timing
from benchmarks.statistics import noise, ratio, summarise

from .benchmark_toys import CPU, Clock, run_toys, toy_benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_known_ratio_is_found(monkeypatch):
    clock = Clock(monkeypatch)
    results = run_toys([toy_benchmark(ours=clock.slow(0.004), torchs=clock.slow(0.008))])
    row = next(row for row in results.rows if row.provider == "fastseq")
    assert row.milliseconds == pytest.approx(4, rel=0.02)
    assert row.speedup == pytest.approx(2, rel=0.05)
    assert row.p20 <= row.milliseconds <= row.p80
    assert row.rounds >= 7


def test_pairs_cancel_what_slows_both():
    slow_spell = torch.tensor([1.0, 1, 1, 5, 5, 5, 5]).double()
    paired = ratio(2 * slow_spell, slow_spell)
    assert (paired.p20, paired.median, paired.p80) == (2, 2, 2)
    assert summarise(slow_spell).median == 5
    assert noise(paired, paired, 7) == 1  # a baseline that is off from itself by 100 %


@pytest.mark.skipif(not memory.set_allocation("reused"), reason="no glibc")
def test_reused_blocks_do_not_fault():
    """In a process of its own: what the heap holds already would tell on it."""
    code = (
        "import torch; from benchmarks import memory\n"
        "call = lambda: torch.empty(2**22).fill_(1.0)\n"
        "memory.set_allocation('reused'); call(); call()\n"
        "faults = memory.page_faults(call); assert faults < 50, faults"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_slow_calls_get_few_rounds_and_one_first_call(monkeypatch):
    """Their first call shows the memory, with the most threads; the baseline is timed but once."""
    clock, called = Clock(monkeypatch), []

    def counted(seconds):
        takes = clock.slow(seconds)

        def call(**arguments):
            called.append(torch.get_num_threads())
            return takes(**arguments)

        return call

    peaks = []
    monkeypatch.setattr(runner.memory, "peak_bytes", lambda call, device: peaks.append(call()) or 7)
    monkeypatch.setattr(runner, "time", timing.time)  # a first call's time too
    theirs = counted(1.5)
    results = run_toys([toy_benchmark(ours=clock.slow(0.5), torchs=theirs)], threads=(1, 2))
    assert len(peaks) == 2  # torch's and ours
    assert {row.rounds for row in results.rows} == {2}
    assert [row.threads for row in results.rows] == [2, 2, 1, 1]
    assert {row.peak_bytes for row in results.rows} == {7}
    # The probe, the oracle, a first call that is a round, one more, and two with one thread.
    assert called == [2] * 4 + [1] * 2
    assert [timing.least_rounds(seconds) for seconds in (0.1, 0.9, 1.1)] == [3, 3, 2]


def _bytes_left_unmerged():
    """What malloc keeps of small freed blocks for its next large request to merge."""

    class Mallinfo2(ctypes.Structure):
        _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    return mallinfo2().field6  # fsmblks


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc of 2.33")
@pytest.mark.parametrize("policy", memory.CPU_POLICIES)
def test_a_run_does_not_clean_up_after_the_one_before(policy):
    """As graphs of many nodes do, the first run leaves thousands of small free blocks."""
    memory.set_allocation(policy)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    left = []

    def leave():
        for block in [libc.malloc(64) for _ in range(2000)]:
            libc.free(block)
        left.append(_bytes_left_unmerged())

    timer = timing.CpuTimer()
    for call in (leave, lambda: left.append(_bytes_left_unmerged())):
        timer.measure(timing.Run(timing.Variant("", [call], "auto", False), call, 1))
    assert left[0] > 100_000
    assert left[1] < 10_000


def test_peak_memory_of_a_cpu_call():
    source = torch.ones(2**18)
    peak = memory.peak_bytes(lambda: (source + 1) + 1, CPU)
    assert 2 * source.nbytes <= peak < 2.1 * source.nbytes


class Gpu:
    """As much of ``torch.cuda`` as the timer uses, with a clock of its own, in milliseconds."""

    def __init__(self):
        self.now, self.captured, self.stream_now, self.log = 0.0, None, None, []

    def kernel(self, name, milliseconds):
        assert self.stream_now == "timer's", "a kernel on another stream cannot be captured"
        if self.captured is not None:
            self.captured.append((name, milliseconds))
        else:
            self.now += milliseconds
            self.log.append(name)

    def install(self, monkeypatch):
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                assert gpu.stream_now == "timer's"
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                assert gpu.stream_now == "timer's"
                assert gpu.captured is None
                for name, milliseconds in self.nodes:
                    gpu.kernel(name, milliseconds)

        @contextmanager
        def stream(name):
            before, gpu.stream_now = gpu.stream_now, name
            yield
            gpu.stream_now = before

        @contextmanager
        def graph(graph, stream):
            gpu.captured, before = [], gpu.stream_now
            gpu.stream_now = stream
            yield
            graph.nodes, gpu.captured, gpu.stream_now = gpu.captured, None, before

        fakes = {"Stream": lambda: "timer's", "stream": stream, "Event": Event, "graph": graph}
        fakes |= {"CUDAGraph": Graph, "synchronize": lambda: None, "_sleep": lambda cycles: None}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def variant(self, name, milliseconds, copies=3):
        calls = [lambda i=i: self.kernel(f"{name}{i}", milliseconds) for i in range(copies)]
        return timing.Variant(name, calls, "auto", False)


def test_a_graph_is_replayed_on_all_copies_when_cold_and_on_one_when_hot(monkeypatch):
    gpu = Gpu()
    gpu.install(monkeypatch)
    timer = timing.GpuTimer()
    for policy, names in (("cold", {"a0", "a1", "a2"}), ("hot", {"a0"})):
        run = timer.prepare(gpu.variant("a", 0.01), policy)
        gpu.log.clear()
        assert timer.measure(run) == pytest.approx(run.calls * 1e-5)
        assert len(gpu.log) == run.calls
        assert 90 <= run.calls <= 100  # a millisecond's worth
        assert {name: gpu.log.count(name) for name in names} == dict.fromkeys(
            names, run.calls // len(names)
        )
    assert timer.prepare(gpu.variant("a", 50.0), "cold").calls == 3  # long calls: each copy once
    assert timer.prepare(gpu.variant("a", 1e-7), "hot").calls == timing.MAX_CALLS


def test_ratios_and_wall_time_on_a_gpu(monkeypatch):
    gpu = Gpu()
    gpu.install(monkeypatch)
    timer = timing.GpuTimer()
    runs = [timer.prepare(gpu.variant(n, t), "cold") for n, t in (("a", 0.02), ("b", 0.005))]
    slow, fast = timing.interleave(timer, runs, 0.001)
    assert len(slow) == len(fast) >= timing.MIN_ROUNDS
    assert ratio(slow, fast).median == pytest.approx(4)
    monkeypatch.setattr(gpu, "kernel", lambda *_: gpu.log.append("call"))
    gpu.log.clear()
    assert timing.wall_seconds(gpu.variant("a", 0.0), torch.device("cuda"), 1e-5) > 0
    assert len(gpu.log) == 5 * 20
    gpu.log.clear()
    timing.wall_seconds(gpu.variant("a", 0.0), torch.device("cuda"), 1.0)
    assert len(gpu.log) == 5
