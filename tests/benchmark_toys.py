"""Operators that double, for the tests of the benchmark harness, and time that only they take."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import torch

from benchmarks import timing
from benchmarks.points import sweep
from benchmarks.registry import Benchmark, Cost
from benchmarks.results import Results
from benchmarks.runner import Runner, Settings
from fastseq.testing import Operator, Problem

CPU = torch.device("cpu")


def double(input):
    return {"output": input * 2}


def make(dtype, device, generator, *, count):
    input = torch.randn(count, generator=generator).to(dtype).to(device)
    grad = torch.ones(count, dtype=dtype, device=device)
    return Problem({"input": input}, {"output": grad}, differentiable=("input",))


def toy_benchmark(name="double", ours=double, torchs=double, counts=(64,), rivals=()):
    operator = Operator(name, "toy", "_layer_norm_fwd", make, ours, torchs, ())
    return Benchmark(
        operator,
        {"smoke": tuple({"count": count} for count in counts), "all": ()},
        lambda sizes: str(sizes["count"]),
        lambda problem, mode: Cost(problem.arguments["input"].nbytes),
        lambda: tuple(rivals),
    )


def slow(seconds, function=double):
    def slowed(**arguments):
        time.sleep(seconds)
        return function(**arguments)

    return slowed


class Clock:
    """Time that passes in planted functions alone, a little more or less each: no other process's
    doing shows in it."""

    def __init__(self, monkeypatch):
        self.now, self.jitter = 0.0, itertools.cycle((1.0, 1.01, 0.99, 1.02, 0.98))
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def slow(self, seconds):
        def slowed(**arguments):
            self.now += seconds * next(self.jitter)
            return double(**arguments)

        return slowed


def run_toys(
    benchmarks, *, results=None, budget=None, modes=("inference",), providers=None, threads=(1,)
):
    settings = Settings(
        CPU, modes, threads, "smoke", providers or ["fastseq"], budget, group_seconds=0.02
    )
    results = results or Results(
        {"device": "a CPU", "torch": "2", "commit": "c", "date": "2026"},
        ceilings={str(n): {"copy": 1e10, "matmul": {"fp32": 1e11}} for n in threads},
    )
    Runner(settings, results).run(sweep(benchmarks, "smoke", "cpu", ["fp32"], ["reused"], modes))
    return results
