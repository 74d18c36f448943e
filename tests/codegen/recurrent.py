"""The recurrent steps whose kernels are compiled and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastseq.kernels import recurrent

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
SAVED = {"lstm": 4, "gru": 4, "tanh": 1, "relu": 1}
#: Rows of several tiles.
BATCH = 300


def _cell(kind: str, hidden: int, dtype: torch.dtype) -> None:
    """A single step: forward and backward of a cell."""
    gates = torch.empty(BATCH, GATES[kind] * hidden, dtype=dtype)
    h, lstm = torch.empty(BATCH, hidden, dtype=dtype), kind == "lstm"
    cells = torch.empty(BATCH, hidden) if lstm else torch.empty(0)
    c = torch.empty_like(h) if lstm else None
    saved = torch.empty(BATCH, SAVED[kind] * hidden, dtype=dtype)
    outputs = (torch.empty_like(h), torch.empty_like(h if lstm else h[:0]), cells, saved)
    recurrent.cell_forward(gates, torch.empty_like(gates), h, c, kind, *outputs)
    grad_gates_h = torch.empty_like(gates if kind == "gru" else gates[:0])
    grads = (torch.empty_like(gates), grad_gates_h, torch.empty_like(h), torch.empty_like(h))
    recurrent.cell_backward(saved, h, c, cells, h, c, kind, *grads)


def _sequence(kind: str, hidden: int, dtype: torch.dtype) -> None:
    """Two steps with all that a sequence may have: lengths, dropout of h, clipping, all states."""
    steps, lstm = 2, kind == "lstm"

    def made(size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(steps, BATCH, size, dtype=dtype)

    gates_x, output = made(GATES[kind] * hidden), made(hidden)
    h = torch.zeros(BATCH, hidden, dtype=dtype)
    c = h if lstm else None
    weight = torch.zeros(GATES[kind] * hidden, hidden, dtype=dtype)
    lengths = torch.ones(BATCH, dtype=torch.int64)
    cells = made(hidden, torch.float32) if lstm else torch.empty(0)
    saved, states = made(SAVED[kind] * hidden), (h.clone(), h.clone() if lstm else h[:0])
    options = (lengths, h, kind, True)
    recurrent.forward(gates_x, h, c, weight, None, None, *options, output, *states, cells, saved)
    grads = (output, h, c, cells if lstm else None)
    recurrent.backward(
        saved, *grads, output, cells, h, c, weight, None, *options, 0, 1.0,
        made(GATES[kind] * hidden), made(GATES[kind] * hidden if kind == "gru" else 0), *states,
        torch.empty(0),
    )  # fmt: skip


def cases(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, call): cells and whole steps of each kind."""
    for name, dtype in DTYPES.items():
        for kind in GATES if full else ("lstm", "gru"):
            for hidden in (130, 512) if full and kind == "lstm" else (512,):
                yield f"{kind} cell {name} {hidden}", partial(_cell, kind, hidden, dtype)
                yield f"{kind} sequence {name} {hidden}", partial(_sequence, kind, hidden, dtype)


def expects(kernel: str, label: str) -> set[str]:
    """Units go by 16 bytes where their number lets them."""
    return set() if label.endswith(" 130") else {"wide_loads", "wide_stores"}
