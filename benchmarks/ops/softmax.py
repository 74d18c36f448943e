"""Softmax, its logarithm and the masked softmax: all bound by memory, so bytes are what counts."""

from __future__ import annotations

from typing import Any

from fastseq.testing import OPERATORS, Problem

from ..registry import Benchmark, Cost, Provider, Sizes, asked, nbytes


def _rows(*shapes: tuple[int, ...]) -> tuple[Sizes, ...]:
    return tuple({"shape": shape} for shape in shapes)


def _first(*shapes: tuple[int, ...]) -> tuple[Sizes, ...]:
    return tuple({"shape": shape, "dim": 0} for shape in shapes)


def _scores(*shapes: tuple[int, ...]) -> tuple[Sizes, ...]:
    """Attention scores ``[batch, heads, rows, columns]`` with padding, a bias, and causal."""
    found: list[Sizes] = []
    for batch, heads, rows, columns in shapes:
        common = {"shape": (batch, heads, rows, columns), "scale": 0.125}
        found += (
            {**common, "mask": (batch, 1, 1, columns), "kind": "padding"},
            {**common, "mask": (1, heads, rows, columns), "kind": "additive"},
            {**common, "is_causal": True},
        )
    return tuple(found)


_LARGE = _rows((16384, 256), (4096, 1024), (1024, 4096))
_LARGE_FIRST = _first((4096, 1024), (1024, 4096))
_LARGE_MASKED = _scores((4, 8, 512, 512))

# 4x64 is all overhead: Python, dispatch, allocation.
_SWEEPS = {
    "smoke": _rows((4, 64), (512, 256), (64, 4096)),
    "cpu": (*_rows((4, 64)), *_LARGE),
    "gpu": _rows(
        (4, 64),
        (65536, 256),
        (32768, 1024),
        (8192, 4096),
        (32768, 4096),
        (16384, 8192),
        (4096, 32768),
        (512, 131072),
    ),
    "all": _rows((64, 131072), (1, 4096), (8191, 1023)),
}
_FIRST_SWEEPS = {
    "smoke": _first((64, 256)),
    "cpu": _LARGE_FIRST,
    "gpu": _first((128, 65536), (1024, 16384), (8192, 4096)),
    "all": _first((1023, 1023)),
}
_MASKED_SWEEPS = {
    "smoke": _scores((1, 2, 64, 64)),
    "cpu": _LARGE_MASKED,
    "gpu": _scores((4, 16, 1024, 1024), (8, 16, 2048, 2048)),
    "all": _scores((2, 3, 127, 129)),
}


def _label(sizes: Sizes) -> str:
    words = ["x".join(str(size) for size in sizes["shape"])]
    words += [sizes["kind"]] if "kind" in sizes else []
    words += ["causal"] if sizes.get("is_causal") else []
    return " ".join(words)


def _cost(problem: Problem, mode: str) -> Cost:
    """Each tensor once: forward reads input and mask and writes the output, backward reads output
    and gradient and writes the input's; some 5 and 4 operations an element."""
    input, grad = problem.arguments["input"], problem.grad_outputs["output"]
    if mode == "fwd":
        return Cost(nbytes(input, problem.arguments.get("mask"), grad), 5 * grad.numel())
    return Cost(nbytes(input) + 2 * nbytes(grad), 4 * grad.numel())


def _rivals() -> tuple[Provider, ...]:
    try:
        from quack import softmax
    except ImportError:
        return ()

    def quack(input: Any, dim: int, dtype: Any) -> dict[str, Any]:
        if dim != -1 or input.dim() != 2 or dtype is not None:
            raise NotImplementedError("rows of a matrix only, in their own dtype")
        return {"output": softmax(input)}

    return (Provider("quack", quack),)


_ASKED = {
    "softmax": asked(_LARGE, "inference", fp32=1.2, bf16=2.0),
    "softmax_dim0": (
        *asked(_LARGE_FIRST, "inference", fp32=4.0, bf16=4.0),
        *asked(_LARGE_FIRST, "bwd", fp32=3.0, bf16=3.0),
    ),
    "masked_softmax": asked(_LARGE_MASKED, "inference", "fwd+bwd", fp32=3.0, bf16=3.0),
}

BENCHMARKS = tuple(
    Benchmark(
        OPERATORS[name],
        sweeps,
        _label,
        _cost,
        _rivals if name == "softmax" else tuple,
        asked=_ASKED.get(name, ()),
    )
    for name, sweeps in (
        ("softmax", _SWEEPS),
        ("softmax_dim0", _FIRST_SWEEPS),
        ("log_softmax", _SWEEPS),
        ("masked_softmax", _MASKED_SWEEPS),
    )
)
