"""The additive_attention family's operators and cases."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .operators import FLOATING, Case, Operator, Problem

_HALVES = (torch.bfloat16, torch.float16)
_KERNELS = (torch.float32, *_HALVES)


def make(
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    batch: int,
    queries: int,
    keys: int,
    hidden: int,
    value: int = 64,
    mask: str | None = None,
    layout: str = "contiguous",
    scale: float = 1.0,
    weight_dtype: torch.dtype | None = None,
    special: bool = False,
) -> Problem:
    """A problem of additive_attention.

    Args:
        batch, queries, keys, hidden, value: B, Lq, Lk, H and Dv.
        mask: ``padding`` (``[B, 1, Lk]``, the first keys of each; NaN in the rest of key and
            value), ``full`` (``[B, Lq, Lk]``, two thirds; the first query takes none), ``shared``
            (``[1, Lq, Lk]``) or None.
        layout: ``contiguous``; ``transposed`` (length before batch); ``sliced`` (rows apart).
        scale: of query and key.
        weight_dtype: of score_weight, where it is not the others'.
        special: one query has a NaN, one key +Inf.
    """

    def tensor(*size: int) -> Tensor:
        if layout == "transposed":
            drawn = torch.randn(size[1], size[0], *size[2:], generator=generator, device=device)
            return drawn.to(dtype).transpose(0, 1)
        if layout == "sliced":
            drawn = torch.randn(*size[:-1], size[-1] + 3, generator=generator, device=device)
            return drawn.to(dtype)[..., : size[-1]]
        return torch.randn(size, generator=generator, device=device).to(dtype)

    arguments: dict[str, Tensor | None] = {
        "query": tensor(batch, queries, hidden) * scale,
        "key": (key := tensor(batch, keys, hidden) * scale),
        "value": (values := tensor(batch, keys, value)),
        "score_weight": (2 / math.sqrt(max(hidden, 1)))
        * torch.randn(hidden, generator=generator, device=device).to(weight_dtype or dtype),
        "mask": None,
    }
    if mask == "padding":
        lengths = torch.randint(0, keys + 1, (batch, 1, 1), generator=generator, device=device)
        takes_part = torch.arange(keys, device=device) < lengths
        unused = ~takes_part.mT
        arguments |= {
            "mask": takes_part,
            "key": key.masked_fill(unused, math.nan),
            "value": values.masked_fill(unused, math.nan),
        }
    elif mask is not None:
        shape = (1 if mask == "shared" else batch, queries, keys)
        takes_part = torch.rand(shape, generator=generator, device=device) < 2 / 3
        if mask == "full":
            takes_part[:, 0] = False
        arguments["mask"] = takes_part
    if special:
        query = arguments["query"]
        assert query is not None
        query[0, 0, 0] = math.nan
        key[-1, -1, 0] = math.inf
    return Problem(
        arguments,
        {"output": tensor(batch, queries, value)},
        differentiable=("query", "key", "value", "score_weight"),
        # Scores' gradients are sums over the columns of the values already.
        summed={
            "query": keys * value,
            "key": queries * value,
            "value": queries,
            "score_weight": batch * queries * keys * value,
        },
    )


def torch_additive_attention(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The formula by torch's functions, all of it in memory; 0 for a query without keys."""
    if mask is not None:
        mask = mask[(None,) * (3 - mask.dim())].expand(-1, query.shape[1], -1)
        unused = ~mask.any(1)[:, :, None].expand(key.shape[0], -1, 1)
        key, value = key.masked_fill(unused, 0.0), value.masked_fill(unused, 0.0)
    hidden = torch.tanh(query[:, :, None] + key[:, None])
    scores = hidden @ score_weight.to(hidden.dtype)
    if mask is None:
        return torch.softmax(scores, -1) @ value
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask, -math.inf).masked_fill(empty, 0.0)
    return torch.softmax(scores, -1).masked_fill(~mask, 0.0) @ value


def _case(
    name: str,
    batch: int,
    queries: int,
    keys: int,
    hidden: int,
    value: int = 64,
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    quick: bool = False,
    tiny: bool = False,
    large: bool = False,
    **more: Any,
) -> Case:
    sizes = {"batch": batch, "queries": queries, "keys": keys, "hidden": hidden, "value": value}
    return Case(name, {**sizes, **more}, dtypes, quick, tiny, large)


_CASES = (
    _case("plain", 2, 33, 40, 14, quick=True, tiny=True),
    _case("one query", 2, 1, 40, 17, quick=True, tiny=True),
    _case("one key", 2, 5, 1, 8, tiny=True),
    _case("one channel", 2, 9, 7, 1, 3, tiny=True),
    _case("no queries", 2, 0, 5, 8, quick=True, tiny=True),
    _case("no batch", 0, 3, 5, 8, tiny=True),
    _case("no values' channels", 2, 3, 5, 8, 0, tiny=True),
    *(_case(f"{n} queries", 1, n, 31, 17, 24, tiny=n < 70) for n in (63, 64, 65, 127)),
    *(_case(f"{n} keys", 1, 48, n, 22, 24, tiny=n < 70) for n in (31, 32, 63, 64, 65, 127)),
    _case("padding", 3, 17, 35, 9, mask="padding", quick=True, tiny=True),
    _case("mask", 2, 9, 21, 16, mask="full", quick=True, tiny=True),
    _case("shared mask", 2, 9, 21, 16, mask="shared", tiny=True),
    _case("transposed", 3, 9, 21, 16, layout="transposed", quick=True, tiny=True),
    _case("rows apart", 3, 9, 21, 16, layout="sliced", tiny=True),
    _case("beyond powers", 2, 9, 21, 16, scale=50.0, dtypes=_KERNELS, quick=True, tiny=True),
    _case("small", 2, 9, 21, 16, scale=0.2, dtypes=_KERNELS, tiny=True),
    _case("NaN and Inf", 3, 9, 21, 16, special=True, tiny=True),
    _case("fp32 weight", 2, 9, 21, 16, dtypes=_HALVES, weight_dtype=torch.float32, tiny=True),
    _case("several blocks", 1, 70, 9000, 8, 4, dtypes=_KERNELS),
    _case("128 x 300 x 256", 2, 128, 300, 256, 64, quick=True),
    _case("4 x 512 x 512 x 256", 4, 512, 512, 256, 256, large=True),
    _case("4 x 500 x 700 x 300, padded", 4, 500, 700, 300, 200, mask="padding", large=True),
)

OPERATORS = (
    Operator(
        "additive_attention",
        "additive_attention",
        "_additive_attention_fwd",
        make,
        lambda **arguments: {"output": functional.additive_attention(**arguments)},
        lambda **arguments: {"output": torch_additive_attention(**arguments)},
        _CASES,
        ("query", "key", "value", "mask", "output"),
    ),
)
