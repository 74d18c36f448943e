"""The feed-forward block: two products, and a pass between them that memory bounds on a GPU.

Without dropout: the torch that results are held to draws our mask, which takes it long.
"""

from __future__ import annotations

from fastseq.testing import OPERATORS, Problem

from ..registry import Benchmark, Cost, Sizes, nbytes


def _sizes(*points: tuple[int, int, int, str]) -> tuple[Sizes, ...]:
    return tuple(
        {"leading": (rows,), "size": size, "wide": wide, "activation": activation}
        for rows, size, wide, activation in points
    )


_SWEEPS = {
    "smoke": _sizes((8, 32, 64, "gelu"), (8, 32, 64, "swiglu")),
    "cpu": _sizes(
        (8, 64, 256, "gelu"),
        (2048, 512, 2048, "relu"),
        (2048, 512, 2048, "gelu"),
        (2048, 512, 1408, "swiglu"),
    ),
    "gpu": _sizes(
        (8192, 1024, 4096, "relu"),
        (8192, 1024, 4096, "gelu"),
        (16384, 4096, 11008, "swiglu"),
    ),
    "all": _sizes((64, 512, 2048, "silu"), (2048, 512, 2048, "gelu_tanh")),
}


def _label(sizes: Sizes) -> str:
    words = "x".join(str(size) for size in (*sizes["leading"], sizes["size"], sizes["wide"]))
    return f"{words} {sizes['activation']}"


def _cost(problem: Problem, mode: str) -> Cost:
    """Two products forward and four backward; the wide tensors written once and read once.

    Forward: the first product, and what goes into the second. Backward: the gradient of the latter
    and of the former, and the latter again.
    """
    arguments, grads = problem.arguments, problem.grad_outputs
    input, weight1, weight2 = (arguments[name] for name in ("input", "weight1", "weight2"))
    assert input is not None
    assert weight1 is not None
    assert weight2 is not None
    rows = input.numel() // input.shape[-1]
    first, second = (rows * weight.shape[dim] for weight, dim in ((weight1, 0), (weight2, 1)))
    flops = 2 * rows * (weight1.numel() + weight2.numel())
    ends = nbytes(input, weight1, weight2, *grads.values())
    if mode == "fwd":
        return Cost(ends + 2 * input.element_size() * (first + second), flops)
    return Cost(2 * ends + input.element_size() * (3 * first + 4 * second), 2 * flops)


BENCHMARKS = (Benchmark(OPERATORS["feed_forward"], _SWEEPS, _label, _cost),)
