"""Softmax, its logarithm and the masked softmax of attention (Vaswani et al. 2017, eq. 1).

All arithmetic is fp32, or fp64 for fp64 input; only inputs and results are rounded to their dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_norm import compute_dtype


def softmax(
    input: Tensor, dim: int, *, log: bool = False, output_dtype: torch.dtype | None = None
) -> Tensor:
    """``exp(x - max) / sum(exp(x - max))`` along ``dim``; with ``log`` the logarithm of it."""
    output_dtype = output_dtype or input.dtype
    x = input.to(compute_dtype(input.dtype))
    if not x.numel():  # an empty dimension has no maximum
        return x.to(output_dtype, copy=True)
    shifted = x - x.amax(dim, keepdim=True).detach()
    exponential = shifted.exp()
    total = exponential.sum(dim, keepdim=True)
    return (shifted - total.log() if log else exponential / total).to(output_dtype)


def softmax_backward(
    grad_output: Tensor,
    output: Tensor,
    dim: int,
    *,
    log: bool = False,
    masked: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """The gradient with respect to the input, in the compute dtype.

    With the softmax ``y = output`` and ``g = grad_output``::

        scale * y * (g - sum(g * y))

    With ``masked`` what is 0 in ``y`` takes no part, whatever its gradient, NaN included; with
    ``log``, where ``output`` is the logarithm of y::

        g - y * sum(g)
    """
    compute = compute_dtype(output.dtype)
    y, grad = output.to(compute), grad_output.to(compute)
    if log:
        return grad - y.exp() * grad.sum(dim, keepdim=True)
    if masked:
        grad = torch.where(y == 0, 0.0, grad)
    gradient = y * (grad - (grad * y).sum(dim, keepdim=True))
    return scale * gradient if masked else gradient


def masked_softmax(
    input: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    causal_offset: int | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Softmax of ``scale * input + mask`` along the last dimension over what takes part.

    What takes part: where a boolean mask is True, where an additive one is not -inf, and with
    ``causal_offset`` in row i of the last two dimensions the columns up to ``i + causal_offset``.
    The rest is 0, and so is a row of which nothing is left.
    """
    output_dtype = output_dtype or input.dtype
    x = input.to(compute_dtype(input.dtype))
    if not x.numel():
        return x.to(output_dtype, copy=True)
    scores = x * scale
    takes_part = torch.ones((), dtype=torch.bool, device=x.device)
    if mask is not None and mask.dtype == torch.bool:
        takes_part = mask
    elif mask is not None:
        scores, takes_part = scores + mask.to(x.dtype), mask != -torch.inf
    if causal_offset is not None:
        row = torch.arange(x.shape[-2], device=x.device)[:, None]
        column = torch.arange(x.shape[-1], device=x.device)
        takes_part = takes_part & (column <= row + causal_offset)
    # Twice: exp(-inf) is 0, but its derivative times an infinite or NaN gradient would be NaN.
    scores = torch.where(takes_part, scores, -torch.inf)
    largest = scores.amax(-1, keepdim=True).detach()
    shifted = scores - torch.where(largest == -torch.inf, 0.0, largest)
    exponential = torch.where(takes_part, shifted.exp(), 0.0)
    total = exponential.sum(-1, keepdim=True)
    return (exponential / torch.where(total == 0, 1.0, total)).to(output_dtype)
