"""The embedding family's operators and cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..random import draw_seed, keep_mask, keep_scale
from .operators import FLOATING, Case, Operator, Problem


def make(
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    shape: Sequence[int],
    size: int,
    tokens: int,
    places: int | None = None,
    positions: str | None = None,
    segments: str | None = None,
    grad: str = "contiguous",
    tables: str = "contiguous",
    frozen: Sequence[str] = (),
    keys: torch.dtype = torch.int64,
    dropout_p: float = 0.0,
    **options: Any,
) -> Problem:
    """A problem of token_position_embedding.

    Args:
        shape, size: of ids, ``[*, L]``, and D.
        tokens, places: rows of the tables of tokens and of positions (by default 2 L + 3).
        positions, segments: ``shared`` (``[L]``), ``each`` (the shape of ids) or None.
        grad: ``contiguous``; ``transposed`` (length before batch); ``expanded`` (one row for all).
        tables: ``contiguous``, or ``strided`` (elements apart).
        frozen: tables that want no gradient.
        keys: dtype of ids, positions, segments.
    """
    length = shape[-1]
    places = 2 * length + 3 if places is None else places

    def tensor(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    def table(rows: int) -> Tensor:
        return tensor(rows, size) if tables == "contiguous" else tensor(rows, 2 * size)[:, ::2]

    def drawn(rows: int, which: str | None = "each") -> Tensor | None:
        if which is None:
            return None
        leading = (length,) if which == "shared" else tuple(shape)
        return torch.randint(0, rows, leading, generator=generator, device=device).to(keys)

    arguments = {
        "ids": drawn(tokens),
        "token_table": table(tokens),
        "position_table": table(places),
        "positions": drawn(places, positions),
        "segment_table": table(2) if segments else None,
        "segments": drawn(2, segments),
    }
    if grad == "expanded":
        gradient = tensor(size).expand(*shape, size)
    elif grad == "transposed":
        gradient = tensor(shape[1], shape[0], size).transpose(0, 1)
    else:
        gradient = tensor(*shape, size)
    if dropout_p:
        options |= {"dropout_p": dropout_p, "training": True}
    found = ("token_table", "position_table", *(("segment_table",) if segments else ()))
    return Problem(
        arguments,
        {"output": gradient},
        options=options,
        differentiable=tuple(name for name in found if name not in frozen),
        summed=dict.fromkeys(found, math.prod(shape)),
    )


def torch_token_position_embedding(
    ids: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    positions: Tensor | None = None,
    segment_table: Tensor | None = None,
    segments: Tensor | None = None,
    *,
    offset: int = 0,
    scale: float = 1.0,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """By torch's functions, with the dropout mask that our kernels draw from the same generator."""
    output = F.embedding(ids, token_table, padding_idx)
    if scale != 1.0:
        output = output * scale
    if positions is None:
        output = output + position_table[offset : offset + ids.shape[-1]]
    else:
        output = output + F.embedding(positions, position_table)
    if segment_table is not None and segments is not None:
        output = output + F.embedding(segments, segment_table)
    if dropout_p and training:
        keep = keep_mask(draw_seed(ids.device), tuple(output.shape), dropout_p)
        output = output * keep * keep_scale(dropout_p)
    return output


def _case(
    name: str,
    shape: Sequence[int],
    size: int,
    tokens: int,
    *,
    quick: bool = False,
    tiny: bool = False,
    large: bool = False,
    **more: Any,
) -> Case:
    sizes = {"shape": shape, "size": size, "tokens": tokens}
    return Case(name, {**sizes, **more}, FLOATING, quick, tiny, large)


_BERT: dict[str, Any] = {"segments": "each", "padding_idx": 0}
_CASES = (
    _case("plain", (3, 9), 16, 11, quick=True, tiny=True),
    _case("one sequence", (7,), 24, 11, tiny=True),
    _case("three dimensions", (2, 2, 3), 8, 11, tiny=True),
    _case("scale", (3, 9), 16, 11, scale=4.0, tiny=True),
    _case("offset", (3, 5), 16, 11, offset=6, quick=True, tiny=True),
    _case("shared positions", (3, 5), 8, 11, positions="shared", tiny=True),
    _case("positions of each", (3, 5), 8, 11, positions="each", quick=True, tiny=True),
    _case("segments", (3, 9), 16, 11, quick=True, tiny=True, **_BERT),
    _case("shared segments", (3, 9), 16, 11, segments="shared", positions="each", tiny=True),
    _case("padding", (3, 9), 16, 4, padding_idx=-1, scale=0.5, tiny=True),
    _case("one token", (4, 70), 8, 1, tiny=True),
    _case("more tokens than are read", (2, 5), 8, 300, tiny=True),
    *(_case(f"rows of {n}", (2, 3), n, 5, tiny=True) for n in (1, 15, 17, 127, 130)),
    _case("rows past a tile", (2, 2), 1025, 5, tiny=True),
    _case("no rows", (0, 5), 8, 11, tiny=True),
    _case("no length", (3, 0), 8, 11, tiny=True, **_BERT),
    _case("nothing in rows", (3, 5), 0, 11, tiny=True),
    _case("a gradient of other strides", (3, 5), 8, 11, grad="transposed", tiny=True),
    _case("a gradient of one row", (3, 5), 8, 11, grad="expanded", tiny=True, dropout_p=0.3),
    _case("tables of other strides", (3, 5), 8, 11, tables="strided", tiny=True),
    _case("int32", (3, 5), 8, 11, keys=torch.int32, positions="each", tiny=True),
    _case("tokens frozen", (3, 5), 8, 11, frozen=("token_table",), tiny=True, **_BERT),
    _case("positions frozen", (3, 5), 8, 11, frozen=("position_table",), quick=True, tiny=True),
    _case("dropout", (3, 9), 35, 11, dropout_p=0.3, quick=True, tiny=True),
    _case("dropout, all", (3, 9), 40, 11, dropout_p=0.3, scale=3.0, tiny=True, **_BERT),
    _case("dropout of everything", (3, 9), 8, 11, dropout_p=1.0, tiny=True),
    _case("4 x 64 x 256 of 2000", (4, 64), 256, 2000, padding_idx=1),
    _case("4 x 64 x 256 of 2000, dropout", (4, 64), 256, 2000, dropout_p=0.1, **_BERT),
    _case("8 x 1024 x 768 of 50257", (8, 1024), 768, 50257, large=True),
    _case("32 x 512 x 1024 of 30522", (32, 512), 1024, 30522, dropout_p=0.1, large=True, **_BERT),
)

OPERATORS = (
    Operator(
        "token_position_embedding",
        "embedding",
        "_embedding_fwd",
        make,
        lambda **arguments: {"output": functional.token_position_embedding(**arguments)},
        lambda **arguments: {"output": torch_token_position_embedding(**arguments)},
        _CASES,
        # Keys that all rows share, or one sequence alone, are no rows to cut.
    ),
)
