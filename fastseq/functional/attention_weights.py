"""attention_weights: what attention looks at, without the memory of the whole map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import note
from ..ops.attention import Forward, dense_problem
from ..ops.attention_blockwise import weights_by_piece
from ..reference import attention as reference
from ..reference.layer_norm import compute_dtype
from ._attention_checks import Window
from ._dispatch import is_foreign, is_transformed, records_gradient
from .attention import prepared

REDUCTIONS = ("none", "heads", "keys", "entropy", "top_k")


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    reduce: str = "none",
    k: int = 1,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    causal_alignment: str = "top_left",
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The weights :math:`p_{ij} = e^{s_{ij} - \mathrm{lse}_i}` of attention, or what they come to.

    The scores are drawn a block of queries at a time, with whole rows, and what is asked for is
    taken from the block: beyond the result itself it takes O(L) memory.

    Args:
        query, key: as :func:`attention`, not packed.
        reduce: what to return:

            ==============  =============================================  ====================
            ``"none"``      the whole map                                  ``[*, H, Lq, Lk]``
            ``"heads"``     its mean over the heads                        ``[*, Lq, Lk]``
            ``"keys"``      what each key gets, summed over the queries    ``[*, H, Lk]``
            ``"entropy"``   :math:`-\sum_j p_{ij} \log p_{ij}`             ``[*, H, Lq]``
            ``"top_k"``     the k largest of each query and their keys     ``[*, H, Lq, k]`` twice
            ==============  =============================================  ====================
        k: for ``"top_k"``; at most Lk.
        bias, mask, causal, causal_alignment, window, softcap, alibi_slopes, sinks, scale: as
            :func:`attention`.

    Returns:
        The maps in the query's dtype, sums and entropies in fp32 (fp64 for fp64); top_k as
        ``(weights, keys)`` in the query's dtype and int64. Differentiable, then with the memory of
        the map. A query that sees nothing has weights 0 and entropy 0.

    Raises:
        ValueError: ``reduce`` is none of these, or ``k`` is not between 0 and Lk.
        As :func:`attention`.
    """
    name = "attention_weights"
    if reduce not in REDUCTIONS:
        raise ValueError(f"{name}: reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    if reduce == "top_k" and not 0 <= k <= key.shape[-2]:
        raise ValueError(f"{name}: k must be between 0 and the {key.shape[-2]} keys, got {k}")
    a, leading = prepared(
        name,
        query,
        key,
        key,
        bias=bias,
        mask=mask,
        causal=causal,
        causal_alignment=causal_alignment,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
    )
    whole = (
        is_foreign(a.query, a.key, a.bias, a.mask)
        or is_transformed()
        or records_gradient(a.query, a.key, a.bias, a.sinks)
        or torch.compiler.is_compiling()
    )
    if whole:
        note(name, "reference", "a gradient, a transform or a trace wants the whole map")
        results = _reduced(_whole_map(a), reduce, k)
    else:
        results = _STREAMS[reduce](a, k)
    dtype = query.dtype
    shaped = tuple(
        result.reshape(*leading, *result.shape[1:]) if len(leading) != 1 else result
        for result in results
    )
    if reduce == "top_k":
        return shaped[0].to(dtype), shaped[1]
    return shaped[0].to(dtype) if reduce in ("none", "heads") else shaped[0]


def _whole_map(a: Forward) -> Tensor:
    slopes = a.alibi_slopes
    if slopes is not None:
        slopes = slopes.expand(a.query.shape[:2])
    return reference.attention_weights(
        a.query,
        a.key,
        a.bias,
        a.mask,
        slopes,
        a.sinks,
        scale=a.scale,
        window_left=a.window_left,
        window_right=a.window_right,
        bottom_right=a.bottom_right,
        softcap=a.softcap,
    )[0]


def _entropy(weights: Tensor) -> Tensor:
    # Where a weight is 0 the logarithm is taken of 1, so that no gradient is NaN.
    return -(weights * torch.where(weights > 0, weights, 1.0).log()).sum(-1)


def _reduced(weights: Tensor, reduce: str, k: int) -> tuple[Tensor, ...]:
    if reduce == "heads":
        return (weights.mean(1),)
    if reduce == "keys":
        return (weights.sum(2),)
    if reduce == "entropy":
        return (_entropy(weights),)
    if reduce == "top_k":
        values, keys = weights.topk(k, -1)
        return values, keys
    return (weights,)


# --- block by block ------------------------------------------------------------------------------


def _map(a: Forward, k: int) -> tuple[Tensor, ...]:
    result = a.query.new_zeros((*a.query.shape[:3], a.key.shape[2]))
    rows = result.view(-1, *result.shape[2:])
    for piece, heads, weights in weights_by_piece(dense_problem(a)):
        rows[heads.flatten(), piece.i, piece.j] = weights.flatten(0, 1).to(result.dtype)
    return (result,)


def _heads(a: Forward, k: int) -> tuple[Tensor, ...]:
    batch, number, queries, _ = a.query.shape
    result = a.query.new_zeros((batch, queries, a.key.shape[2]), dtype=_wide(a))
    for piece, heads, weights in weights_by_piece(dense_problem(a)):
        part = result[:, piece.i, piece.j]
        part.index_add_(0, (heads // number).flatten(), weights.flatten(0, 1), alpha=1 / number)
    return (result,)


def _keys(a: Forward, k: int) -> tuple[Tensor, ...]:
    result = a.query.new_zeros((*a.query.shape[:2], a.key.shape[2]), dtype=_wide(a))
    rows = result.view(-1, result.shape[2])
    for piece, heads, weights in weights_by_piece(dense_problem(a)):
        rows[:, piece.j].index_add_(0, heads.flatten(), weights.sum(2).flatten(0, 1))
    return (result,)


def _entropies(a: Forward, k: int) -> tuple[Tensor, ...]:
    result = a.query.new_zeros(a.query.shape[:3], dtype=_wide(a))
    rows = result.view(-1, result.shape[2])
    for piece, heads, weights in weights_by_piece(dense_problem(a)):
        rows[heads.flatten(), piece.i] = _entropy(weights).flatten(0, 1)
    return (result,)


def _top_k(a: Forward, k: int) -> tuple[Tensor, ...]:
    """Of fewer than k keys that a block sees the rest are the first of the others, at weight 0."""
    shape = (*a.query.shape[:3], k)
    values = a.query.new_zeros(shape, dtype=_wide(a))
    keys = torch.zeros(shape, dtype=torch.int64, device=a.query.device)
    all_values, all_keys = values.view(-1, *shape[2:]), keys.view(-1, *shape[2:])
    total = a.key.shape[2]
    for piece, heads, weights in weights_by_piece(dense_problem(a)):
        found = weights.flatten(0, 1)
        first = piece.j.start
        if found.shape[-1] < k:
            wide = found.new_zeros((*found.shape[:-1], total))
            wide[..., piece.j] = found
            found, first = wide, 0
        largest, at = found.topk(k, -1)
        all_values[heads.flatten(), piece.i] = largest
        all_keys[heads.flatten(), piece.i] = at + first
    return values, keys


def _wide(a: Forward) -> torch.dtype:
    return compute_dtype(a.query.dtype)


_STREAMS: dict[str, Callable[[Forward, int], tuple[Tensor, ...]]] = {
    "none": _map,
    "heads": _heads,
    "keys": _keys,
    "entropy": _entropies,
    "top_k": _top_k,
}
