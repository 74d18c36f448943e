"""The rungs of the test ladder that every family climbs: its cases, instruction sets, threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.testing import OPERATORS, Case
from fastseq.testing.check import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CPU = torch.device("cpu")
#: The narrowest of processors that each runs on, as `backends()` names it.
_RUNS_ON = {"avx512": "avx512", "avx2": "avx", "generic": ""}
INSTRUCTION_SETS = list(_RUNS_ON)


def cases(name: str, *, tiny: bool = False, quick: bool = False) -> list[Case]:
    """An operator's cases that are not large; the tiny ones, the quick ones."""
    found = [case for case in OPERATORS[name].cases if not case.large]
    return [case for case in found if case.tiny >= tiny and case.quick >= quick]


def expect_pass(name: str, backend: str, dtype: torch.dtype, chosen: Iterable[Case]) -> None:
    """Every case passes: ratios to torch's error, determinism, poison, batch invariance."""
    chosen = [case for case in chosen if dtype in case.dtypes]
    if not chosen:
        pytest.skip(f"no case of {name} is in {dtype}")
    ran = 0
    for case in chosen:
        outcome = check(OPERATORS[name], backend, dtype, case, CPU)
        assert not outcome.failures, (name, backend, dtype, case.name, outcome.failures)
        ran += outcome.skipped is None
    assert ran


def in_a_process(code: str, instruction_set: str, *arguments: str) -> str:
    """What the code prints where the CPU kernels are those of an instruction set ("": the best).

    A process has one; this one has the widest that the machine runs.
    """
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "FASTSEQ_CPU_ISA": instruction_set},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def expect_verified(instruction_set: str, family: str, *options: str) -> None:
    """`fastseq verify` passes for the family's CPU kernels of the instruction set."""
    available = fastseq.backends()["cpu"]
    if _RUNS_ON[instruction_set] not in available:
        pytest.skip(f"this machine has {available}")
    code = (
        "import fastseq, sys\n"
        f"assert {instruction_set!r} in fastseq.backends()['cpu'], fastseq.backends()\n"
        "from fastseq.cli import main\n"
        "sys.exit(main(['verify', '--backend', 'cpu', *sys.argv[1:]]))"
    )
    in_a_process(code, instruction_set, "--family", family, *options)


def by_threads(call: Callable[[], Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """What the call gives with one thread, two and three."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


def expect_same_bits(results: Iterable[Sequence[Tensor]]) -> None:
    for one, other in pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
