"""The layer_norm calls whose kernels are compiled and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastseq.kernels import layer_norm, layer_norm_backward

#: More rows than any tile has.
ROWS = 300

LENGTHS = (64, 256, 768, 1024, 4096, 8192, 16384, 32768, 65536)

#: One length of every configuration, for the quick run.
QUICK_LENGTHS = {
    "fp32": (8192,),
    "bf16": (64, 1024, 4096),
    "bf16 fp32 parameters": (65536,),
    "bf16 fp32 parameters and residual": (8192,),
}

#: name: (row dtype, parameter dtype, dtype of the new residual)
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "bf16 fp32 parameters": (torch.bfloat16, torch.float32, torch.bfloat16),
    "bf16 fp32 residual": (torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16 fp32 parameters and residual": (torch.bfloat16, torch.float32, torch.float32),
}


def _forward(n: int, dtypes: tuple[torch.dtype, ...], *, rms: bool, residual: bool) -> None:
    dtype, parameter_dtype, residual_dtype = dtypes
    x = torch.empty(ROWS, n, dtype=dtype)
    new_residual = torch.empty(ROWS if residual else 0, n, dtype=residual_dtype)
    weight = torch.empty(n, dtype=parameter_dtype)
    layer_norm.forward(
        x,
        torch.empty_like(new_residual) if residual else None,
        weight,
        None if rms else torch.empty_like(weight),
        torch.zeros(1, dtype=torch.int64) if residual else None,
        torch.empty_like(x),
        new_residual,
        torch.empty(0 if rms else ROWS),
        torch.empty(ROWS),
        n,
        1e-5,
        rms,
        2**31,
        2.0,
    )


def _backward(n: int, dtypes: tuple[torch.dtype, ...], *, rms: bool, residual: bool) -> None:
    dtype, parameter_dtype, residual_dtype = dtypes
    grad_output = torch.empty(ROWS, n, dtype=dtype)
    x = torch.empty(ROWS, n, dtype=residual_dtype if residual else dtype)
    weight = torch.empty(n, dtype=parameter_dtype)
    layer_norm_backward.backward(
        grad_output,
        torch.empty_like(x) if residual else None,
        x,
        weight,
        torch.empty(0 if rms else ROWS),
        torch.empty(ROWS),
        torch.zeros(1, dtype=torch.int64) if residual else None,
        torch.empty_like(x),
        torch.empty_like(grad_output) if residual else grad_output[:0],
        torch.empty_like(weight),
        weight[:0] if rms else torch.empty_like(weight),
        n,
        2**31,
        2.0,
    )


def cases(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, call) of the plainest and the richest calls, forward and backward."""
    for name, dtypes in DTYPES.items():
        quick = QUICK_LENGTHS.get(name, ())
        for n in LENGTHS if full and not name.endswith("and residual") else quick:
            for direction, call in (("forward", _forward), ("backward", _backward)):
                for kind, rms, residual in (
                    ("layer_norm", False, False),
                    ("add_layer_norm", False, True),
                    ("add_rms_norm", True, True),
                ):
                    if name.endswith("residual") and not residual:
                        continue
                    label = f"{kind} {direction} {name} {n}"
                    yield label, partial(call, n, dtypes, rms=rms, residual=residual)


def expects(kernel: str, label: str) -> set[str]:
    """Rows go by 16 bytes; the sums over programs that finish a backward are short."""
    return set() if kernel == "finalise_kernel" else {"wide_loads", "wide_stores"}
