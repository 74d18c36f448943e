"""The rotary_embedding calls whose kernels are compiled and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastseq.kernels import rotary_embedding

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _rotate(size: int, rotated: int, dtype: torch.dtype, interleaved: bool) -> None:
    x = torch.zeros(2, 4, 64, size, dtype=dtype)
    table = torch.zeros(64, rotated // 2)
    rotary_embedding.rotate(
        x, table, table, None, torch.empty_like(x), 0, 64, 256, interleaved, False
    )


def cases(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, call)."""
    for name, dtype in DTYPES.items():
        for size, rotated in ((128, 128), (64, 64), (128, 64)) if full else ((128, 128),):
            for interleaved in (False, True):
                label = f"rotary_embedding {name} {rotated} of {size}"
                label += " interleaved" if interleaved else ""
                yield label, partial(_rotate, size, rotated, dtype, interleaved)


def expects(kernel: str, label: str) -> set[str]:
    """Rows go by 16 bytes."""
    return {"wide_loads", "wide_stores"}
