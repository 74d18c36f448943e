"""Rotary position embedding: bound by memory, so bytes are what counts."""

from __future__ import annotations

from fastseq.testing import OPERATORS, Problem

from ..registry import Benchmark, Cost, Sizes, nbytes


def _sizes(*shapes: tuple[int, ...]) -> tuple[Sizes, ...]:
    return tuple({"shape": s, "interleaved": i} for s in shapes for i in (False, True))


_SWEEPS = {
    "smoke": _sizes((1, 2, 64, 32)),
    "cpu": _sizes((1, 8, 1, 64), (2, 8, 512, 64), (4, 16, 1024, 128)),
    "gpu": _sizes((8, 32, 2048, 128), (1, 32, 8192, 128)),
    "all": _sizes((2, 3, 129, 80)),
}


def _label(sizes: Sizes) -> str:
    words = "x".join(str(size) for size in sizes["shape"])
    return f"{words} interleaved" if sizes["interleaved"] else words


def _cost(problem: Problem, mode: str) -> Cost:
    """Read and written once in either direction, with the tables; 3 operations a number."""
    input = problem.arguments["input"]
    assert input is not None
    tables = nbytes(problem.arguments["cos"], problem.arguments["sin"])
    return Cost(2 * nbytes(input) + tables, 3 * input.numel())


BENCHMARKS = (Benchmark(OPERATORS["rotary_embedding"], _SWEEPS, _label, _cost),)
