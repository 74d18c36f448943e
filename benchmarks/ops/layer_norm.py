"""LayerNorm, RMSNorm and their AddNorm forms: all bound by memory, so bytes are what counts."""

from __future__ import annotations

from typing import Any

from fastseq.testing import OPERATORS, Problem

from ..registry import Benchmark, Cost, Provider, Sizes, asked, nbytes


def _sizes(*points: tuple[int, int]) -> tuple[Sizes, ...]:
    return tuple({"leading": (rows,), "normalized": (length,)} for rows, length in points)


_LARGE = _sizes((32768, 256), (8192, 1024), (2048, 4096))

# 4x64 is all overhead: Python, dispatch, allocation.
_SWEEPS = {
    "smoke": _sizes((4, 64), (512, 256), (64, 4096)),
    "cpu": (*_sizes((4, 64)), *_LARGE),
    "gpu": _sizes(
        (4, 64),
        (65536, 256),
        (8192, 1024),
        (32768, 1024),
        (8192, 4096),
        (32768, 4096),
        (16384, 8192),
        (2048, 16384),
        (512, 65536),
    ),
    "all": _sizes((64, 131072), (4096, 768), (1, 4096), (8191, 1023)),
}


def _label(sizes: Sizes) -> str:
    return "x".join(str(size) for size in (*sizes["leading"], *sizes["normalized"]))


def _cost(problem: Problem, mode: str) -> Cost:
    """Each tensor once.

    Forward reads inputs and parameters and writes outputs. Backward reads what was normalized and
    the gradients of the outputs, and writes one gradient for the stream (input and residual share
    it) and one for each parameter; some 9 and 14 operations an element.
    """
    arguments, grads = problem.arguments, problem.grad_outputs
    parameters = nbytes(arguments.get("weight"), arguments.get("bias"))
    stream = arguments.get("residual", arguments["input"])
    elements = grads["output"].numel()
    if mode == "fwd":
        inputs = nbytes(arguments["input"], arguments.get("residual"))
        return Cost(inputs + parameters + nbytes(*grads.values()), 9 * elements)
    weight = nbytes(arguments.get("weight"))
    return Cost(2 * nbytes(stream) + nbytes(*grads.values()) + weight + parameters, 14 * elements)


# --- third parties, where they are installed -----------------------------------------------------


def _layer_norm_rivals() -> tuple[Provider, ...]:
    try:
        from liger_kernel.transformers.functional import liger_layer_norm
    except ImportError:
        return ()

    def liger(input: Any, normalized_shape: Any, weight: Any, bias: Any) -> dict[str, Any]:
        return {"output": liger_layer_norm(input, weight, bias, 1e-5)}

    return (Provider("liger", liger),)


def _rms_norm_rivals() -> tuple[Provider, ...]:
    found = []
    try:
        from liger_kernel.transformers.functional import liger_rms_norm

        def liger(input: Any, normalized_shape: Any, weight: Any, eps: float) -> dict[str, Any]:
            # In place it would write the gradient over its input, which the next call reads.
            return {"output": liger_rms_norm(input, weight, eps, 0.0, "llama", False)}

        found.append(Provider("liger", liger))
    except ImportError:
        pass
    try:
        from quack import rmsnorm

        def quack(input: Any, normalized_shape: Any, weight: Any, eps: float) -> dict[str, Any]:
            return {"output": rmsnorm(input, weight, eps=eps)}

        found.append(Provider("quack", quack))
    except ImportError:
        pass
    return tuple(found)


def _add_rms_norm_rivals() -> tuple[Provider, ...]:
    found = []
    try:
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm

        def liger(
            input: Any, residual: Any, normalized_shape: Any, weight: Any, eps: float
        ) -> dict[str, Any]:
            output, new_residual = liger_fused_add_rms_norm(
                input, residual, weight, eps, 0.0, "llama", False
            )
            return {"output": output, "new_residual": new_residual}

        found.append(Provider("liger", liger))
    except ImportError:
        pass
    try:
        from quack import rmsnorm

        def quack(
            input: Any, residual: Any, normalized_shape: Any, weight: Any, eps: float
        ) -> dict[str, Any]:
            output, new_residual = rmsnorm(input, weight, residual=residual, eps=eps, prenorm=True)
            return {"output": output, "new_residual": new_residual}

        found.append(Provider("quack", quack))
    except ImportError:
        pass
    return tuple(found)


_RIVALS = {
    "layer_norm": _layer_norm_rivals,
    "rms_norm": _rms_norm_rivals,
    "add_rms_norm": _add_rms_norm_rivals,
}

_ASKED = {
    "layer_norm": (
        *asked(_LARGE, "inference", fp32=1.0, bf16=2.0),
        *asked(_LARGE, "bwd", fp32=1.1, bf16=2.5),
    ),
    "rms_norm": (
        *asked(_LARGE, "inference", fp32=2.5, bf16=6.0),
        *asked(_LARGE, "bwd", fp32=4.0, bf16=8.0),
    ),
    "add_layer_norm": asked(_LARGE, "fwd+bwd", fp32=1.3, bf16=2.0),
}

BENCHMARKS = tuple(
    Benchmark(
        OPERATORS[name], _SWEEPS, _label, _cost, _RIVALS.get(name, tuple), _ASKED.get(name, ())
    )
    for name in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
)
