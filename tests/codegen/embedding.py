"""The embedding calls whose kernels are compiled and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastseq.kernels import embedding

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _forward(size: int, dtype: torch.dtype, everything: bool) -> None:
    table = torch.zeros(64, size, dtype=dtype)
    ids = torch.zeros(2, 32, dtype=torch.int64)
    more = ids if everything else None
    embedding.forward(
        *(table, table, table if everything else None, ids, more, more, 0, 1.5),
        *(torch.zeros(1, dtype=torch.int64) if everything else None, 1 << 28, 1.07),
        torch.zeros(2, 32, size, dtype=dtype),
    )


def _dropped(size: int, dtype: torch.dtype) -> None:
    grad = torch.zeros(64, size, dtype=dtype)
    seed = torch.zeros(1, dtype=torch.int64)
    embedding.dropped(grad, seed, 1 << 28, 1.07, torch.empty_like(grad))


def cases(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, call)."""
    for name, dtype in DTYPES.items():
        for size in (768, 64, 4096) if full else (768,):
            yield f"embedding {name} {size}", partial(_forward, size, dtype, False)
            yield f"embedding {name} {size} everything", partial(_forward, size, dtype, True)
            yield f"embedding dropout {name} {size}", partial(_dropped, size, dtype)


def expects(kernel: str, label: str) -> set[str]:
    """Rows go by 16 bytes."""
    return {"wide_loads", "wide_stores"}
