"""``python -m benchmarks overhead``: instructions of a tiny call, counted by callgrind.

A call on four rows of 64 numbers is all overhead: Python, dispatch, allocation. Counts are the same
on a busy machine, so that a change shows which no clock would. Valgrind emulates every instruction,
the imports' too: a minute for each count.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastseq.testing import make_problem

from .ops import benchmarks_of
from .registry import DTYPES

_ROOT = Path(__file__).resolve().parent.parent
_CALLS = 50


def call_of(name: str, provider: str) -> Callable[[], Any]:
    """A call of an operator at its smallest size, in fp32 on the CPU."""
    benchmark = next(b for b in benchmarks_of() if b.operator.name == name)
    sizes = next(iter(benchmark.sizes_of("smoke", "cpu")))
    problem = make_problem(benchmark.operator, sizes, DTYPES["fp32"], "cpu")
    function = benchmark.operator.ours if provider == "fastseq" else benchmark.operator.torch
    arguments = {**problem.arguments, **problem.options}
    return lambda: function(**arguments)


def instructions(name: str, provider: str) -> int:
    """Instructions of one call, those of the interpreter's garbage aside."""
    from torch.utils.benchmark import Timer

    timer = Timer(
        "call()",
        setup=(
            f"import sys; sys.path.insert(0, {str(_ROOT)!r})\n"
            "import torch; torch.set_num_threads(1); torch.set_grad_enabled(False)\n"
            f"from benchmarks.overhead import call_of; call = call_of({name!r}, {provider!r})"
        ),
    )
    counted = timer.collect_callgrind(number=_CALLS, collect_baseline=False)
    return int(counted.counts(denoise=True)) // _CALLS


def main(arguments: list[str]) -> int:
    """Count and print; 2 where valgrind cannot run."""
    names = [benchmark.operator.name for benchmark in benchmarks_of()]
    parser = argparse.ArgumentParser(prog="python -m benchmarks overhead", description=__doc__)
    parser.add_argument("operators", nargs="*", default=["layer_norm"], help=", ".join(names))
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.operators) - set(names))
    if unknown:
        parser.error(f"unknown operator {', '.join(unknown)}: expected some of {', '.join(names)}")
    # torch starts "python" under valgrind: this one, whatever comes first in PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    table = Table("operator", "torch", "fastseq", title="instructions of a call, no gradient")
    try:
        for name in options.operators:
            counts = [instructions(name, provider) for provider in ("torch", "fastseq")]
            table.add_row(name, *(f"{count:,}" for count in counts))
    except (OSError, RuntimeError) as error:
        print(f"benchmarks overhead: valgrind cannot run here: {error}", file=sys.stderr)
        return 2
    Console().print(table)
    return 0
