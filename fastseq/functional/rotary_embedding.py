"""rotary_embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import note
from ..ops.rotary_embedding import RotaryEmbeddingFunction, forward_op
from ..reference import rotary_embedding as reference
from ._dispatch import FLOATING, is_foreign, is_transformed, records_gradient


def rotary_embedding(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    offset: int = 0,
    interleaved: bool = False,
) -> Tensor:
    r"""Rotary position embedding (RoPE) of queries or keys, forward and backward in one pass each.

    .. math::
        y_1 = x_1 \cos\theta_p - x_2 \sin\theta_p, \qquad
        y_2 = x_2 \cos\theta_p + x_1 \sin\theta_p

    for the pairs :math:`(x_1, x_2)` among the first R numbers of a row at position p; the other
    numbers stay as they are. Pairs are ``(i, i + R / 2)``, or with ``interleaved``
    ``(2i, 2i + 1)``.

    Args:
        input: ``[*, L, D]``, heads before the length as in attention; fp32, fp64, fp16 or bf16; any
            strides.
        cos, sin: the tables ``[P, R / 2]`` of :math:`\cos\theta`, :math:`\sin\theta` by position
            (see :class:`fastseq.nn.RotaryEmbedding`), R at most D. They have no gradient.
        positions: int64 ``[L]``, or ``[B, L]`` with the B of an input ``[B, *, L, D]``. On a GPU
            they are not looked at, as that would wait for it: they must lie in ``[0, P)``.
        offset: without ``positions`` row l has position ``offset + l``: for a decoder, the number
            of keys it has cached.

    Returns:
        A contiguous tensor of the input's shape and dtype; arithmetic is fp32 (fp64 for fp64).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit each other.
        IndexError: a position lies outside the tables.
        NotImplementedError: the input is not floating point.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
    eq. 34.
    """
    _validate(input, cos, sin, positions, offset)
    if positions is not None and positions.dim() == 1:
        positions = positions[None]
    if is_foreign(input, cos, sin, positions) or is_transformed():
        note(
            "rotary_embedding", "reference", "a tensor subclass, a trace, torch.func or forward AD"
        )
        return reference.rotary_embedding(input, cos, sin, positions, offset, interleaved)
    cos, sin = cos.detach(), sin.detach()
    if records_gradient(input):
        output: Tensor = RotaryEmbeddingFunction.apply(  # type: ignore[no-untyped-call]
            input, cos, sin, positions, offset, interleaved, False
        )
        return output
    return forward_op(input, cos, sin, positions, offset, interleaved, False)  # type: ignore[no-any-return]


def _validate(
    input: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int
) -> None:
    name = "rotary_embedding"
    if input.dim() < 2:
        raise RuntimeError(f"{name}: input must be [*, L, D], got {list(input.shape)}")
    if input.dtype not in FLOATING:
        raise NotImplementedError(
            f"{name}: input must be fp32, fp64, fp16 or bf16, got {input.dtype}"
        )
    length, size = input.shape[-2:]
    if cos.dim() != 2 or 2 * cos.shape[1] > size:
        raise RuntimeError(
            f"{name}: cos must be [positions, R / 2] with R up to {size}, got {list(cos.shape)}"
        )
    if sin.shape != cos.shape:
        raise RuntimeError(
            f"{name}: sin must have the shape of cos, {list(cos.shape)}, got {list(sin.shape)}"
        )
    for role, tensor in (("cos", cos), ("sin", sin), ("positions", positions)):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                f"{name}: {role} must be on the input's device {input.device}, got {tensor.device}"
            )
    if positions is None:
        if offset < 0 or offset + length > cos.shape[0]:
            raise IndexError(
                f"{name}: positions {offset} to {offset + length - 1} are not all in tables of "
                f"{cos.shape[0]}"
            )
        return
    if positions.dtype != torch.int64:
        raise RuntimeError(f"{name}: positions must be int64, got {positions.dtype}")
    batch = input.shape[0] if input.dim() > 2 else 1
    if positions.shape not in ((length,), (1, length), (batch, length)):
        raise RuntimeError(
            f"{name}: positions must be [{length}] or [{batch}, {length}], "
            f"got {list(positions.shape)}"
        )
    if positions.is_cpu and positions.numel() and not torch.compiler.is_compiling():
        least, most = (int(bound) for bound in torch.aminmax(positions))
        if least < 0 or most >= cos.shape[0]:
            raise IndexError(
                f"{name}: positions must be in [0, {cos.shape[0]}), got {least} to {most}"
            )
