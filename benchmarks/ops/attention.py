"""Attention: bound by its matrix products, decoding by memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastseq.testing import OPERATORS, Problem

from ..registry import Benchmark, Cost, Provider, Sizes, nbytes
from . import append_to_cache


def _sizes(
    *points: tuple[int, int, int, int], kinds: dict[str, Sizes], drop_in: bool = True
) -> tuple[Sizes, ...]:
    """``(batch, heads, length, head_dim)`` for each kind of attention."""
    common: Sizes = {"drop_in": True} if drop_in else {}
    return tuple(
        {"batch": b, "heads": h, "lengths": (n, n), "head_dim": d, **common, **more}
        for b, h, n, d in points
        for more in kinds.values()
    )


def _biased(batch: int, heads: int, length: int, head_dim: int) -> tuple[Sizes, ...]:
    bias = {"bias": (1, heads, length, length)}
    return _sizes((batch, heads, length, head_dim), kinds={"": bias}, drop_in=False)


_BOTH: dict[str, Sizes] = {"full": {}, "causal": {"is_causal": True}}
_MASKED: dict[str, Sizes] = {**_BOTH, "padding": {"mask": "padding"}}
_SWEEPS = {
    "smoke": _sizes((1, 2, 128, 32), kinds=_MASKED),
    "cpu": _sizes((1, 8, 2048, 64), kinds=_MASKED),
    # 16 thousand tokens each, as the papers have it.
    "gpu": (
        *_sizes((16, 32, 1024, 64), (2, 32, 8192, 64), kinds=_BOTH),
        *_sizes((16, 16, 1024, 128), (4, 16, 4096, 128), (2, 16, 8192, 128), kinds=_MASKED),
        *_sizes((1, 16, 16384, 128), kinds=_BOTH),
    ),
    "all": _sizes((1, 8, 1000, 80), (2, 16, 512, 64), kinds=_MASKED),
}
#: What makes others take the way through the whole matrix of scores.
_HARD = {
    "cpu": (
        {"lengths": (2048, 2048), "heads": 8, "batch": 1, "head_dim": 64, "dropout_p": 0.1},
        {"lengths": (2048, 2048), "heads": 8, "batch": 1, "head_dim": 64, "value_dim": 128},
        {"lengths": (1, 2048), "heads": 8, "batch": 1, "head_dim": 64},
        {"lengths": (1, 8192), "heads": 32, "key_heads": 8, "batch": 4, "head_dim": 128},
    ),
    "smoke": ({"lengths": (64, 64), "dropout_p": 0.1}, {"lengths": (1, 200)}),
    "gpu": (
        *(
            {"lengths": (4096, 4096), "heads": 16, "batch": 4, "head_dim": 128, **more}
            for more in (
                {"dropout_p": 0.1},
                {"softcap": 30.0, "causal": True},
                {"window": (512, 0)},
                {"alibi": True, "causal": True},
                {"key_heads": 4, "causal": True},
            )
        ),
        {"lengths": (1, 32768), "heads": 32, "key_heads": 8, "batch": 1, "head_dim": 128},
        {"lengths": (1, 8192), "heads": 32, "key_heads": 8, "batch": 16, "head_dim": 128},
    ),
    "all": (),
}
_BIASED = {
    "cpu": _biased(1, 8, 2048, 64),
    "smoke": _biased(1, 2, 64, 16),
    "gpu": (*_biased(8, 16, 1024, 64), *_biased(4, 16, 2048, 128)),
    "all": (),
}


def _label(sizes: Sizes) -> str:
    queries, keys = sizes["lengths"]
    length = str(queries) if queries == keys else f"{queries}:{keys}"
    heads = str(sizes.get("heads", 2))
    if "key_heads" in sizes:
        heads += f":{sizes['key_heads']}"
    words = [f"{sizes.get('batch', 2)}x{heads}x{length}x{sizes.get('head_dim', 16)}"]
    known = ("lengths", "heads", "key_heads", "batch", "head_dim", "drop_in")
    words += [f"{k} {v}" if v is not True else k for k, v in sizes.items() if k not in known]
    return " ".join(words)


def _pairs(problem: Problem) -> int:
    """Queries times the keys they see, all heads."""
    query, key = problem.arguments["query"], problem.arguments["key"]
    assert query is not None
    assert key is not None
    queries, keys = query.shape[2], key.shape[2]
    heads = query.shape[0] * query.shape[1]
    relative = torch.arange(keys) - torch.arange(queries)[:, None]
    seen = torch.ones_like(relative, dtype=torch.bool)
    options = problem.options
    if options.get("causal") or options.get("is_causal"):
        seen &= relative <= 0
    left, right = options.get("window") or (None, None)
    if left is not None:
        seen &= relative >= -left
    if right is not None:
        seen &= relative <= right
    return heads * int(seen.sum())


def _cost(problem: Problem, mode: str) -> Cost:
    """2 products of every pair forward, 5 backward (the scores are drawn again); each tensor once.

    Masks do not lessen it: which keys a mask hides is not known beforehand.
    """
    arguments = problem.arguments
    query, value = arguments["query"], arguments["value"]
    assert query is not None
    assert value is not None
    d, dv = query.shape[3], value.shape[3]
    inputs = nbytes(*(t for t in arguments.values() if t is not None and t.is_floating_point()))
    output = nbytes(problem.grad_outputs["output"])
    pairs = _pairs(problem)
    if mode == "fwd":
        return Cost(inputs + output, 2 * pairs * (d + dv), matmul=query.shape[2] > 1)
    flops = 2 * pairs * (3 * d + 2 * dv)
    return Cost(2 * inputs + 2 * output, flops, matmul=query.shape[2] > 1)


def _backends() -> tuple[Provider, ...]:
    """torch's own kernels one by one, where there is more than its choice of them."""
    if not torch.cuda.is_available():
        return ()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forced(backend: SDPBackend) -> Any:
        def run(**arguments: Any) -> dict[str, torch.Tensor]:
            with sdpa_kernel(backend):
                return {"output": F.scaled_dot_product_attention(**arguments)}

        return run

    return tuple(
        Provider(f"torch {name}", forced(backend))
        for name, backend in (
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        )
    )


def _flash_attention() -> tuple[Provider, ...]:
    found = list(_backends())
    try:
        from flash_attn import flash_attn_func

        def flash(query: Any, key: Any, value: Any, **options: Any) -> dict[str, Any]:
            if set(options) - {"is_causal"}:
                raise NotImplementedError("flash_attn takes no mask")
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            output = flash_attn_func(q, k, v, causal=options.get("is_causal", False))
            return {"output": output.transpose(1, 2)}

        found.append(Provider("flash_attn", flash))
    except ImportError:
        pass
    return tuple(found)


BENCHMARKS = (
    Benchmark(OPERATORS["scaled_dot_product_attention"], _SWEEPS, _label, _cost, _flash_attention),
    Benchmark(OPERATORS["attention"], _HARD, _label, _cost),
    Benchmark(OPERATORS["attention_bias"], _BIASED, _label, _cost),
    append_to_cache.BENCHMARK,
)
