"""Cross-entropy of class indices, with what language models add to it; next-token sampling.

All arithmetic is fp32, or fp64 for fp64 logits; only inputs and results are rounded to their dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..random import bits
from .layer_norm import compute_dtype


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(logits / softcap)``; the logits themselves without a softcap."""
    return logits if not softcap else softcap * torch.tanh(logits / softcap)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``(loss, lse)`` of logits ``[*, classes]`` and class indices ``[*]``.

    With ``z = softcapped(logits)``, ``lse = log(sum(exp(z)))``, ``p = label_smoothing`` and class
    weights ``w``, a row's loss is::

        w[t] * ((1 - p) * (lse - z[t]) + z_loss * lse^2) + p / classes * sum(w * (lse - z))

    and 0 where the target is ``ignore_index``; ``mean`` divides the sum of losses by that of
    ``w[t]`` over the rows that are not ignored.
    """
    z = softcapped(logits.to(compute_dtype(logits.dtype)), softcap)
    lse = torch.logsumexp(z, -1)
    minus_log_p = -torch.log_softmax(z, -1)
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    at_target = minus_log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    target_weight = torch.ones_like(lse) if weight is None else weight.to(z.dtype)[index]
    losses = target_weight * (1.0 - label_smoothing) * at_target
    if label_smoothing:
        weighted = minus_log_p if weight is None else minus_log_p * weight.to(z.dtype)
        losses = losses + label_smoothing / logits.shape[-1] * weighted.sum(-1)
    if z_loss:
        losses = losses + target_weight * z_loss * lse.square()
    losses = torch.where(kept, losses, 0.0)
    if reduction == "none":
        loss = losses
    elif reduction == "sum":
        loss = losses.sum()
    else:
        loss = losses.sum() / torch.where(kept, target_weight, 0.0).sum()
    return loss.to(output_dtype or logits.dtype), lse


def cross_entropy_backward(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor | None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Gradient of :func:`cross_entropy` with respect to the logits, in the compute dtype.

    With ``g`` the gradient of a row's loss, 0 where it is ignored, and ``s = label_smoothing``::

        grad_z = (g * w[t] * (1 - s + 2 * z_loss * lse) + g * s / classes * sum(w) + grad_lse)
                 * softmax(z) - g * w[t] * (1 - s) * [c = t] - g * s / classes * w

    and ``grad_logits = grad_z * (1 - (z / softcap)^2)``.

    Args:
        grad_loss: of the row losses, ``[*]``, or of the reduced loss, ``[]``.
        grad_lse: ``[*]`` or None.
        denominator: what a mean was divided by, or None.
    """
    compute = compute_dtype(logits.dtype)
    z = softcapped(logits.to(compute), softcap)
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    grad = grad_loss.to(compute).expand(target.shape)
    if denominator is not None:
        grad = grad / denominator
    grad = torch.where(kept, grad, 0.0)
    weights = z.new_ones(z.shape[-1]) if weight is None else weight.to(compute)
    smooth = grad * label_smoothing / z.shape[-1]
    at_target = grad * weights[index] * (1.0 - label_smoothing)
    total = at_target + smooth * weights.sum()
    if z_loss:
        total = total + grad * weights[index] * 2.0 * z_loss * torch.logsumexp(z, -1)
    if grad_lse is not None:
        total = total + grad_lse
    grad_z = total.unsqueeze(-1) * torch.softmax(z, -1) - smooth.unsqueeze(-1) * weights
    grad_z = grad_z.scatter_add(-1, index.unsqueeze(-1), -at_target.unsqueeze(-1))
    if grad_lse is None:  # NaN in a row that takes no part stays there
        grad_z = torch.where(kept.unsqueeze(-1), grad_z, 0.0)
    return grad_z * (1.0 - (z / softcap).square()) if softcap else grad_z


def sample(logits: Tensor, seed: Tensor, first_row: int, temperature: float) -> Tensor:
    """A class for each row ``[rows, classes]``, drawn with ``softmax(logits / temperature)``.

    The Gumbel-max trick: ``argmax(logits / temperature - log(E))`` with exponential variables
    ``E = -log(1 - (bits + 1/2) / 2^32)``, a function of seed, row and class. -1 where no logit is
    above -Inf; NaN is never chosen.
    """
    drawn = bits(seed, logits.shape[0], logits.shape[1], first_row).double()
    exponential = -torch.log1p(-(drawn + 0.5) * 2.0**-32)
    score = logits.double() / temperature - torch.log(exponential)
    score = torch.where(score.isnan(), -torch.inf, score)
    best, token = score.max(1)
    return torch.where(best > -torch.inf, token, -1)
