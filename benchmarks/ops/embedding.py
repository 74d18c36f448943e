"""Token and position embedding: bound by memory, so bytes are what counts.

Without dropout: the torch that results are held to draws our mask, which takes it long.
"""

from __future__ import annotations

from fastseq.testing import OPERATORS, Problem

from ..registry import Benchmark, Cost, Sizes, nbytes


def _sizes(*points: tuple[int, int, int, int]) -> tuple[Sizes, ...]:
    return tuple(
        {"shape": (batch, length), "size": size, "tokens": tokens, "places": length}
        for batch, length, size, tokens in points
    )


_SWEEPS = {
    "smoke": _sizes((2, 16, 32, 100)),
    "cpu": _sizes((4, 16, 64, 100), (16, 512, 512, 1000), (8, 1024, 768, 50257)),
    "gpu": _sizes((8, 1024, 768, 50257), (8, 2048, 4096, 32000)),
    "all": _sizes((3, 129, 80, 997)),
}


def _label(sizes: Sizes) -> str:
    return "x".join(str(n) for n in (*sizes["shape"], sizes["size"])) + f" of {sizes['tokens']}"


def _cost(problem: Problem, mode: str) -> Cost:
    """A row read and one written for every token; backward, the tables' gradients written once."""
    arguments = problem.arguments
    grad, position = problem.grad_outputs["output"], arguments["position_table"]
    keys = nbytes(arguments["ids"])
    if mode == "bwd":
        return Cost(nbytes(grad, arguments["token_table"], position) + keys, 2 * grad.numel())
    return Cost(2 * nbytes(grad) + nbytes(position) + keys, grad.numel())


BENCHMARKS = (Benchmark(OPERATORS["token_position_embedding"], _SWEEPS, _label, _cost),)
