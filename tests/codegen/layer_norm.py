"""The layer_norm calls whose kernels are compiled and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastseq.kernels import layer_norm

#: A launcher's call: every row of a [ROWS, row_length] problem.
ROWS = 300

LENGTHS = (64, 256, 768, 1024, 4096, 8192, 16384, 32768, 65536)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _forward(n: int, dtype: torch.dtype, *, rms: bool, residual: bool, parameters: torch.dtype):
    x = torch.empty(ROWS, n, dtype=dtype)
    weight = torch.empty(n, dtype=parameters)
    statistics = torch.empty(ROWS)
    layer_norm.forward(
        x,
        torch.empty_like(x) if residual else None,
        weight,
        None if rms else torch.empty_like(weight),
        torch.zeros(1, dtype=torch.int64) if residual else None,
        torch.empty_like(x),
        torch.empty_like(x) if residual else x[:0],
        statistics[:0] if rms else statistics,
        torch.empty(ROWS),
        n,
        1e-5,
        rms,
        2**31,
        2.0,
    )


def _backward(n: int, dtype: torch.dtype, *, rms: bool, residual: bool, parameters: torch.dtype):
    x = torch.empty(ROWS, n, dtype=dtype)
    weight = torch.empty(n, dtype=parameters)
    statistics = torch.empty(ROWS)
    layer_norm.backward(
        torch.empty_like(x),
        torch.empty_like(x) if residual else None,
        x,
        weight,
        statistics[:0] if rms else statistics,
        statistics,
        torch.zeros(1, dtype=torch.int64) if residual else None,
        torch.empty_like(x),
        torch.empty_like(x) if residual else x[:0],
        torch.empty_like(weight),
        weight[:0] if rms else torch.empty_like(weight),
        n,
        2**31,
        2.0,
    )


def cases(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, launch) of the plain and the richest call, forward and backward."""
    for dtype, name in SHORT.items():
        for n in LENGTHS:
            for direction, launch in (("forward", _forward), ("backward", _backward)):
                for kind, rms, residual, parameters in (
                    ("layer_norm", False, False, dtype),
                    ("add_layer_norm", False, True, torch.float32),
                    ("add_rms_norm", True, True, dtype),
                ):
                    yield (
                        f"{kind} {direction} {name} {n}",
                        partial(
                            launch, n, dtype, rms=rms, residual=residual, parameters=parameters
                        ),
                    )
