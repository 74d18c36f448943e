"""The counter-based generator behind every dropout, and its seeds.

``bits(seed, row, column)`` is a pure function of the logical position, so a mask depends neither on
tile shapes nor on how a batch was split, and a backward pass draws it again instead of storing it.
The same function stands in ``csrc/math/random.h`` and ``kernels/common.py``; tests compare all
three bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from torch's generator of that device: ``int64 [1]``.

    It stays on the device: no host sync, and a captured CUDA graph draws anew at every replay.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """The 32-bit bound below which a position is dropped."""
    return min(round(dropout_p * 2**32), _MASK)


def keep_scale(dropout_p: float) -> float:
    """What a kept element is multiplied by: ``1 / (1 - p)``, and 0 where everything is dropped."""
    return 0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p)


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def bits(seed: Tensor, rows: int, columns: int, first_row: int = 0) -> Tensor:
    """The 32 random bits of every position of a ``[rows, columns]`` array, as int64.

    Args:
        seed: ``int64 [1]``.
        first_row: the number of the array's first row.
    """
    device = seed.device
    numbers = torch.arange(first_row, first_row + rows, device=device)
    return bits_at(seed, numbers, torch.arange(columns, device=device))


def bits_at(seed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """As :func:`bits`, of the rows and columns named, ``int64 [*]`` each."""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    row = rows[:, None]
    first = _mix(_mix(low) ^ (row & _MASK))
    second = _mix(_mix((first + high) & _MASK) ^ (row >> 32))
    x = (columns + first) & _MASK
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ second
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def keep_mask(seed: Tensor, shape: tuple[int, ...], dropout_p: float) -> Tensor:
    """True where an element survives dropout: the mask every kernel draws, of the given shape.

    The last dimension counts the columns, all others together the rows.
    """
    columns = shape[-1] if shape else 1
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return (bits(seed, rows, columns) >= threshold(dropout_p)).reshape(shape)
