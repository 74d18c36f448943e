"""Positional encodings that are added: sinusoidal and learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rotary_embedding import frequencies


class SinusoidalPositionalEncoding(torch.nn.Module):
    r"""``dropout(input + table)`` with the fixed table of the Transformer.

    .. math::
        t_{p, 2i} = \sin(p \cdot 10000^{-2i/d}), \qquad t_{p, 2i + 1} = \cos(p \cdot 10000^{-2i/d})

    Args:
        d_model: the size of a row.
        max_len: positions of the table, a buffer outside the ``state_dict``.
        dropout: probability of zeroing an element of the sum, in training.
        batch_first: whether the length is the dimension before the last of ``[B, L, d_model]``, or
            the first of ``[L, B, d_model]``; ``[L, d_model]`` is either.

    Called with ``input``, and the ``offset`` of its first position or ``positions`` (``[L]`` or a
    position for each row).

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.5.
    """

    table: Tensor

    def __init__(
        self,
        d_model: int,
        max_len: int = 5000,
        dropout: float = 0.0,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.max_len = d_model, max_len
        self.dropout, self.batch_first = dropout, batch_first
        positions = torch.arange(max_len, dtype=torch.float64)
        angles = torch.outer(positions, frequencies(d_model, 10000.0))
        table = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :d_model]
        table = table.to(device=device, dtype=dtype or torch.get_default_dtype())
        self.register_buffer("table", table, persistent=False)

    def forward(self, input: Tensor, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        return _add_positions(self, input, self.table, offset, positions)

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self.max_len}, dropout={self.dropout}"


class LearnedPositionalEncoding(torch.nn.Module):
    """``dropout(input + weight)``, a row of the parameter for every position.

    Args:
        max_len: positions of ``weight [max_len, d_model]``, drawn from N(0, 0.02^2).
        d_model, dropout, batch_first: as :class:`SinusoidalPositionalEncoding`, and so the call.
    """

    def __init__(
        self,
        max_len: int,
        d_model: int,
        dropout: float = 0.0,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.max_len, self.d_model = max_len, d_model
        self.dropout, self.batch_first = dropout, batch_first
        self.weight = torch.nn.Parameter(torch.empty(max_len, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=0.02)

    def forward(self, input: Tensor, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        return _add_positions(self, input, self.weight, offset, positions)

    def extra_repr(self) -> str:
        return f"{self.max_len}, {self.d_model}, dropout={self.dropout}"


def _add_positions(
    module: SinusoidalPositionalEncoding | LearnedPositionalEncoding,
    input: Tensor,
    table: Tensor,
    offset: int,
    positions: Tensor | None,
) -> Tensor:
    name = type(module).__name__
    if input.dim() < 2 or input.shape[-1] != module.d_model:
        raise RuntimeError(
            f"{name}: input must be [*, L, {module.d_model}], got {list(input.shape)}"
        )
    sequence_first = input.dim() == 3 and not module.batch_first
    if positions is None:
        length = input.shape[0] if sequence_first else input.shape[-2]
        rows = _rows_of(name, table, length, offset)
    else:
        rows = F.embedding(positions, table)
    if sequence_first and rows.dim() == 2:
        rows = rows[:, None]
    return F.dropout(input + rows.to(input.dtype), module.dropout, module.training)


def _rows_of(name: str, table: Tensor, length: int, offset: int) -> Tensor:
    if offset < 0 or offset + length > table.shape[0]:
        raise IndexError(
            f"{name}: positions {offset} to {offset + length - 1} are not all in a table of "
            f"{table.shape[0]}"
        )
    return table[offset : offset + length]
