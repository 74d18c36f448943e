"""The rotary_embedding ops: schemas, fakes, candidates, autograd.

The backward of a rotation is the rotation back: both ops are one implementation.
The public function is in ``fastseq/functional/rotary_embedding.py``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Candidate
from ..reference import rotary_embedding as reference
from ..rows import as_rows, flat
from ._op import define_op, extension_op, function_backward

_extension_rotate = extension_op("rotary_embedding")

_SCHEMA = """_rotary_embedding_{}(
    Tensor input, Tensor cos, Tensor sin, Tensor? positions, SymInt offset, bool interleaved,
    bool inverse
) -> Tensor"""


class Rotation(NamedTuple):
    """The arguments of either op; ``inverse``: turn the other way."""

    input: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    offset: int
    interleaved: bool
    inverse: bool


def _output(a: Rotation) -> Tensor:
    """The uninitialised output, the fake's too."""
    return a.input.new_empty(a.input.shape)


def _rows_of_entry(a: Rotation) -> int:
    """Rows of one entry of the batch: of all heads."""
    return math.prod(a.input.shape[1:-1]) if a.input.dim() > 2 else a.input.shape[0]


def _tables(a: Rotation) -> tuple[Tensor, Tensor, Tensor | None]:
    cos, sin = a.cos.float().contiguous(), a.sin.float().contiguous()
    return cos, sin, flat(a.positions)


def _by_extension(a: Rotation) -> Tensor:
    if not a.input.numel():
        return _output(a)
    output: Tensor = _extension_rotate(
        as_rows(a.input, a.input.shape[-1]),
        *_tables(a),
        a.offset,
        a.input.shape[-2],
        _rows_of_entry(a),
        a.interleaved,
        a.inverse,
    )
    return output.view(a.input.shape)


def _by_triton(a: Rotation) -> Tensor:
    from ..kernels import rotary_embedding  # here, not above: without Triton the rest still works

    output = _output(a)
    if output.numel():
        rotary_embedding.rotate(
            as_rows(a.input, a.input.shape[-1]),
            *_tables(a),
            output,
            a.offset,
            a.input.shape[-2],
            _rows_of_entry(a),
            a.interleaved,
            a.inverse,
        )
    return output


def _by_reference(a: Rotation) -> Tensor:
    return reference.rotary_embedding(*a).contiguous()


def _rejects(a: Rotation) -> str | None:
    if not a.cos.shape[1]:
        return "nothing to turn"
    return "no fp64 kernel" if a.input.dtype == torch.float64 else None


_CANDIDATES = (
    Candidate("cpu", _by_extension, _rejects),
    Candidate("triton", _by_triton, _rejects),
    Candidate("reference", _by_reference),
)

forward_op = define_op(_SCHEMA.format("fwd"), Rotation, _output, _CANDIDATES)
backward_op = define_op(_SCHEMA.format("bwd"), Rotation, _output, _CANDIDATES)


class RotaryEmbeddingFunction(torch.autograd.Function):
    """Saves the tables; its backward is itself, so that it has derivatives of every order."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        offset: int,
        interleaved: bool,
        inverse: bool,
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        ctx.options = offset, interleaved, inverse
        op = backward_op if inverse else forward_op
        output: Tensor = op(input, cos, sin, positions, offset, interleaved, inverse)
        return output

    @staticmethod
    @function_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        offset, interleaved, inverse = ctx.options
        grad = RotaryEmbeddingFunction.apply(  # type: ignore[no-untyped-call]
            grad_output, *ctx.saved_tensors, offset, interleaved, not inverse
        )
        return (grad, *(None,) * 6)
