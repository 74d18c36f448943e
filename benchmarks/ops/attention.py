"""Attention: bound by its matrix products, decoding by memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastseq.testing import OPERATORS, Problem

from ..registry import Benchmark, Cost, Function, Provider, Sizes, asked, nbytes
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
_LONG = (1, 8, 2048, 64)
_SERVED = _sizes(_LONG, kinds=_MASKED)
#: What keeps all scores in memory in torch on a CPU.
_UNSERVED = _sizes(_LONG, kinds={"value": {"value_dim": 128}})
#: One bias for all heads: the gradient of one for each is as large as what torch keeps.
_ONE_BIAS = _sizes(_LONG, kinds={"": {"bias": (1, 1, 2048, 2048)}}, drop_in=False)
_ONE_QUERY = tuple({**sizes, "lengths": (1, 2048)} for sizes in _sizes(_LONG, kinds={"": {}}))
_SWEEPS = {
    "smoke": _sizes((1, 2, 128, 32), kinds=_MASKED),
    "cpu": (*_SERVED, *_UNSERVED, *_ONE_QUERY),
    # 16 thousand tokens each, as the papers have it.
    "gpu": (
        *_sizes((16, 32, 1024, 64), (2, 32, 8192, 64), kinds=_BOTH),
        *_sizes((16, 16, 1024, 128), (4, 16, 4096, 128), (2, 16, 8192, 128), kinds=_MASKED),
        *_sizes((1, 16, 16384, 128), kinds=_BOTH),
    ),
    "baselines": _sizes(
        *((16384 // n, 2048 // d, n, d) for d in (64, 128, 256) for n in (1024, 4096, 16384)),
        kinds=_BOTH,
    ),
    "all": _sizes((1, 8, 1000, 80), (2, 16, 512, 64), kinds=_MASKED),
}
#: What makes others take the way through the whole matrix of scores.
_DROPOUT = _sizes(_LONG, kinds={"": {"dropout_p": 0.1}}, drop_in=False)
_HARD = {
    "cpu": (
        *_DROPOUT,
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
    "cpu": (*_ONE_BIAS, *_biased(1, 8, 2048, 64)),
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
    options = problem.options
    left, right = options.get("window") or (None, None)
    if options.get("causal") or options.get("is_causal"):
        right = 0
    rows = torch.arange(queries)
    first = torch.zeros_like(rows) if left is None else (rows - left).clamp(0, keys)
    last = torch.full_like(rows, keys) if right is None else (rows + right + 1).clamp(0, keys)
    return heads * int((last - first).clamp_min(0).sum())


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


def _fused(sizes: Sizes) -> Function | None:
    """torch's fused op where dropout or a bias is all there is: what its users call.

    The formula that results are held to is another: with our dropout mask it spends its time on
    drawing that, which the fused op draws for itself; and in 16 bits it rounds more often.
    """
    if set(sizes) - {"lengths", "heads", "batch", "head_dim"} not in ({"dropout_p"}, {"bias"}):
        return None

    def run(
        query: Any, key: Any, value: Any, seed: Any = None, bias: Any = None, dropout_p: float = 0.0
    ) -> dict[str, Any]:
        mask = {"attn_mask": bias, "dropout_p": dropout_p}
        return _torch_sdpa(query=query, key=key, value=value, **mask)

    return run


def _backends() -> tuple[Provider, ...]:
    """torch's own kernels one by one, where there is more than its choice of them."""
    if not torch.cuda.is_available():
        return ()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forced(backend: SDPBackend) -> Any:
        def run(**arguments: Any) -> dict[str, torch.Tensor]:
            with sdpa_kernel(backend):
                return _torch_sdpa(**arguments)

        return run

    return tuple(
        Provider(f"torch {name}", forced(backend))
        for name, backend in (
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("math", SDPBackend.MATH),
        )
    )


def _flex() -> tuple[Provider, ...]:
    """FlexAttention, compiled for every problem anew; without masks but the causal one."""
    if not torch.cuda.is_available():
        return ()
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return query >= key

    def setup(function: Function) -> Function:
        compiled = torch.compile(flex_attention, dynamic=False)
        masks: dict[int, Any] = {}

        def run(query: Any, key: Any, value: Any, **options: Any) -> dict[str, Any]:
            if set(options) - {"is_causal"}:
                raise NotImplementedError("only causal masks here")
            length, mask = query.shape[2], None
            if options.get("is_causal"):
                if length not in masks:
                    masks[length] = create_block_mask(causal, None, None, length, length)
                mask = masks[length]
            return {"output": compiled(query, key, value, block_mask=mask)}

        return run

    return (Provider("flex", _torch_sdpa, setup=setup),)


def _torch_sdpa(**arguments: Any) -> dict[str, torch.Tensor]:
    return {"output": F.scaled_dot_product_attention(**arguments)}


def _flash_attention() -> tuple[Provider, ...]:
    found = [*_backends(), *_flex()]
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


_ASKED = (
    *asked(_sizes((1, 8, 1024, 64), kinds=_MASKED), "inference", "fwd+bwd", fp32=1.0, bf16=1.0),
    *asked(_UNSERVED, "fwd+bwd", memory=1 / 8, fp32=1.1, bf16=1.5),
    *asked(_ONE_QUERY, "inference", bf16=2.5),
)
_BIAS_ASKED = asked(_ONE_BIAS, "fwd+bwd", memory=1 / 8, fp32=1.1, bf16=1.5)
_HARD_ASKED = asked(_DROPOUT, "fwd+bwd", memory=1 / 8, fp32=1.5, bf16=1.5)

BENCHMARKS = (
    Benchmark(
        OPERATORS["scaled_dot_product_attention"],
        _SWEEPS,
        _label,
        _cost,
        _flash_attention,
        _ASKED,
        slow=True,
    ),
    Benchmark(
        OPERATORS["attention"],
        _HARD,
        _label,
        _cost,
        asked=_HARD_ASKED,
        baseline=_fused,
        slow=True,
    ),
    Benchmark(
        OPERATORS["attention_bias"],
        _BIASED,
        _label,
        _cost,
        asked=_BIAS_ASKED,
        baseline=_fused,
        slow=True,
    ),
    append_to_cache.BENCHMARK,
)
