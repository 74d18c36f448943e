"""Token, position and segment embedding, added up.

Arithmetic is fp32, or fp64 for fp64 tables; only tables and results are rounded to their dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..random import keep_mask, keep_scale
from .layer_norm import compute_dtype


def token_position_embedding(
    token: Tensor,
    position: Tensor,
    segment: Tensor | None,
    ids: Tensor,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    offset: int = 0,
    scale: float = 1.0,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``dropout(scale * token[ids] + position[positions] + segment[segments])``.

    Without ``positions`` they are ``offset + arange(L)``. The row ``padding_idx`` of ``token``
    takes part like any other, but has no gradient.
    """
    compute = compute_dtype(token.dtype)
    rows = token[ids].to(compute)
    if padding_idx is not None:
        rows = torch.where((ids == padding_idx)[..., None], rows.detach(), rows)
    if positions is None:
        positions = torch.arange(offset, offset + ids.shape[-1], device=ids.device)
    output = scale * rows + position[positions].to(compute)
    if segment is not None:
        output = output + segment[segments].to(compute)
    if seed is not None:
        keep = keep_mask(seed, tuple(output.shape), dropout_p)
        output = torch.where(keep, output * keep_scale(dropout_p), 0.0)
    return output.to(token.dtype)


def table_gradient(grad: Tensor, keys: Tensor, rows: int, padding_idx: int = -1) -> Tensor:
    """The gradient of ``table [rows, D]`` from that of ``table[keys]``, summed as it comes."""
    keys = keys.expand(grad.shape[:-1]).reshape(-1)
    grad = grad.reshape(keys.numel(), grad.shape[-1])
    grad = torch.where((keys == padding_idx)[:, None], 0.0, grad)
    return grad.new_zeros(rows, grad.shape[1]).index_add(0, keys, grad)
