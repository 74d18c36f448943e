"""``python -m benchmarks overhead``: what a tiny call costs, in microseconds and in instructions.

A call on four rows of 64 numbers is all overhead: Python, dispatch, allocation. Times are of one
thread's own clock, torch's and fastseq's in turn. Instructions are counted by callgrind: they are
the same on a busy machine, so that a change shows which no clock would. Valgrind emulates every
instruction, the imports' too: a minute for each count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastseq.testing import make_problem

from .console import Console, Table
from .ops import benchmarks_of
from .registry import DTYPES

_ROOT = Path(__file__).resolve().parent.parent
_CALLS, _WALL_CALLS, _ROUNDS = 50, 500, 25
_PROVIDERS = ("torch", "fastseq")
#: Microseconds that a call may take at most: without a gradient recorded, and with.
ASKED = {"layer_norm": (12.0, 25.0)}


def call_of(name: str, provider: str, gradient: bool = False) -> Callable[[], Any]:
    """A call of an operator at its smallest size, in fp32 on the CPU; autograd records or not."""
    benchmark = next(b for b in benchmarks_of() if b.operator.name == name)
    sizes = next(iter(benchmark.sizes_of("smoke", "cpu")))
    problem = make_problem(benchmark.operator, sizes, DTYPES["fp32"], "cpu")
    function = benchmark.operator.ours if provider == "fastseq" else benchmark.operator.torch
    arguments = {**(problem.leaves() if gradient else problem.arguments), **problem.options}
    return lambda: function(**arguments)


def microseconds(name: str, gradient: bool) -> list[float]:
    """Of a call of each provider, in turn on one thread: medians of the rounds."""
    calls = [call_of(name, provider, gradient) for provider in _PROVIDERS]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rounds = []
    with torch.set_grad_enabled(gradient):
        for _ in range(_ROUNDS):
            taken = []
            for call in calls:
                start = time.thread_time()
                for _ in range(_WALL_CALLS):
                    call()
                taken.append((time.thread_time() - start) / _WALL_CALLS * 1e6)
            rounds.append(taken)
    torch.set_num_threads(threads)
    return [statistics.median(column) for column in zip(*rounds[1:], strict=True)]


def instructions(name: str, provider: str, gradient: bool) -> int:
    """Instructions of one call, those of the interpreter's garbage aside."""
    from torch.utils.benchmark import Timer

    wanted = f"{name!r}, {provider!r}, {gradient}"
    timer = Timer(
        "call()",
        setup=(
            f"import sys; sys.path.insert(0, {str(_ROOT)!r})\n"
            f"import torch; torch.set_num_threads(1); torch.set_grad_enabled({gradient})\n"
            f"from benchmarks.overhead import call_of; call = call_of({wanted})"
        ),
    )
    counted = timer.collect_callgrind(number=_CALLS, collect_baseline=False)
    return int(counted.counts(denoise=True)) // _CALLS


def main(arguments: list[str]) -> int:
    """Measure, count and print; 1 where a call takes longer than asked, 2 without valgrind."""
    names = [benchmark.operator.name for benchmark in benchmarks_of()]
    parser = argparse.ArgumentParser(prog="python -m benchmarks overhead", description=__doc__)
    parser.add_argument("operators", nargs="*", default=["layer_norm"], help=", ".join(names))
    parser.add_argument("--wall", action="store_true", help="times alone, no callgrind")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.operators) - set(names))
    if unknown:
        parser.error(f"unknown operator {', '.join(unknown)}: expected some of {', '.join(names)}")
    # torch starts "python" under valgrind: this one, whatever comes first in PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    table = Table(title="a call of four rows of 64", title_justify="left")
    table.add_column("operator")
    table.add_column("gradient")
    for column in ("torch", "fastseq", "asked", "torch: instructions", "fastseq: instructions"):
        table.add_column(column, justify="right")
    status = 0
    for name in options.operators:
        for gradient in (False, True):
            times = microseconds(name, gradient)
            asked = ASKED.get(name, (float("inf"),) * 2)[gradient]
            status = max(status, int(times[1] > asked))
            counts = ["", ""]
            if not options.wall:
                try:
                    found = [instructions(name, provider, gradient) for provider in _PROVIDERS]
                    counts = [f"{count:,}" for count in found]
                except (OSError, RuntimeError) as error:
                    print(f"benchmarks overhead: valgrind cannot run: {error}", file=sys.stderr)
                    options.wall, status = True, 2
            cells = [f"{value:.1f} us" for value in times]
            wanted = f"{asked:g} us" if name in ASKED else ""
            table.add_row(name, "recorded" if gradient else "none", *cells, wanted, *counts)
    Console().print(table)
    return status
