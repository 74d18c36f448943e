"""lstm_cell, gru_cell and rnn_cell: single steps of the recurrent networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import current_backend, note
from ..ops.recurrent_cell import RecurrentCellFunction, forward_op
from ..reference import recurrent as reference
from ..reference.recurrent import GATES
from ._dispatch import is_foreign, is_transformed, records_gradient, under_autocast
from ._recurrent_checks import check_tensors


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of an LSTM, as ``torch.lstm_cell``; see :func:`fastseq.functional.lstm`.

    Two library products, and one kernel for everything else; likewise backward.

    Args:
        input: ``[B, I]``.
        hx: ``(h, c)``, each ``[B, H]``.
        w_ih, w_hh: ``[4H, I]`` and ``[4H, H]``, rows in the order i, f, g, o.
        b_ih, b_hh: ``[4H]`` or None.

    Returns:
        ``(h', c')``.

    Raises:
        RuntimeError: shapes or devices do not fit.
        ValueError: dtypes differ.
    """
    h, c = hx
    return _cell("lstm_cell", "lstm", torch.lstm_cell, input, h, c, w_ih, w_hh, b_ih, b_hh)


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU, as ``torch.gru_cell``: ``h'`` of ``[B, H]``; see :func:`lstm_cell`.

    Rows of the weights are in the order r, z, n.
    """
    return _cell("gru_cell", "gru", torch.gru_cell, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of an Elman network, as ``torch.rnn_tanh_cell`` and ``torch.rnn_relu_cell``."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn_cell: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    theirs = torch.rnn_tanh_cell if nonlinearity == "tanh" else torch.rnn_relu_cell
    return _cell("rnn_cell", nonlinearity, theirs, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def _cell(
    name: str,
    kind: str,
    theirs: Callable[..., Any],
    input: Tensor,
    h: Tensor,
    c: Tensor | None,
    *weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    states = (h,) if c is None else (h, c)
    tensors = [t for t in (input, *states, *weights) if t is not None]

    def by_torch(reason: str) -> tuple[Tensor, Tensor]:
        note(name, "torch", reason)
        result = theirs(input, h if c is None else states, *weights)
        return result if c is not None else (result, h)

    if is_foreign(*tensors):
        return by_torch("a tensor subclass, layout or trace that torch must handle")
    if under_autocast(input):
        return by_torch("under autocast torch decides the dtypes")
    _check_shapes(name, kind, input, states, weights)
    check_tensors(name, tensors)
    w_ih, w_hh, b_ih, b_hh = weights
    assert w_ih is not None
    assert w_hh is not None
    # Measured on one core: 0.7 to 1.3 of torch's speed, most often just behind. On a GPU both are
    # two products and a launch, but torch's come from C++.
    if current_backend() == "auto" and not torch.compiler.is_compiling():
        return by_torch("a single step: no slower, and called from C++")
    gates_x, gates_h = F.linear(input, w_ih, b_ih), F.linear(h, w_hh, b_hh)
    if is_transformed():
        note(name, "reference", "torch.func or forward-mode AD")
        return reference.cell(gates_x, gates_h, h, c, kind)[:2]
    if records_gradient(gates_x, gates_h, h, c):
        recorded: tuple[Tensor, Tensor] = RecurrentCellFunction.apply(  # type: ignore[no-untyped-call]
            gates_x, gates_h, h, c, kind
        )
        return recorded
    made: tuple[Tensor, Tensor] = forward_op(gates_x, gates_h, h, c, kind, False)[:2]
    return made


def _check_shapes(
    name: str,
    kind: str,
    input: Tensor,
    states: tuple[Tensor, ...],
    weights: tuple[Tensor | None, ...],
) -> None:
    if input.dim() != 2:
        raise RuntimeError(f"{name}: input must be [batch, features], got {list(input.shape)}")
    w_ih, w_hh, b_ih, b_hh = weights
    assert w_ih is not None
    assert w_hh is not None
    gates, hidden = w_ih.shape[0], w_ih.shape[0] // GATES[kind]
    for role, tensor, expected in (
        ("input", input, (input.shape[0], w_ih.shape[1])),
        *((f"hx[{i}]", state, (input.shape[0], hidden)) for i, state in enumerate(states)),
        ("w_hh", w_hh, (hidden * GATES[kind], hidden)),
        ("b_ih", b_ih, (gates,)),
        ("b_hh", b_hh, (gates,)),
    ):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise RuntimeError(
                f"{name}: {role} must have the shape {list(expected)}, got {list(tensor.shape)}"
            )
