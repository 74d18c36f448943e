"""The recurrent cell ops: one step from both halves of its gates, which are library products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Candidate
from ..reference import recurrent as reference
from ..reference.layer_norm import compute_dtype
from ..reference.recurrent import GATES, SAVED
from ._op import define_op, extension_op, function_backward
from .recurrent import KINDS

_extension_forward = extension_op("recurrent_cell_forward")
_extension_backward = extension_op("recurrent_cell_backward")
Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]

_FORWARD = """_recurrent_cell_fwd(
    Tensor gates_x, Tensor gates_h, Tensor h, Tensor? c, str kind, bool save
) -> (Tensor h_new, Tensor c_new, Tensor cells, Tensor saved)"""


class Forward(NamedTuple):
    """Gates ``[B, G H]``, states ``[B, H]``; ``save`` asks for what the backward needs."""

    gates_x: Tensor
    gates_h: Tensor
    h: Tensor
    c: Tensor | None
    kind: str
    save: bool


def forward_outputs(a: Forward) -> Tensors4:
    """Uninitialised outputs, the fake's too: h', c', c' in the arithmetic's dtype, the gates."""
    batch, hidden = a.h.shape
    lstm, empty = a.c is not None, a.h.new_empty
    return (
        empty((batch, hidden)),
        empty((batch, hidden) if lstm else (0,)),
        empty((batch, hidden) if lstm and a.save else (0,), dtype=compute_dtype(a.h.dtype)),
        empty((batch, SAVED[a.kind] * hidden) if a.save else (0,)),
    )


def _forward_by_extension(a: Forward) -> Tensors4:
    c = None if a.c is None else a.c.contiguous()
    result: Tensors4 = _extension_forward(
        a.gates_x.contiguous(), a.gates_h.contiguous(), a.h.contiguous(), c, KINDS[a.kind], a.save
    )
    return result


def _forward_by_triton(a: Forward) -> Tensors4:
    from ..kernels import recurrent

    outputs = forward_outputs(a)
    if a.h.numel():
        c = None if a.c is None else a.c.contiguous()
        tensors = (a.gates_x.contiguous(), a.gates_h.contiguous(), a.h.contiguous(), c)
        recurrent.cell_forward(*tensors, a.kind, *outputs)
    return outputs


def _forward_by_reference(a: Forward) -> Tensors4:
    compute = compute_dtype(a.h.dtype)
    c = None if a.c is None else a.c.to(compute)
    h_new, cells, saved = reference.cell(a.gates_x, a.gates_h, a.h, c, a.kind)
    if c is None:
        cells = cells.to(compute)
    empty = a.h.new_empty
    return (
        h_new,
        cells.to(a.h.dtype).clone(),
        *((cells, saved.clone()) if a.save else (empty(0, dtype=compute), empty(0))),
    )


_BACKWARD = """_recurrent_cell_bwd(
    Tensor saved, Tensor? grad_h, Tensor? grad_c, Tensor cells, Tensor h, Tensor? c, str kind
) -> (Tensor gates_x, Tensor gates_h, Tensor h, Tensor c)"""


class Backward(NamedTuple):
    """The arguments of the backward op."""

    saved: Tensor
    grad_h: Tensor | None
    grad_c: Tensor | None
    cells: Tensor
    h: Tensor
    c: Tensor | None
    kind: str


def backward_outputs(a: Backward) -> Tensors4:
    """Uninitialised gradients, the fake's too; of gates_h only where it is another."""
    batch, hidden = a.h.shape
    width, empty = (batch, GATES[a.kind] * hidden), a.h.new_empty
    return (
        empty(width),
        empty(width if a.kind == "gru" else (0,)),
        empty((batch, hidden)),
        empty((batch, hidden) if a.c is not None else (0,)),
    )


def _contiguous(a: Backward) -> Backward:
    made: list[Any] = [t.contiguous() if isinstance(t, Tensor) else t for t in a]
    return Backward(*made)


def _backward_by_extension(a: Backward) -> Tensors4:
    result: Tensors4 = _extension_backward(*_contiguous(a)[:6], KINDS[a.kind])
    return result


def _backward_by_triton(a: Backward) -> Tensors4:
    from ..kernels import recurrent

    outputs = backward_outputs(a)
    if a.h.numel():
        recurrent.cell_backward(*_contiguous(a)[:6], a.kind, *outputs)
    return outputs


def _backward_by_reference(a: Backward) -> Tensors4:
    compute = compute_dtype(a.h.dtype)
    grad_h = torch.zeros_like(a.h) if a.grad_h is None else a.grad_h
    gates_x, gates_h, h, c = reference.cell_backward(
        grad_h.to(compute),
        None if a.grad_c is None else a.grad_c.to(compute),
        a.saved.to(compute),
        a.h.to(compute),
        None if a.c is None else a.c.to(compute),
        a.cells,
        a.kind,
    )
    return (
        gates_x.to(a.h.dtype),
        gates_h.to(a.h.dtype) if a.kind == "gru" else a.h.new_empty(0),
        h.to(a.h.dtype),
        a.h.new_empty(0) if c is None else c.to(a.h.dtype),
    )


def _triton_rejects(a: Forward | Backward) -> str | None:
    return "no fp64 kernel" if a.h.dtype == torch.float64 else None


forward_op = define_op(
    _FORWARD,
    Forward,
    forward_outputs,
    (
        Candidate("cpu", _forward_by_extension),
        Candidate("triton", _forward_by_triton, _triton_rejects),
        Candidate("reference", _forward_by_reference),
    ),
)

backward_op = define_op(
    _BACKWARD,
    Backward,
    backward_outputs,
    (
        Candidate("cpu", _backward_by_extension),
        Candidate("triton", _backward_by_triton, _triton_rejects),
        Candidate("reference", _backward_by_reference),
    ),
)


class RecurrentCellFunction(torch.autograd.Function):
    """Saves the activated gates and both states."""

    @staticmethod
    def forward(
        ctx: Any, gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor | None, kind: str
    ) -> tuple[Tensor, Tensor]:
        h_new, c_new, cells, saved = forward_op(gates_x, gates_h, h, c, kind, True)
        ctx.save_for_backward(gates_x, gates_h, h, c, cells, saved)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        return h_new, c_new

    @staticmethod
    @function_backward
    def backward(
        ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gates_x, gates_h, h, c, cells, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if c is None:
            grad_c = None
        if grad_h is None and grad_c is None:
            return (None,) * 5
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            aliases: Any = [None if t is None else t.view_as(t) for t in (gates_x, gates_h, h, c)]
            x, hidden, before, cell = aliases
            h_new, c_new, _ = reference.cell(x, hidden, before, cell, ctx.kind)
            outputs = [(o, g) for o, g in ((h_new, grad_h), (c_new, grad_c)) if g is not None]
            chosen = [a for a, want in zip(aliases, needs, strict=False) if want and a is not None]
            found = iter(
                torch.autograd.grad(
                    [output for output, _ in outputs],
                    chosen,
                    [grad for _, grad in outputs],
                    create_graph=True,
                    allow_unused=True,
                )
            )
            return (*(next(found) if want else None for want in needs[:4]), None)
        made = backward_op(saved, grad_h, grad_c, cells, h, c, ctx.kind)
        grad_gates_h = made[1] if ctx.kind == "gru" else made[0]
        # Only a GRU's h has another way than through its gates.
        return (
            made[0] if needs[0] else None,
            grad_gates_h if needs[1] else None,
            made[2] if needs[2] and ctx.kind == "gru" else None,
            made[3] if needs[3] else None,
            None,
        )
