"""Appending to a key/value cache: by the launch where few tokens come, by memory where many do.

Measured in place: every call writes the same tokens to the same places.
"""

from __future__ import annotations

from fastseq.testing import OPERATORS, Problem

from ..registry import Benchmark, Cost, Sizes, nbytes


def _sizes(batch: int, new: int, room: int, *, heads: int = 8, head_dim: int = 128) -> Sizes:
    """Entries of different lengths, as where sequences of a batch began at different times."""
    lengths = tuple((room - new) * (b + 1) // batch for b in range(batch))
    return {"lengths": lengths, "new": new, "room": room, "heads": heads, "head_dim": head_dim}


_SWEEPS = {
    "smoke": (_sizes(2, 1, 64, heads=2, head_dim=16),),
    "cpu": (_sizes(1, 1, 2048), _sizes(16, 1, 2048), _sizes(4, 512, 2048)),
    "gpu": (_sizes(1, 1, 8192), _sizes(64, 1, 8192), _sizes(16, 1024, 8192)),
    "all": (_sizes(3, 4, 1000, head_dim=80),),
}


def _label(sizes: Sizes) -> str:
    words = f"{len(sizes['lengths'])}x{sizes['heads']}x{sizes['new']}x{sizes['head_dim']}"
    return f"{words} into {sizes['room']}"


def _cost(problem: Problem, mode: str) -> Cost:
    """New rows are read and written."""
    arguments = problem.arguments
    return Cost(2 * nbytes(arguments["key"], arguments["value"], arguments["lengths"]))


BENCHMARK = Benchmark(OPERATORS["append_to_cache"], _SWEEPS, _label, _cost, modes=("inference",))
