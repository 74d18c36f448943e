"""linear_cross_entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import note
from ..ops.cross_entropy import REDUCTIONS
from ..ops.linear_cross_entropy import LinearCrossEntropyFunction, forward_op, plain
from ._dispatch import FLOATING, is_foreign, is_transformed, records_gradient, under_autocast
from .cross_entropy import _loss_dtype, _validate, _validated_extras, cross_entropy


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    r"""Cross-entropy of ``input @ linear_weight.T + linear_bias``, without the logits in memory.

    Equal to :func:`torch.nn.functional.linear` and then :func:`cross_entropy`. Logits exist for a
    chunk of tokens at a time, at most 48 MiB of them and of their gradient; the gradients of all
    three arguments are summed up chunk by chunk, in fp32. A reduced loss takes the three matrix
    products of the plain pair; with ``reduction="none"`` the logits are made again in backward.

    Args:
        input: hidden states ``[features]``, ``[N, features]``, or any ``[*, features]``.
        linear_weight: the vocabulary matrix ``[classes, features]``. Of torch's
            ``[classes, d1, ..., features]`` all logits are made at once.
        target: class indices ``[*]``; for probabilities ``[*, classes]`` all logits are made too.
        linear_bias: ``[classes]`` or None.
        weight, reduction, label_smoothing, softcap, z_loss: as :func:`cross_entropy`.
        ignore_index: the target to ignore; None means -100.

    Returns:
        The loss in the dtype that the plain pair has, scalar or of the target's shape.

    Raises:
        IndexError, ValueError, RuntimeError, NotImplementedError: as :func:`cross_entropy`;
            RuntimeError where the features or the bias do not fit.

    Double backward and ``torch.func`` make all logits at once.
    """
    name = "linear_cross_entropy"
    cap = _validated_extras(name, softcap, z_loss)
    _validate_linear(name, input, linear_weight, linear_bias)
    ignored = -100 if ignore_index is None else ignore_index
    tokens, classes = input.shape[:-1], linear_weight.shape[0]
    outputs = linear_weight.shape[1:-1]
    probabilities = target.shape == (*tokens, classes, *outputs)
    reason = None
    if is_foreign(input, linear_weight, target, linear_bias, weight):
        reason = "a tensor subclass, layout or trace that torch must handle"
    elif probabilities:
        if ignore_index is not None:
            raise RuntimeError(
                f"{name}: ignore_index must be None for class probabilities, got {ignore_index}"
            )
        reason = "class probabilities as targets"
    elif outputs:
        reason = "several outputs for a token"
    elif weight is not None and weight.requires_grad and torch.is_grad_enabled():
        reason = "a gradient of the class weights"
    elif not classes or not input.shape[-1]:
        reason = "no classes or no features"
    if reason:
        note(name, "torch", reason)
        logits = F.linear(
            input,
            linear_weight.reshape(-1, linear_weight.shape[-1]),
            None if linear_bias is None else linear_bias.reshape(-1),
        ).reshape(*tokens, classes, *outputs)
        if len(tokens) > 1:
            logits, target = logits.flatten(0, len(tokens) - 1), target.flatten(0, len(tokens) - 1)
        loss = cross_entropy(
            logits,
            target,
            weight,
            ignore_index=ignored,
            reduction=reduction,
            label_smoothing=label_smoothing,
            softcap=softcap,
            z_loss=z_loss,
        )
        return loss.unflatten(0, tokens) if loss.dim() and len(tokens) > 1 else loss

    device = input.device.type
    if under_autocast(input) and input.dtype != torch.float64:
        half = torch.get_autocast_dtype(device)
        input, linear_weight = input.to(half), linear_weight.to(half)
        linear_bias = None if linear_bias is None else linear_bias.to(half)
    elif (
        not input.dtype
        == linear_weight.dtype
        == (linear_weight if linear_bias is None else linear_bias).dtype
    ):
        raise RuntimeError(
            f"{name}: linear_weight and linear_bias must have the input's dtype {input.dtype}, "
            f"got {linear_weight.dtype} and {None if linear_bias is None else linear_bias.dtype}"
        )
    # What cross_entropy would be given: a stride-0 stand-in for the logits.
    stand_in = input.new_empty(()).expand(target.numel() if tokens else 1, classes)
    _validate(
        name,
        stand_in if target.shape == tokens else input.new_empty(()).expand(*tokens, classes),
        target.reshape(-1) if target.shape == tokens else target,
        weight,
        reduction,
        label_smoothing,
    )
    loss_dtype = _loss_dtype(input)
    rows = input.reshape(-1, input.shape[-1])
    indices = target.reshape(-1).long()
    smoothing = max(label_smoothing, 0.0)
    if is_transformed():
        note(name, "reference", "torch.func or forward-mode AD")
        loss = plain(
            rows,
            linear_weight,
            linear_bias,
            indices,
            weight,
            ignore_index=ignored,
            reduction=reduction,
            label_smoothing=smoothing,
            softcap=cap,
            z_loss=z_loss,
            output_dtype=loss_dtype,
        )
    else:
        options = (ignored, REDUCTIONS[reduction], smoothing, cap, z_loss)
        arguments = (rows, linear_weight, linear_bias, indices, weight, *options)
        if records_gradient(input, linear_weight, linear_bias):
            wanted = tuple(
                t is not None and t.requires_grad for t in (input, linear_weight, linear_bias)
            )
            loss = LinearCrossEntropyFunction.apply(  # type: ignore[no-untyped-call]
                *arguments, wanted, loss_dtype
            )
        else:
            loss = forward_op(*arguments, (False, False, False), loss_dtype)[0]
    return loss.reshape(target.shape) if reduction == "none" else loss


def _validate_linear(
    name: str, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> None:
    if not input.dim():
        raise RuntimeError(f"{name}: input must have a dimension of features, got shape []")
    if input.dtype not in FLOATING:
        raise RuntimeError(f"{name}: input must be fp32, fp64, fp16 or bf16, got {input.dtype}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"{name}: linear_weight must be [classes, features], got {list(linear_weight.shape)}"
        )
    if linear_weight.shape[-1] != input.shape[-1]:
        raise RuntimeError(
            f"{name}: linear_weight must have the input's {input.shape[-1]} features, "
            f"got {list(linear_weight.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"{name}: linear_bias must have shape {list(linear_weight.shape[:-1])}, "
            f"got {list(linear_bias.shape)}"
        )
    for role, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                f"{name}: {role} must be on the input's device {input.device}, got {tensor.device}"
            )
