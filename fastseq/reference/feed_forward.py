"""The position-wise feed-forward block (Vaswani et al. 2017, section 3.3), with a choice of
activations: ReLU, GELU (Hendrycks & Gimpel 2016), SiLU, SwiGLU (Shazeer 2020, eq. 6).

The products are in the input's dtype; what stands between them is fp32, or fp64 for fp64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..random import keep_mask, keep_scale
from .layer_norm import compute_dtype

#: The names of the activations, in the order by which kernels know them.
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "swiglu")


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``dropout(act(input weight1^T + bias1)) weight2^T + bias2``; without a seed no dropout."""
    hidden = F.linear(input, weight1, bias1)
    return F.linear(activate(hidden, None, activation, dropout_p, seed), weight2, bias2)


def activate(
    hidden: Tensor,
    bias: Tensor | None,
    activation: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``dropout(act(hidden + bias))``, of ``[*, F]``, for SwiGLU of ``[*, 2F]``."""
    z = _with_bias(hidden, bias)
    if activation == "swiglu":
        gate, up = z.chunk(2, -1)
        output = F.silu(gate) * up
    else:
        output = _activated(z, activation)
    return _dropped(output, dropout_p, seed).to(hidden.dtype)


def activate_backward(
    grad: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    activation: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of ``hidden``, and the output of :func:`activate` again, in the compute dtype.

    ReLU's takes its output in the place of ``hidden``, and no bias: what is 0 there, dropped or
    negative, has no gradient.
    """
    z = _with_bias(hidden, bias)
    grad = grad.to(z.dtype)
    if activation == "relu":
        return torch.where(z == 0, 0.0, grad * keep_scale(dropout_p)), z
    grad = _dropped(grad, dropout_p, seed)
    if activation == "swiglu":
        gate, up = z.chunk(2, -1)
        value = F.silu(gate)
        grads = torch.cat((grad * up * _slope(gate, "silu"), grad * value), -1)
        return grads, _dropped(value * up, dropout_p, seed)
    output = _dropped(_activated(z, activation), dropout_p, seed)
    return grad * _slope(z, activation), output


def _activated(z: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.relu(z)
    if activation == "silu":
        return F.silu(z)
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def _slope(z: Tensor, activation: str) -> Tensor:
    """The derivative of GELU or SiLU."""
    if activation == "silu":
        s = torch.sigmoid(z)
        return s + z * s * torch.sigmoid(-z)
    if activation == "gelu":
        up_to = 0.5 * torch.erfc(z * -math.sqrt(0.5))
        return up_to + z * torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    # z / 2 (1 + tanh(u)) = z sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)
    scale = 2.0 * math.sqrt(2.0 / math.pi)
    twice = scale * (z + 0.044715 * z**3)
    s = torch.sigmoid(twice)
    return s + z * s * torch.sigmoid(-twice) * scale * (1.0 + 3.0 * 0.044715 * z * z)


def _with_bias(hidden: Tensor, bias: Tensor | None) -> Tensor:
    z = hidden.to(compute_dtype(hidden.dtype))
    return z if bias is None else z + bias.to(z.dtype)


def _dropped(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    if seed is None:
        return x
    return torch.where(keep_mask(seed, tuple(x.shape), dropout_p), x * keep_scale(dropout_p), 0.0)
