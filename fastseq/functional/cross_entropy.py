"""cross_entropy."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from ..backends import current_backend, note
from ..ops.cross_entropy import REDUCTIONS, CrossEntropyFunction, forward_op
from ..reference import cross_entropy as reference
from ..reference.layer_norm import compute_dtype
from ._dispatch import FLOATING, is_foreign, is_transformed, records_gradient, under_autocast


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    softcap: float | None = ...,
    z_loss: float = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    softcap: float | None = ...,
    z_loss: float = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross-entropy of logits, as :func:`torch.nn.functional.cross_entropy`, and three powers.

    For a row of logits :math:`x` over :math:`C` classes with target :math:`t`, class weights
    :math:`w` and label smoothing :math:`s`:

    .. math::
        z &= x \quad\text{or}\quad c \tanh(x / c) \text{ with softcap } c, \qquad
        \mathrm{lse} = \log \sum_j e^{z_j} \\
        \ell &= w_t \big( (1 - s)(\mathrm{lse} - z_t) + \lambda\, \mathrm{lse}^2 \big)
        + \frac{s}{C} \sum_j w_j (\mathrm{lse} - z_j)

    The logits are read once forward; they and two numbers a row are all that is kept for the
    backward, which reads them once and writes their gradient once. No log-probabilities are stored.

    Args:
        input: logits ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``; fp32, fp64, fp16 or bf16; any
            strides. ``[N, T, C]`` logits viewed as ``[N, C, T]`` are read as they lie.
        target: class indices ``[]``, ``[N]`` or ``[N, d1, ...]``, int64 or uint8; or class
            probabilities of the input's shape, which torch's own function takes.
        weight: a weight for each class, ``[C]``.
        ignore_index: rows with this target have loss and gradient 0, and do not count in a mean.
        reduction: ``"mean"`` (over the weights of the targets), ``"sum"`` or ``"none"``.
        size_average, reduce: torch's deprecated names for it.
        label_smoothing: :math:`s` in [0, 1], the share spread evenly over all classes.
        softcap: bounds the logits to (-softcap, softcap) first (Gemma 2's final softcap).
        z_loss: :math:`\lambda \ge 0`, keeps lse near 0 (PaLM's auxiliary loss). As the rest of a
            row's loss it counts ``w[t]`` times; with probabilities as targets, once.
        return_lse: return lse too.

    Returns:
        The loss in the input's dtype (fp32 under autocast), of the target's shape or scalar;
        with ``return_lse`` a pair ``(loss, lse)``, lse in fp32 (fp64 for fp64), differentiable,
        of every row, ignored or not. A mean over no rows is NaN. Arithmetic is fp32, or fp64 for
        fp64 input.

    Raises:
        IndexError: a target is no class and not ``ignore_index``. On a GPU, where finding out would
            wait for the device, that row's loss and gradient are NaN instead.
        ValueError: batch sizes differ; an unknown reduction; softcap or z_loss out of range.
        RuntimeError: shapes, dtypes or devices that do not fit.
        NotImplementedError: the input is not floating point.

    Source: label smoothing: Szegedy et al. 2016, section 7; z-loss: Chowdhery et al., "PaLM", 2022,
    section 5.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    cap = _validated_extras("cross_entropy", softcap, z_loss)
    extras = softcap is not None or z_loss != 0.0 or return_lse
    reason = _left_to_torch(input, target, weight, extras)
    if reason:
        note("cross_entropy", "torch", reason)
        if not extras:
            return F.cross_entropy(
                input,
                target,
                weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
            )
        return _composed(
            input,
            target,
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            cap,
            z_loss,
            return_lse,
        )
    _validate("cross_entropy", input, target, weight, reduction, label_smoothing)
    target = target.long()
    logits = input.movedim(1, -1) if input.dim() > 2 else input
    loss, lse = _of_rows(
        logits,
        target,
        weight,
        ignore_index,
        reduction,
        max(label_smoothing, 0.0),
        cap,
        z_loss,
        return_lse,
    )
    return loss if lse is None else (loss, lse)


def _of_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Logits ``[*, C]`` and indices ``[*]`` through the op or, under a transform, the reference."""
    loss_dtype = _loss_dtype(logits)
    if is_transformed():
        note("cross_entropy", "reference", "torch.func or forward-mode AD")
        loss, lse = reference.cross_entropy(
            logits,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            softcap=softcap,
            z_loss=z_loss,
            output_dtype=loss_dtype,
        )
        return loss, lse if return_lse else None
    arguments = (
        logits,
        target,
        weight,
        ignore_index,
        REDUCTIONS[reduction],
        label_smoothing,
        softcap,
        z_loss,
        return_lse,
        loss_dtype,
    )
    if records_gradient(logits):
        made = CrossEntropyFunction.apply(*arguments)  # type: ignore[no-untyped-call]
        return made if return_lse else (made, None)
    loss, maximum, log_sum, _ = forward_op(*arguments)
    return loss, (maximum + log_sum).view(target.shape) if return_lse else None


def _left_to_torch(
    input: Tensor, target: Tensor, weight: Tensor | None, extras: bool
) -> str | None:
    """Why a call is not for our kernels, or None."""
    if is_foreign(input, target, weight):
        return "a tensor subclass, layout or trace that torch must handle"
    if input.dim() and input.shape == target.shape:
        return "class probabilities as targets"
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return "a gradient of the class weights"
    if input.dim() == 1 and target.shape == (1,):
        return "a batch of one target for logits without a batch"
    if input.dim() and input.shape[1 if input.dim() > 1 else 0] == 0:
        return "no classes"
    return None if extras else _torch_is_quicker(input)


def _torch_is_quicker(input: Tensor) -> str | None:
    """Why torch's own function is done before ours, or None.

    Measured on one core of an AVX-512 EPYC, forward and backward: torch is ahead below 64 thousand
    logits, where the way through Python costs more than the kernels save; between 16 and 256
    classes, where it takes several rows at once; and three times where the classes lie furthest
    apart in memory (``[N, C, H, W]`` images), which ours would copy.
    """
    if current_backend() != "auto" or torch.compiler.is_compiling():
        return None
    if input.dim() > 2 and input.stride(1) != 1:
        return "classes that are not side by side in memory"
    if not input.is_cpu:
        return None
    if input.numel() < 64_000 * torch.get_num_threads():
        return "so small that the call costs more than the kernel saves"
    classes = input.shape[min(input.dim() - 1, 1)]
    return "rows so short that torch takes several at once" if 16 <= classes < 256 else None


def _composed(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The extras around torch's own cross-entropy, where the kernels do not go."""
    dim = 1 if input.dim() > 1 else 0
    z = reference.softcapped(input.to(compute_dtype(input.dtype)), softcap)
    lse = torch.logsumexp(z, dim)
    indices = not target.is_floating_point()
    losses = F.cross_entropy(
        z,
        target if indices else target.to(z.dtype),
        None if weight is None else weight.to(z.dtype),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    counts = torch.ones_like(losses)
    if indices:
        kept = (target != ignore_index).reshape(losses.shape)
        index = torch.where(kept, target.reshape(losses.shape).long(), 0)
        counts = counts if weight is None else weight.to(z.dtype)[index]
        counts = torch.where(kept, counts, 0.0)
    if z_loss:
        losses = losses + z_loss * counts * lse.reshape(losses.shape).square()
    if reduction == "mean":
        loss = losses.sum() / counts.sum()
    else:
        loss = losses if reduction == "none" else losses.sum()
    loss = loss.to(_loss_dtype(input))
    return (loss, lse) if return_lse else loss


def _loss_dtype(logits: Tensor) -> torch.dtype:
    """The logits' dtype; under autocast fp32, on the CPU too (unlike norms and softmax)."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        return torch.float32 if under_autocast(logits) else logits.dtype
    return logits.dtype


# --- validation ----------------------------------------------------------------------------------


def _validated_extras(name: str, softcap: float | None, z_loss: float) -> float:
    """The softcap as the ops take it, 0 for none."""
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{name}: softcap must be positive and finite, or None, got {softcap}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"{name}: z_loss must be at least 0 and finite, got {z_loss}")
    return softcap or 0.0


def _validate(
    name: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    if not input.dim():
        raise RuntimeError(f"{name}: input must have a dimension of classes, got shape []")
    if input.dtype not in FLOATING:
        raise NotImplementedError(
            f"{name}: input must be fp32, fp64, fp16 or bf16, got {input.dtype}"
        )
    shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else torch.Size()
    if target.dim() == len(shape) == 1 and target.shape != shape:
        raise ValueError(
            f"{name}: target must have the input's batch size, {shape[0]}, got {target.shape[0]}"
        )
    if target.shape != shape:
        raise RuntimeError(
            f"{name}: target must be class indices of shape {list(shape)} or class probabilities "
            f"of the input's shape {list(input.shape)}, got shape {list(target.shape)}"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(
            f"{name}: target must be class indices in int64 or uint8, or class probabilities of "
            f"the input's shape {list(input.shape)}, got {target.dtype}"
        )
    if target.device != input.device:
        raise RuntimeError(
            f"{name}: target must be on the input's device {input.device}, got {target.device}"
        )
    if not label_smoothing <= 1.0:
        raise RuntimeError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if weight is not None:
        _validate_weight(name, weight, input.shape[min(input.dim() - 1, 1)], input.device)


def _validate_weight(name: str, weight: Tensor, classes: int, device: torch.device) -> None:
    if weight.shape != (classes,):
        raise RuntimeError(
            f"{name}: weight must have an element for each of the {classes} classes, "
            f"got shape {list(weight.shape)}"
        )
    if weight.dtype not in FLOATING:
        raise RuntimeError(f"{name}: weight must be fp32, fp64, fp16 or bf16, got {weight.dtype}")
    if weight.device != device:
        raise RuntimeError(
            f"{name}: weight must be on the input's device {device}, got {weight.device}"
        )
