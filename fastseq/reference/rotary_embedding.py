"""Rotary position embedding (Su et al., "RoFormer", 2021, eq. 34).

Arithmetic is fp32, or fp64 for fp64 input; only inputs and results are rounded to their dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_norm import compute_dtype


def rotary_embedding(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    offset: int = 0,
    interleaved: bool = False,
    inverse: bool = False,
) -> Tensor:
    """Pairs ``(x1, x2)`` turned: ``(x1 cos - x2 sin, x2 cos + x1 sin)``.

    ``input`` is ``[*, length, size]``, the tables ``[*, rotated / 2]``, ``positions``
    ``[batch or 1, length]``; the rest of a row stays as it is.
    """
    compute = compute_dtype(input.dtype)
    length, rotated = input.shape[-2], 2 * cos.shape[1]
    if positions is None:
        cos, sin = cos[offset : offset + length], sin[offset : offset + length]
    else:
        shape = (positions.shape[0], *(1,) * (input.dim() - 3), length, rotated // 2)
        cos, sin = (
            table[positions].view(shape if input.dim() > 2 else shape[1:]) for table in (cos, sin)
        )
    cos, sin = cos.to(compute), (-sin if inverse else sin).to(compute)
    x, rest = input[..., :rotated].to(compute), input[..., rotated:]
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x[..., : rotated // 2], x[..., rotated // 2 :]
    turned = first * cos - second * sin, second * cos + first * sin
    y = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((y.to(input.dtype), rest), -1)
