"""Attention by the C++ kernels: tiles that stay in a core's cache, from the first product to the
last, forward and backward; every feature, O(L) memory.

The kernels (``csrc/cpu/attention_tiles.h``) multiply what is hidden as well, and 0 times NaN is
NaN: where something is hidden and a result is not finite, :mod:`attention_blockwise` takes the call
over, whose careful products let no NaN or Inf reach queries that do not see it.
"""

from __future__ import annotations

from torch import Tensor

from ..random import keep_scale, threshold
from . import attention_blockwise as blockwise
from ._op import extension_op
from .attention_blockwise import Problem

_forward = extension_op("attention_forward")
_backward = extension_op("attention_backward")


def contiguous_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With the elements of a row side by side, copied where they are not."""
    return tuple(t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _arguments(p: Problem) -> tuple[object, ...]:
    """What both kernels take last."""
    dropout = (0, 1.0) if p.seed is None else (threshold(p.dropout_p), keep_scale(p.dropout_p))
    window = (p.window_left, p.window_right)
    geometry = [p.query.shape[1], p.group, p.shift, *window, p.row_offset, p.row_pitch]
    return (p.seed, p.scale, p.softcap, *dropout, geometry)


def forward(p: Problem, output: Tensor, lse: Tensor) -> None:
    """As :func:`attention_blockwise.forward`; the elements of a row of output lie side by side."""
    tensors = contiguous_rows(p.query, p.key, p.value)
    finite = _forward(*tensors, output, lse, p.bias, p.mask, p.slopes, p.sinks, *_arguments(p))
    if not finite and p.hides:
        blockwise.forward(p, output, lse)


def backward(
    p: Problem,
    grad_output: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    delta: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    grad_bias: Tensor | None,
) -> None:
    """As :func:`attention_blockwise.backward`, which does not need the output."""
    query, key, value, made, grad = contiguous_rows(p.query, p.key, p.value, output, grad_output)
    if grad_lse is not None:
        grad_lse = grad_lse.to(lse.dtype)
    statistics = [None if t is None else contiguous_rows(t)[0] for t in (lse, grad_lse, delta)]
    kept = None if grad_bias is None or not p.hides else grad_bias.clone()
    finite = _backward(
        *(query, key, value, made, statistics[0], grad, *statistics[1:]),
        *(p.sinks is None, *grads, grad_bias, p.bias, p.mask, p.slopes, *_arguments(p)),
    )
    if not finite and p.hides:
        if grad_bias is not None and kept is not None:
            grad_bias.copy_(kept)
        blockwise.backward(p, grad_output, lse, grad_lse, delta, grads, grad_bias)
