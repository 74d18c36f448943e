"""The cross_entropy calls whose kernels are compiled and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastseq.kernels import cross_entropy

ROWS = 300
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLASSES = (10, 256, 1000, 4096, 32000, 50257, 128256)
QUICK_CLASSES = {"fp32": (32000,), "bf16": (256, 32000)}
#: smoothing, softcap, z_loss; whether there are class weights
KINDS = {"plain": (0.0, 0.0, 0.0, False), "rich": (0.1, 30.0, 1e-4, True)}


def _forward(classes: int, dtype: torch.dtype, kind: str) -> None:
    smoothing, softcap, z_loss, weighted = KINDS[kind]
    cross_entropy.forward(
        torch.empty(ROWS, classes, dtype=dtype),
        torch.empty(ROWS, dtype=torch.int64),
        torch.ones(classes, dtype=dtype) if weighted else None,
        torch.empty((), dtype=dtype),
        torch.empty(ROWS),
        torch.empty(ROWS),
        torch.empty(()),
        classes,
        -100,
        1,
        smoothing,
        softcap,
        z_loss,
        False,
    )


def _backward(classes: int, dtype: torch.dtype, kind: str) -> None:
    smoothing, softcap, z_loss, weighted = KINDS[kind]
    logits = torch.empty(ROWS, classes, dtype=dtype)
    cross_entropy.backward(
        logits,
        torch.empty((), dtype=dtype),
        None,
        torch.empty(ROWS, dtype=torch.int64),
        torch.ones(classes, dtype=dtype) if weighted else None,
        torch.empty(ROWS),
        torch.empty(ROWS),
        torch.empty(()),
        torch.empty_like(logits),
        classes,
        -100,
        smoothing,
        softcap,
        z_loss,
    )


def _sample(classes: int, dtype: torch.dtype) -> None:
    logits = torch.empty(ROWS, classes, dtype=dtype)
    tokens = torch.empty(ROWS, dtype=torch.int64)
    cross_entropy.sample(logits, torch.zeros(1, dtype=torch.int64), tokens, classes, 0, 1.0)


def cases(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, call) of the plainest and the richest calls, forward and backward."""
    for name, dtype in DTYPES.items():
        for classes in CLASSES if full else QUICK_CLASSES[name]:
            for direction, call in (("forward", _forward), ("backward", _backward)):
                for kind in KINDS:
                    label = f"cross_entropy {kind} {direction} {name} {classes}"
                    yield label, partial(call, classes, dtype, kind)
            yield f"cross_entropy sample {name} {classes}", partial(_sample, classes, dtype)


def expects(kernel: str, label: str) -> set[str]:
    """Rows go by 16 bytes; forward and sampler store a number a row, the sum over rows is short."""
    whole_vectors = int(label.rsplit(maxsplit=1)[-1]) % 8 == 0
    if kernel == "reduce_kernel" or not whole_vectors:
        return set()
    return {"wide_loads", "wide_stores"} if " backward " in label else {"wide_loads"}
