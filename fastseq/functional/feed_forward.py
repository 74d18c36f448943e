"""feed_forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import current_backend, note
from ..ops.feed_forward import FeedForwardFunction, first_half
from ..random import draw_seed
from ..reference import feed_forward as reference
from ..reference.feed_forward import ACTIVATIONS
from ._dispatch import FLOATING, is_foreign, is_transformed, records_gradient, under_autocast


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "relu",
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    r"""The position-wise feed-forward block of a Transformer's layer.

    .. math:: y = \mathrm{dropout}(\phi(x W_1^T + b_1)) W_2^T + b_2

    Two library products, with bias, activation and dropout in one pass between them. Backward, one
    pass takes the gradient through them, adds up that of :math:`b_1`, and makes the activation
    again for the gradient of :math:`W_2`: so of the wide tensors only one is kept, the first
    product (for ReLU the activation), where torch keeps two, and a mask where it drops.

    Args:
        input: ``[*, D]``; fp32, fp64, fp16 or bf16.
        weight1: :math:`W_1`, ``[F, D]``, or for SwiGLU ``[2F, D]``.
        bias1: :math:`b_1`, ``[F]`` or ``[2F]``, or None.
        weight2: :math:`W_2`, ``[E, F]``.
        bias2: :math:`b_2`, ``[E]``, or None.
        activation: :math:`\phi`: ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` (GELU's approximation by
            tanh), ``"silu"``, or ``"swiglu"``: :math:`\mathrm{silu}(g) \cdot u` of the two halves
            g (first) and u of the product.
        dropout_p: probability of zeroing an element of the activation; the others are scaled by
            ``1 / (1 - dropout_p)``. The mask is a function of a seed drawn from torch's generator
            and the position alone.
        training: without it nothing is dropped.

    Returns:
        ``[*, E]`` in the input's dtype (autocast's where that is on). Between the products
        arithmetic is fp32, or fp64 for fp64.

    Raises:
        ValueError: an unknown activation, or ``dropout_p`` outside [0, 1].
        RuntimeError: shapes, dtypes or devices do not fit each other.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.3; Hendrycks & Gimpel,
    "Gaussian Error Linear Units", 2016; Shazeer, "GLU Variants Improve Transformer", 2020, eq. 6.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"feed_forward: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"feed_forward: dropout_p must be between 0 and 1, got {dropout_p}")
    dropout_p = dropout_p if training else 0.0
    tensors = (input, weight1, bias1, weight2, bias2)
    if is_foreign(*tensors):
        note("feed_forward", "torch", "a tensor subclass, layout or trace that torch must handle")
        return _by_torch(*tensors, activation, dropout_p)
    device = input.device.type
    if under_autocast(input) and input.dtype != torch.float64:
        half = torch.get_autocast_dtype(device)
        input, weight1, weight2 = input.to(half), weight1.to(half), weight2.to(half)
        bias1, bias2 = (None if bias is None else bias.to(half) for bias in (bias1, bias2))
    _validate(input, weight1, bias1, weight2, bias2, activation)
    tensors = (input, weight1, bias1, weight2, bias2)
    records = records_gradient(*tensors)
    if reason := _torch_is_quicker(records, input, weight1, activation, dropout_p):
        note("feed_forward", "torch", reason)
        return _by_torch(*tensors, activation, dropout_p)
    seed = draw_seed(input.device) if dropout_p > 0.0 else None
    if is_transformed():
        note("feed_forward", "reference", "torch.func or forward-mode AD")
        return reference.feed_forward(*tensors, activation, dropout_p, seed)
    if records:
        output: Tensor = FeedForwardFunction.apply(  # type: ignore[no-untyped-call]
            *tensors, seed, activation, dropout_p
        )
        return output
    _, between = first_half(input, weight1, bias1, seed, activation, dropout_p)
    return F.linear(between, weight2, bias2)


def _torch_is_quicker(
    records: bool, input: Tensor, weight1: Tensor, activation: str, dropout_p: float
) -> str | None:
    """Why torch's composition is done as soon, or None.

    Measured on one core of an AVX-512 EPYC. With dropout ours is ahead nearly everywhere, and it
    alone draws our mask. Without, the two products are nearly all of the time, and ours takes 20 us
    longer to call, 40 where autograd records. SwiGLU and GELU by tanh are some percent ahead from
    half a million wide elements on; the others are level from 4 million on, where recording saves
    memory.
    """
    if dropout_p > 0.0 or not input.is_cpu:
        return None
    if current_backend() != "auto" or torch.compiler.is_compiling():
        return None
    if input.dtype == torch.float64:
        return "no fp64 kernel"
    if activation == "relu":
        return "its ReLU works in place, so that there is neither time nor memory to save"
    limit = 250_000
    if activation in ("gelu", "silu"):
        if not records:
            return "between its products it is as fast, and nothing is saved"
        limit = 2_000_000
    elements = input.numel() // max(1, input.shape[-1]) * weight1.shape[0]
    if elements >= limit * torch.get_num_threads():
        return None
    return "so small that the call costs more than the kernel saves"


def _by_torch(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    dropout_p: float,
) -> Tensor:
    hidden = F.linear(input, weight1, bias1)
    if activation == "relu":
        # Where it stands: nobody else has it, and the product before does not save it.
        hidden = torch.relu_(hidden)
    elif activation == "swiglu":
        gate, up = hidden.chunk(2, -1)
        hidden = F.silu(gate) * up
    elif activation == "silu":
        hidden = F.silu(hidden)
    else:
        hidden = F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
    return F.linear(F.dropout(hidden, dropout_p) if dropout_p else hidden, weight2, bias2)


def _validate(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
) -> None:
    name = "feed_forward"
    if input.dtype not in FLOATING:
        raise RuntimeError(f"{name}: input must be fp32, fp64, fp16 or bf16, got {input.dtype}")
    if not input.dim():
        raise RuntimeError(f"{name}: input must have a dimension of features, got shape []")
    features, gated = input.shape[-1], activation == "swiglu"
    if weight1.dim() != 2 or weight1.shape[1] != features:
        raise RuntimeError(
            f"{name}: weight1 must be [F, {features}] for an input of {features} features, "
            f"got {list(weight1.shape)}"
        )
    length = weight1.shape[0]
    if gated and length % 2:
        raise RuntimeError(f"{name}: weight1 must have 2F rows for swiglu, got {length}")
    wide = length // 2 if gated else length
    if weight2.dim() != 2 or weight2.shape[1] != wide:
        raise RuntimeError(
            f"{name}: weight2 must be [E, {wide}] for a weight1 of {length} rows, "
            f"got {list(weight2.shape)}"
        )
    for role, bias, size in (("bias1", bias1, length), ("bias2", bias2, weight2.shape[0])):
        if bias is not None and bias.shape != (size,):
            raise RuntimeError(f"{name}: {role} must be [{size}], got {list(bias.shape)}")
    others = (("weight1", weight1), ("bias1", bias1), ("weight2", weight2), ("bias2", bias2))
    for role, tensor in others:
        if tensor is not None and tensor.dtype != input.dtype:
            raise RuntimeError(
                f"{name}: {role} must have the input's dtype {input.dtype}, got {tensor.dtype}"
            )
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                f"{name}: {role} must be on the input's device {input.device}, got {tensor.device}"
            )
