"""Attention by the C++ kernels: tiles that stay in a core's cache, from the first product to the
last, forward and backward; every feature, O(L) memory.

The kernels (``csrc/cpu/attention_tiles.h``) multiply what is hidden as well, and 0 times NaN is
NaN: where something is hidden and a result is not finite, they say so, and the call is left to
:mod:`attention_blockwise`, whose careful products let no NaN or Inf reach queries that do not see
it.
"""

from __future__ import annotations

from torch import Tensor

from ..random import keep_scale, threshold
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


def forward(p: Problem, output: Tensor, lse: Tensor) -> bool:
    """As :func:`attention_blockwise.forward`, where the elements of a row of output lie side by
    side; whether the results hold."""
    tensors = contiguous_rows(p.query, p.key, p.value)
    finite = _forward(*tensors, output, lse, p.bias, p.mask, p.slopes, p.sinks, *_arguments(p))
    return finite or not p.hides


def backward(
    p: Problem,
    grad_output: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    delta: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    grad_bias: Tensor | None,
) -> bool:
    """As :func:`attention_blockwise.backward`, from the output too; whether the results hold."""
    tensors = contiguous_rows(p.query, p.key, p.value, output)
    statistics = None if grad_lse is None else grad_lse.to(lse.dtype), delta
    finite = _backward(
        *(*tensors, contiguous_rows(lse)[0], contiguous_rows(grad_output)[0]),
        *(None if t is None else contiguous_rows(t)[0] for t in statistics),
        *(p.sinks is None, *grads, grad_bias, p.bias, p.mask, p.slopes, *_arguments(p)),
    )
    return finite or not p.hides
