"""Cross-entropy, bound by memory, and with the vocabulary's GEMM in front, bound by that."""

from __future__ import annotations

from typing import Any

from fastseq.testing import OPERATORS, Problem

from ..registry import Benchmark, Cost, Provider, Sizes, asked, nbytes


def _sizes(*points: tuple[int, int]) -> tuple[Sizes, ...]:
    # No target is ignored: torch does the same work for those, ours would skip them.
    return tuple({"leading": (n,), "classes": c, "ignored": 0.0} for n, c in points)


_SWEEPS = {
    "smoke": _sizes((4, 64), (128, 1000), (64, 8000)),
    "cpu": _sizes((4, 64), (8192, 1000), (2048, 32000), (1024, 50257)),
    "gpu": _sizes(
        (4, 64),
        (65536, 1000),
        (8192, 32000),
        (16384, 32000),
        (8192, 50257),
        (4096, 128256),
        (8192, 128256),
    ),
    "all": _sizes((65536, 10), (4096, 256), (64, 262144)),
}


def _label(sizes: Sizes) -> str:
    return "x".join(str(size) for size in (*sizes["leading"], sizes["classes"]))


def _cost(problem: Problem, mode: str) -> Cost:
    """Logits read; backward, read again and their gradient written. Some 4 operations each."""
    logits, target = problem.arguments["input"], problem.arguments["target"]
    assert logits is not None
    passes = 1 if mode == "fwd" else 2
    return Cost(passes * nbytes(logits) + nbytes(target), 4 * logits.numel())


def _rivals() -> tuple[Provider, ...]:
    found = []
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        def liger(input: Any, target: Any, weight: Any) -> dict[str, Any]:
            # It writes the gradient over its input, which the next call reads: a copy, to be fair
            # to the numbers, and to be told beside them.
            return {"loss": liger_cross_entropy(input.clone(), target, weight)}

        found.append(Provider("liger (and a copy)", liger))
    except ImportError:
        pass
    try:
        from quack import cross_entropy

        def quack(input: Any, target: Any, weight: Any) -> dict[str, Any]:
            return {"loss": cross_entropy(input, target, weight=weight)}

        found.append(Provider("quack", quack))
    except ImportError:
        pass
    return tuple(found)


def _linear_rivals() -> tuple[Provider, ...]:
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except ImportError:
        return ()

    def quack(
        input: Any, linear_weight: Any, target: Any, linear_bias: Any, weight: Any
    ) -> dict[str, Any]:
        if linear_bias is not None or weight is not None:
            raise NotImplementedError("no bias, no class weights")
        return {"loss": chunked_linear_cross_entropy(input, linear_weight, target)}

    return (Provider("quack", quack),)


def _linear_sizes(*points: tuple[int, int, int]) -> tuple[Sizes, ...]:
    return tuple(
        {"leading": (n,), "features": h, "classes": c, "ignored": 0.0} for n, h, c in points
    )


_LINEAR_SWEEPS = {
    "smoke": _linear_sizes((64, 32, 1000)),
    "cpu": _linear_sizes((512, 256, 8000), (1024, 512, 32000)),
    "gpu": _linear_sizes((4096, 512, 32000), (8192, 4096, 32000), (8192, 4096, 128256)),
    "all": _linear_sizes((4096, 512, 32000)),
}


def _linear_label(sizes: Sizes) -> str:
    parts = (*sizes["leading"], sizes["features"], sizes["classes"])
    return "x".join(str(size) for size in parts)


def _linear_cost(problem: Problem, mode: str) -> Cost:
    """One GEMM forward, two backward (ours does all three in forward)."""
    input, weight = problem.arguments["input"], problem.arguments["linear_weight"]
    assert input is not None
    assert weight is not None
    flops = 2 * input.numel() * weight.shape[0]
    tensors = nbytes(input, weight)
    if mode == "fwd":
        return Cost(tensors, flops, matmul=True)
    return Cost(2 * tensors, 2 * flops, matmul=True)


_ASKED = asked(_sizes((2048, 32000)), "fwd+bwd", memory=0.5, fp32=2.0, bf16=2.0)
_LINEAR_ASKED = asked(_linear_sizes((4096, 512, 32000)), "fwd+bwd", memory=0.25, fp32=1.0)

BENCHMARKS = (
    Benchmark(OPERATORS["cross_entropy"], _SWEEPS, _label, _cost, _rivals, _ASKED),
    Benchmark(
        OPERATORS["linear_cross_entropy"],
        _LINEAR_SWEEPS,
        _linear_label,
        _linear_cost,
        _linear_rivals,
        asked=_LINEAR_ASKED,
        slow=True,
    ),
)
