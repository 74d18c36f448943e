"""RotaryEmbedding."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


def frequencies(size: int, base: float) -> Tensor:
    """``base^(-2i / size)`` for every pair i, in fp64."""
    return base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


class RotaryEmbedding(torch.nn.Module):
    r"""Rotary position embedding; see :func:`fastseq.functional.rotary_embedding`.

    The angle of pair i at position p is :math:`p \cdot base^{-2i / dim}`, taken in fp64.

    Args:
        dim: the numbers of a head that are turned (R); even, at most the head's size.
        max_positions: positions of the tables, ``[max_positions, dim / 2]`` in fp32; they are
            buffers outside the ``state_dict``.
        base: of the frequencies.
        interleaved: pairs are (2i, 2i + 1) and not (i, i + dim / 2).

    Shape:
        ``input [*, L, D]``, ``positions`` ``[L]`` or ``[B, L]`` or an ``offset`` -> the input's.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        max_positions: int = 4096,
        base: float = 10000.0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"RotaryEmbedding: dim must be even and positive, got {dim}")
        self.dim, self.max_positions, self.base = dim, max_positions, base
        self.interleaved = interleaved
        angles = torch.outer(
            torch.arange(max_positions, dtype=torch.float64), frequencies(dim, base)
        )
        self.register_buffer("cos", angles.cos().float().to(device), persistent=False)
        self.register_buffer("sin", angles.sin().float().to(device), persistent=False)

    def forward(self, input: Tensor, positions: Tensor | None = None, offset: int = 0) -> Tensor:
        return functional.rotary_embedding(
            input, self.cos, self.sin, positions, offset=offset, interleaved=self.interleaved
        )

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, max_positions={self.max_positions}, base={self.base}, "
            f"interleaved={self.interleaved}"
        )
