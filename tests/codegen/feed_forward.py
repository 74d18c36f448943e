"""The feed_forward calls whose kernels are compiled and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastseq.kernels import feed_forward

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _tensors(
    size: int, dtype: torch.dtype, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of the output's size and of hidden's, and a bias: in 16 bits the product has added it."""
    length = 2 * size if activation == "swiglu" else size
    bias = None if dtype == torch.bfloat16 else torch.empty(length, dtype=dtype)
    return torch.empty(64, size, dtype=dtype), torch.empty(64, length, dtype=dtype), bias


def _forward(size: int, dtype: torch.dtype, activation: str, drops: bool) -> None:
    output, hidden, bias = _tensors(size, dtype, activation)
    seed = torch.zeros(1, dtype=torch.int64) if drops else None
    feed_forward.forward(hidden, bias, seed, output, activation, 1 << 28, 1.07)


def _backward(size: int, dtype: torch.dtype, activation: str, drops: bool) -> None:
    grad, hidden, bias = _tensors(size, dtype, activation)
    seed = torch.zeros(1, dtype=torch.int64) if drops else None
    if activation == "relu":
        bias, seed, output = None, None, grad.new_empty(0)
    else:
        output = torch.empty_like(grad)
    grads = torch.empty_like(hidden), output, hidden.new_empty(hidden.shape[-1])
    feed_forward.backward(grad, hidden, bias, seed, *grads, activation, 1 << 28, 1.07)


def cases(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, call)."""
    for name, dtype in DTYPES.items():
        points = [(a, 4096, d) for a in ("gelu", "swiglu") for d in (False, True)]
        if full:
            points += [(a, 4096, False) for a in ("relu", "gelu_tanh", "silu")]
            points += [("gelu", 200, False)]
        for activation, size, drops in points:
            for direction, call in (("forward", _forward), ("backward", _backward)):
                label = f"feed_forward {name} {activation} {direction} {size}"
                label += " dropout" if drops else ""
                yield label, partial(call, size, dtype, activation, drops)


def expects(kernel: str, label: str) -> set[str]:
    """Rows go by 16 bytes."""
    return {"wide_loads", "wide_stores"}
