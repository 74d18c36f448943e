"""The embedding ops: schemas, fakes, candidates, autograd.

The public function is in ``fastseq/functional/embedding.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Candidate
from ..random import keep_mask, keep_scale, threshold
from ..reference import embedding as reference
from ..reference.layer_norm import compute_dtype
from ..rows import as_rows, flat
from ._op import define_op, extension_op, function_backward

_extension_forward = extension_op("embedding_forward")
_extension_backward = extension_op("embedding_backward")
Tensors3 = tuple[Tensor, Tensor, Tensor]


# --- forward -------------------------------------------------------------------------------------

_FORWARD = """_embedding_fwd(
    Tensor token, Tensor position, Tensor? segment, Tensor ids, Tensor? positions,
    Tensor? segments, SymInt offset, float scale, float dropout_p, Tensor? seed
) -> Tensor"""


class Forward(NamedTuple):
    """Tables ``[*, D]``, ``ids [*, L]``; ``positions`` and ``segments`` alike or ``[L]``."""

    token: Tensor
    position: Tensor
    segment: Tensor | None
    ids: Tensor
    positions: Tensor | None
    segments: Tensor | None
    offset: int
    scale: float
    dropout_p: float
    seed: Tensor | None


def _output(a: Forward) -> Tensor:
    """The uninitialised output, the fake's too."""
    return a.token.new_empty((*a.ids.shape, a.token.shape[1]))


def _dropout(a: Forward | Backward) -> tuple[int, float]:
    return threshold(a.dropout_p), keep_scale(a.dropout_p)


Tables = tuple[Tensor, Tensor, Tensor | None]
Keys = tuple[Tensor, Tensor | None, Tensor | None]


def check_keys(tables: Tables, keys: Keys) -> None:
    """Raises where a key on the CPU is out of its table; a GPU would have to wait for the answer.

    The extension looks itself. ``positions`` that are not given have been checked by their bounds.
    """
    for which, (table, given) in enumerate(zip(tables, keys, strict=True)):
        if table is not None and given is not None and given.is_cpu:
            bad = ((given < 0) | (given >= table.shape[0])).reshape(-1)
            if bool(bad.any()):
                raise _out_of_range(tables, keys, which, int(bad.nonzero()[0]))


def _out_of_range(tables: Tables, keys: Keys, which: int, place: int) -> IndexError:
    table, given = tables[which], keys[which]
    assert table is not None
    key = f"offset + {place}" if given is None else int(given.reshape(-1)[place])
    return IndexError(
        f"token_position_embedding: {('ids', 'positions', 'segments')[which]} must be in "
        f"[0, {table.shape[0]}), got {key} at position {place}"
    )


def _tables_and_keys(a: Forward) -> tuple[Tables, Keys]:
    return (a.token, a.position, a.segment), (a.ids, a.positions, a.segments)


def _forward_by_extension(a: Forward) -> Tensor:
    output = _output(a)
    if not output.numel():
        check_keys(*_tables_and_keys(a))
        return output
    made: tuple[Tensor, int, int] = _extension_forward(
        *(a.token.contiguous(), a.position.contiguous(), flat(a.segment)),
        *(a.ids.contiguous(), flat(a.positions), flat(a.segments)),
        *(a.offset, a.ids.shape[-1], a.scale, a.seed, *_dropout(a)),
    )
    output, table, place = made
    if table >= 0:
        raise _out_of_range(*_tables_and_keys(a), table, place)
    return output


def _forward_by_triton(a: Forward) -> Tensor:
    from ..kernels import embedding  # here, not above: without Triton the rest still works

    check_keys(*_tables_and_keys(a))
    output = _output(a)
    if output.numel():
        embedding.forward(
            *(a.token.contiguous(), a.position.contiguous(), flat(a.segment)),
            *(a.ids.contiguous(), flat(a.positions), flat(a.segments)),
            *(a.offset, a.scale, a.seed, *_dropout(a), output),
        )
    return output


def _forward_by_reference(a: Forward) -> Tensor:
    check_keys(*_tables_and_keys(a))
    return reference.token_position_embedding(
        *(a.token, a.position, a.segment, a.ids, a.positions, a.segments, a.offset, a.scale),
        dropout_p=a.dropout_p,
        seed=a.seed,
    )


# --- backward ------------------------------------------------------------------------------------

_BACKWARD = """_embedding_bwd(
    Tensor grad, Tensor ids, Tensor? positions, Tensor? segments, SymInt offset, float scale,
    float dropout_p, Tensor? seed, SymInt[3] rows, int padding_idx, bool[3] wanted
) -> (Tensor grad_token, Tensor grad_position, Tensor grad_segment)"""


class Backward(NamedTuple):
    """The gradients of tables with so many ``rows`` each, from the output's.

    ``padding_idx``: the token whose row has none, or -1.
    """

    grad: Tensor
    ids: Tensor
    positions: Tensor | None
    segments: Tensor | None
    offset: int
    scale: float
    dropout_p: float
    seed: Tensor | None
    rows: Sequence[int]
    padding_idx: int
    wanted: Sequence[bool]


def _gradients(a: Backward) -> Tensors3:
    """Uninitialised; what is not wanted is empty."""
    token, position, segment = (
        a.grad.new_empty((rows, a.grad.shape[-1]) if wanted else (0,))
        for rows, wanted in zip(a.rows, a.wanted, strict=True)
    )
    return token, position, segment


def _zeros(a: Backward) -> Tensors3:
    """The gradients where no row was read."""
    token, position, segment = (grad.zero_() for grad in _gradients(a))
    return token, position, segment


def _backward_by_extension(a: Backward) -> Tensors3:
    if not a.grad.numel():
        return _zeros(a)
    grad, length = as_rows(a.grad, a.grad.shape[-1]), a.ids.shape[-1]

    def gradient(which: int, keys: Tensor | None, skip: int, scale: float) -> Tensor:
        if not a.wanted[which]:
            return grad.new_empty(0)
        made: Tensor = _extension_backward(
            *(grad, flat(keys), a.offset, length, a.rows[which], skip, scale, a.seed, *_dropout(a))
        )
        return made

    return (
        gradient(0, a.ids, a.padding_idx, a.scale),
        gradient(1, a.positions, -1, 1.0),
        gradient(2, a.segments, -1, 1.0),
    )


def _backward_by_triton(a: Backward) -> Tensors3:
    from ..kernels import embedding

    if not a.grad.numel():
        return _zeros(a)
    assert a.seed is not None
    grad = a.grad.new_empty(a.grad.shape)
    embedding.dropped(as_rows(a.grad, a.grad.shape[-1]), a.seed, *_dropout(a), grad)
    return _backward_by_torch(a._replace(grad=grad, seed=None))


def _backward_by_torch(a: Backward) -> Tensors3:
    """Sums over sorted keys, by torch: without atomics, the same in every run."""
    grad = a.grad
    if not grad.numel():
        return _zeros(a)
    if a.seed is not None:
        keep = keep_mask(a.seed, tuple(grad.shape), a.dropout_p)
        grad = torch.where(keep, grad * keep_scale(a.dropout_p), 0.0)

    def gradient(which: int, keys: Tensor, skip: int) -> Tensor:
        # On a GPU nobody has looked at the keys. What reads no row writes none: -1 is skipped.
        keys = torch.where((keys >= 0) & (keys < a.rows[which]) & (keys != skip), keys, -1)
        keys = keys.expand(a.ids.shape).contiguous()
        made: Tensor = torch.ops.aten.embedding_dense_backward(grad, keys, a.rows[which], -1, False)
        return made

    token, position, segment = (grad.new_empty(0) for _ in a.rows)
    if a.wanted[0]:
        token = gradient(0, a.ids, a.padding_idx)
        token = token if a.scale == 1.0 else token.mul_(a.scale)
    if a.wanted[1] and a.positions is not None:
        position = gradient(1, a.positions, -1)
    elif a.wanted[1]:
        length = a.ids.shape[-1]
        position = grad.new_zeros(a.rows[1], grad.shape[-1])
        sequences = grad.reshape(-1, length, grad.shape[-1])
        torch.sum(sequences, 0, out=position[a.offset : a.offset + length])
    if a.wanted[2]:
        assert a.segments is not None
        segment = gradient(2, a.segments, -1)
    return token, position, segment


def _backward_by_reference(a: Backward) -> Tensors3:
    """Linear in the gradient, and differentiable by it."""
    grad = a.grad.to(compute_dtype(a.grad.dtype))
    if a.seed is not None:
        keep = keep_mask(a.seed, tuple(grad.shape), a.dropout_p)
        grad = torch.where(keep, grad * keep_scale(a.dropout_p), 0.0)
    places = a.positions
    if places is None:
        places = torch.arange(a.offset, a.offset + a.ids.shape[-1], device=grad.device)
    keys = (a.ids, places, a.ids if a.segments is None else a.segments)
    made = []
    for which in range(3):
        if not a.wanted[which]:
            made.append(a.grad.new_empty(0))
            continue
        skip = a.padding_idx if which == 0 else -1
        scaled = grad * a.scale if which == 0 else grad
        table = reference.table_gradient(scaled, keys[which], a.rows[which], skip)
        made.append(table.to(a.grad.dtype))
    token, position, segment = made
    return token, position, segment


# --- both ----------------------------------------------------------------------------------------


def _no_fp64(a: Forward | Backward) -> str | None:
    return "no fp64 kernel" if a[0].dtype == torch.float64 else None


def _only_dropout(a: Backward) -> str | None:
    if a.seed is None:
        return "without dropout nothing is left to do but a library's sums over sorted keys"
    return _no_fp64(a)


forward_op = define_op(
    _FORWARD,
    Forward,
    _output,
    (
        Candidate("cpu", _forward_by_extension),
        Candidate("triton", _forward_by_triton, _no_fp64),
        Candidate("reference", _forward_by_reference),
    ),
)
backward_op = define_op(
    _BACKWARD,
    Backward,
    _gradients,
    (
        Candidate("cpu", _backward_by_extension),
        Candidate("triton", _backward_by_triton, _only_dropout),
        Candidate("torch", _backward_by_torch),
        Candidate("reference", _backward_by_reference),
    ),
)


class TokenPositionEmbeddingFunction(torch.autograd.Function):
    """Saves the keys, and with dropout the seed; the result is linear in the tables."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        position: Tensor,
        segment: Tensor | None,
        ids: Tensor,
        positions: Tensor | None,
        segments: Tensor | None,
        offset: int,
        scale: float,
        padding_idx: int | None,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(ids, positions, segments, seed)
        rows = [0 if table is None else table.shape[0] for table in (token, position, segment)]
        skip = -1 if padding_idx is None else padding_idx
        ctx.options = offset, scale, dropout_p, rows, skip
        output: Tensor = forward_op(
            *(token, position, segment, ids, positions, segments, offset, scale, dropout_p, seed)
        )
        return output

    @staticmethod
    @function_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        ids, positions, segments, seed = ctx.saved_tensors
        offset, scale, dropout_p, rows, skip = ctx.options
        needs = ctx.needs_input_grad[:3]
        arguments = Backward(
            grad=grad_output,
            ids=ids,
            positions=positions,
            segments=segments,
            offset=offset,
            scale=scale,
            dropout_p=dropout_p,
            seed=seed,
            rows=rows,
            padding_idx=skip,
            wanted=list(needs),
        )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # With create_graph the gradient must be differentiable itself: the reference's is.
            made = _backward_by_reference(arguments)
        else:
            made = backward_op(*arguments)
        grads = [grad if need else None for grad, need in zip(made, needs, strict=True)]
        return (*grads, *(None,) * 8)
