"""Additive attention (Bahdanau, Cho & Bengio 2015, appendix A.1.2).

All arithmetic is fp32, or fp64 for fp64 input; only inputs and results are rounded to their dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_norm import compute_dtype
from .softmax import masked_softmax, softmax_backward


def additive_attention(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, mask: Tensor | None = None
) -> Tensor:
    """``softmax(score_weight . tanh(query + key)) value`` over the keys that take part.

    A query without any gives 0. What a query does not take may be anything, NaN included.
    """
    compute = compute_dtype(query.dtype)
    q, k, v, u = (tensor.to(compute) for tensor in (query, key, value, score_weight))
    k, v = without_unused(k, mask), without_unused(v, mask)
    weights = masked_softmax(scores(q, k, u), mask)
    return product(weights, v, mask).to(query.dtype)


def product(weights: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """``weights @ x`` where NaN and Inf in x give NaN to the rows alone whose mask takes them."""
    if mask is None:
        return weights @ x
    bad = ~x.isfinite()
    taken = mask.expand(weights.shape).to(weights.dtype) @ bad.to(weights.dtype) > 0
    return torch.where(taken, torch.nan, weights @ x.masked_fill(bad, 0.0))


def scores(query: Tensor, key: Tensor, score_weight: Tensor) -> Tensor:
    """``s[i, j] = sum over h of score_weight[h] * tanh(query[i, h] + key[j, h])``."""
    return torch.tanh(query[:, :, None] + key[:, None]) @ score_weight


def without_unused(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Keys or values with 0 for those that no query takes: times a weight of 0, NaN is NaN."""
    if mask is None:
        return tensor
    used = mask.any(-2)[:, :, None].expand(-1, tensor.shape[1], -1)
    return tensor.masked_fill(~used, 0.0)


def scores_backward(
    grad_scores: Tensor, query: Tensor, key: Tensor, score_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and score_weight from the scores'.

    With ``t = tanh(query[i] + key[j])`` and ``g = grad_scores``::

        grad_query[i]     = sum over j of g[i, j] * score_weight * (1 - t^2)
        grad_key[j]       = sum over i of the same
        grad_score_weight = sum over i and j of g[i, j] * t
    """
    tanh = torch.tanh(query[:, :, None] + key[:, None])
    grad = grad_scores[..., None]
    # What has no gradient takes no part, and may be NaN.
    weighted = torch.where(grad == 0, 0.0, grad * tanh)
    slope = torch.where(grad == 0, 0.0, (1 - tanh * tanh) * grad) * score_weight
    return slope.sum(2), slope.sum(1), weighted.sum((0, 1, 2))


def additive_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and score_weight, in the compute dtype."""
    compute = compute_dtype(query.dtype)
    q, k, v, u, grad = (t.to(compute) for t in (query, key, value, score_weight, grad_output))
    k, v = without_unused(k, mask), without_unused(v, mask)
    weights = masked_softmax(scores(q, k, u), mask)
    grad_scores = softmax_backward(grad @ v.mT, weights, -1, masked=True)
    grad_query, grad_key, grad_weight = scores_backward(grad_scores, q, k, u)
    transposed = None if mask is None else mask.expand(weights.shape).mT
    return grad_query, grad_key, product(weights.mT, grad, transposed), grad_weight
