"""append_to_cache, of the attention family: an operator that writes its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .operators import FLOATING, Case, Operator, Problem


def make(
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    lengths: Sequence[int],
    new: int = 1,
    room: int = 40,
    heads: int = 2,
    head_dim: int = 16,
    value_dim: int | None = None,
    layout: str = "contiguous",
    given: torch.dtype | None = None,
) -> Problem:
    """A problem of append_to_cache.

    Args:
        lengths: tokens that each entry's caches hold; as many entries as lengths.
        new: tokens to append to each.
        room: tokens a cache has room for.
        layout: of the caches and the new rows: ``contiguous``; ``transposed`` (tokens before
            heads, as from a projection); ``apart`` (gaps between rows).
        given: the new rows' dtype, by default the caches'.
    """

    def tensor(length: int, width: int, dtype: torch.dtype) -> Tensor:
        size = [len(lengths), heads, length, width]
        if layout == "transposed":
            size[1], size[2] = size[2], size[1]
        if layout == "apart":
            size[3] += 3
        drawn = torch.randn(size, generator=generator, device=device).to(dtype)
        drawn = drawn.transpose(1, 2) if layout == "transposed" else drawn
        return drawn[..., :width]

    widths = (head_dim, value_dim or head_dim)
    key_cache, value_cache = (tensor(room, width, dtype) for width in widths)
    key, value = (tensor(new, width, given or dtype) for width in widths)
    return Problem(
        {
            "key_cache": key_cache,
            "value_cache": value_cache,
            "key": key,
            "value": value,
            "lengths": torch.tensor(list(lengths), dtype=torch.int64, device=device),
        },
        {},
        written=("key_cache", "value_cache"),
    )


def append_to_cache(**arguments: Tensor) -> dict[str, Tensor]:
    """Ours, the caches and their lengths by name; lengths as floating numbers, to be compared."""
    lengths = functional.append_to_cache(**arguments)
    return _named(arguments["key_cache"], arguments["value_cache"], lengths)


def torch_append_to_cache(
    key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, lengths: Tensor
) -> dict[str, Tensor]:
    """As it is written with torch's indexing."""
    entry = torch.arange(len(lengths), device=lengths.device)[:, None]
    at = lengths[:, None] + torch.arange(key.shape[2], device=lengths.device)
    key_cache[entry, :, at] = key.transpose(1, 2).to(key_cache.dtype)
    value_cache[entry, :, at] = value.transpose(1, 2).to(value_cache.dtype)
    return _named(key_cache, value_cache, lengths + key.shape[2])


def _named(key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    return {"key_cache": key_cache, "value_cache": value_cache, "lengths": lengths.double()}


def _case(
    name: str,
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    quick: bool = False,
    large: bool = False,
    **sizes: Any,
) -> Case:
    return Case(name, sizes, dtypes, quick, tiny=not large, large=large)


OPERATOR = Operator(
    "append_to_cache",
    "attention",
    "_append_to_cache",
    make,
    append_to_cache,
    torch_append_to_cache,
    (
        _case("one token", lengths=(5, 0, 39), quick=True),
        _case("several tokens", lengths=(5, 0, 33), new=7, quick=True),
        _case("many tokens", lengths=(5, 0, 7), new=33),
        _case("entries of one length", lengths=(5, 5), new=2, layout="transposed"),
        _case("value_dim", lengths=(3, 9), new=2, head_dim=59, value_dim=24),
        _case("transposed", lengths=(3, 9), new=2, layout="transposed"),
        _case("rows apart", lengths=(3, 9), new=2, layout="apart", quick=True),
        _case("converted", lengths=(3, 9), new=3, given=torch.float32),
        _case("to the brim", lengths=(0, 0), new=40),
        _case("no token", lengths=(3, 9), new=0),
        _case("no entry", lengths=()),
        _case("16 of 32768", lengths=(32767, *range(0, 30000, 2000)), room=32768, heads=8,
              head_dim=128, large=True, dtypes=(torch.bfloat16, torch.float16)),
    ),
    ("key_cache", "value_cache", "key", "value", "lengths"),
)  # fmt: skip
