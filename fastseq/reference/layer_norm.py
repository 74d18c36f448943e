"""LayerNorm (Ba et al. 2016, eq. 3-4), RMSNorm (Zhang & Sennrich 2019, eq. 4), and AddNorm.

All arithmetic is fp32, or fp64 for fp64 input; only inputs and results are rounded to their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..random import keep_mask, keep_scale


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and arithmetic for inputs of ``dtype``: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(
    input: Tensor, normalized_shape: Sequence[int], eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """``(mean, rstd)`` of every row, ``[..., 1, 1]`` over the normalized dimensions.

    ``mean = E[x]`` (0 for RMSNorm) and ``rstd = 1 / sqrt(E[(x - mean)^2] + eps)``.
    """
    dims = tuple(range(-len(normalized_shape), 0))
    x = input.to(compute_dtype(input.dtype))
    mean = torch.zeros_like(x.mean(dims, keepdim=True)) if rms else x.mean(dims, keepdim=True)
    return mean, torch.rsqrt((x - mean).square().mean(dims, keepdim=True) + eps)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    rms: bool = False,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """``(x - mean) * rstd * weight + bias`` over the trailing ``normalized_shape`` dimensions."""
    x = input.to(compute_dtype(input.dtype))
    mean, rstd = statistics(input, normalized_shape, eps, rms)
    output = (x - mean) * rstd
    if weight is not None:
        output = output * weight
    if bias is not None:
        output = output + bias
    return output.to(output_dtype or input.dtype)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    rms: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``x = residual + dropout(input)``; returns ``(layer_norm(x), x)``.

    ``x`` is rounded to the residual's dtype first, so that both outputs speak of the same numbers.
    """
    compute = compute_dtype(input.dtype)
    branch = input.to(compute)
    if seed is not None:
        keep = dropout_mask(seed, tuple(input.shape), normalized_shape, dropout_p)
        branch = torch.where(keep, branch * keep_scale(dropout_p), 0.0)
    new_residual = (residual.to(compute) + branch).to(residual_dtype or input.dtype)
    output = layer_norm(
        new_residual,
        normalized_shape,
        weight,
        bias,
        eps,
        rms=rms,
        output_dtype=output_dtype or input.dtype,
    )
    return output, new_residual


def dropout_mask(
    seed: Tensor, shape: tuple[int, ...], normalized_shape: Sequence[int], dropout_p: float
) -> Tensor:
    """True where the input survives: a row of the mask is a normalized row."""
    row_length = 1
    for size in normalized_shape:
        row_length *= size
    leading = shape[: len(shape) - len(normalized_shape)]
    return keep_mask(seed, (*leading, row_length), dropout_p).reshape(shape)


def layer_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    normalized_shape: Sequence[int],
    *,
    rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`layer_norm` with respect to input, weight and bias, in the compute dtype.

    With ``n = (x - mean) * rstd`` and ``g = grad_output * weight``::

        grad_input  = rstd * (g - E[g] - n * E[g * n])      (without E[g] for RMSNorm)
        grad_weight = sum over rows of grad_output * n
        grad_bias   = sum over rows of grad_output
    """
    compute = compute_dtype(input.dtype)
    dims = tuple(range(-len(normalized_shape), 0))
    leading = tuple(range(input.dim() - len(normalized_shape)))
    grad = grad_output.to(compute)
    normalized = (input.to(compute) - mean) * rstd
    scaled = grad if weight is None else grad * weight.to(compute)
    centred = scaled if rms else scaled - scaled.mean(dims, keepdim=True)
    grad_input = rstd * (centred - normalized * (scaled * normalized).mean(dims, keepdim=True))
    # sum(()) would reduce every dimension where there is none to reduce.
    product = grad * normalized
    return (
        grad_input,
        product.sum(leading) if leading else product,
        grad.sum(leading) if leading else grad,
    )
