"""Additive attention: bound by hyperbolic tangents, where torch's is by the tensor it takes them
of."""

from __future__ import annotations

from fastseq.testing import OPERATORS, Problem

from ..registry import Benchmark, Cost, Sizes, asked, nbytes


def _sizes(*shapes: tuple[int, int, int, int, int]) -> tuple[Sizes, ...]:
    names = ("batch", "queries", "keys", "hidden", "value")
    return tuple(dict(zip(names, shape, strict=True)) for shape in shapes)


# One query of a decoder against its keys; whole sequences.
_SWEEPS = {
    "smoke": _sizes((1, 4, 16, 16, 16), (2, 64, 64, 64, 64)),
    "cpu": _sizes((4, 1, 512, 256, 256), (1, 512, 512, 256, 256), (4, 256, 256, 256, 256)),
    "gpu": _sizes((32, 1, 1024, 512, 512), (4, 512, 512, 256, 256), (4, 1024, 1024, 256, 256)),
    "all": _sizes((2, 129, 257, 100, 60)),
}


def _label(sizes: Sizes) -> str:
    batch, queries, keys, hidden, _ = sizes.values()
    return f"{batch} x {queries} x {keys} x {hidden}"


def _cost(problem: Problem, mode: str) -> Cost:
    """Inputs and output once, and for the backward their gradients too; an addition, a tanh and a
    multiply-add an element of ``[batch, queries, keys, hidden]`` and twice that backward."""
    query, key = problem.arguments["query"], problem.arguments["key"]
    value, grad = problem.arguments["value"], problem.grad_outputs["output"]
    assert query is not None
    assert key is not None
    elements = query.numel() * key.shape[1]
    moved = nbytes(query, key, value, grad)
    return Cost(moved, 4 * elements) if mode == "fwd" else Cost(2 * moved, 12 * elements)


_ASKED = asked(_sizes((1, 512, 512, 256, 256)), "inference", "bwd", memory=1 / 20, fp32=5.0)

BENCHMARKS = (
    Benchmark(OPERATORS["additive_attention"], _SWEEPS, _label, _cost, asked=_ASKED, slow=True),
)
