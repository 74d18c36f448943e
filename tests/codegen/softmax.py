"""The softmax calls whose kernels are compiled and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastseq.kernels import softmax

#: Every call has so many rows, or slices of columns.
ROWS = 30

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = (64, 256, 1024, 4096, 8192, 16384, 65536)
QUICK_LENGTHS = {"fp32": (65536,), "bf16": (4096,)}
#: [length, inner]
COLUMNS = ((16, 256), (128, 256), (512, 64), (4096, 1024))
QUICK_COLUMNS = ((128, 256),)


def _forward(length: int, inner: int, dtype: torch.dtype, log: bool) -> None:
    x = torch.empty(ROWS, length, inner, dtype=dtype)
    softmax.forward(x, torch.empty_like(x), length, inner, log)


def _backward(length: int, inner: int, dtype: torch.dtype, log: bool) -> None:
    y = torch.empty(ROWS, length, inner, dtype=dtype)
    softmax.backward(torch.empty_like(y), y, torch.empty_like(y), length, inner, log)


def _masked(length: int, dtype: torch.dtype, boolean: bool, causal: bool) -> None:
    x = torch.empty(ROWS, length, dtype=dtype)
    mask = torch.empty(1, 1, ROWS, length, dtype=torch.bool if boolean else dtype)
    softmax.masked_forward(x, mask, torch.empty_like(x), 0.5, ROWS if causal else 0, 0)


def _masked_backward(length: int, dtype: torch.dtype) -> None:
    y = torch.empty(ROWS, length, dtype=dtype)
    g, x = torch.empty_like(y), torch.empty_like(y)
    softmax.backward(g, y, x, length, 1, False, masked=True, scale=0.5)


def cases(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, call) of every kernel, along rows and along columns."""
    for name, dtype in DTYPES.items():
        shapes = [(n, 1) for n in (LENGTHS if full else QUICK_LENGTHS[name])]
        shapes += COLUMNS if full else QUICK_COLUMNS
        for length, inner in shapes:
            size = f"{name} {length}" + (f" x {inner}" if inner > 1 else "")
            for log in (False, True):
                kind = "log_softmax" if log else "softmax"
                yield f"{kind} forward {size}", partial(_forward, length, inner, dtype, log)
                yield f"{kind} backward {size}", partial(_backward, length, inner, dtype, log)
            if inner > 1:
                continue
            yield f"masked_softmax backward {size}", partial(_masked_backward, length, dtype)
            for mask in ("boolean", "additive"):
                yield (
                    f"masked_softmax forward {mask} {size}",
                    partial(_masked, length, dtype, mask == "boolean", mask == "boolean"),
                )


def expects(kernel: str, label: str) -> set[str]:
    """Rows and columns go by 16 bytes."""
    return {"wide_loads", "wide_stores"}
