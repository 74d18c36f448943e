"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1) and everything that is added to it.

All arithmetic is fp32, or fp64 for fp64 input; only inputs and results are rounded to their dtype.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..random import bits, keep_scale, threshold
from .layer_norm import compute_dtype


def relative_positions(
    queries: int, keys: int, bottom_right: bool, device: torch.device, *, first: int = 0
) -> Tensor:
    """``j - i`` of key j and query i ``[queries, keys]``, where query 0 stands beside key 0, or
    with ``bottom_right`` the last query beside the last key.

    ``first``: the key in column 0, of those that are not all there.
    """
    shift = keys - queries if bottom_right else 0
    row = torch.arange(queries, device=device)[:, None] + shift
    return torch.arange(first, keys, device=device) - row


def visible_positions(relative: Tensor, window_left: int, window_right: int) -> Tensor:
    """True where a query sees a key: from ``window_left`` before to ``window_right`` behind it.

    A negative bound is none; causal attention is ``window_right = 0``.
    """
    visible = torch.ones_like(relative, dtype=torch.bool)
    if window_left >= 0:
        visible = visible & (relative >= -window_left)
    if window_right >= 0:
        visible = visible & (relative <= window_right)
    return visible


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_lengths: Tensor | None = None,
    seed: Tensor | None = None,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
    bottom_right: bool = False,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""``(output, lse)`` of ``[B, H, Lq, D]``, ``[B, Hk, Lk, D]`` and ``[B, Hk, Lk, Dv]``.

    .. math::
        s_{ij} = \mathrm{cap}(\mathrm{scale} \cdot q_i \cdot k_j) + b_{ij}
                 - \mathrm{slope} \cdot |j - i|, \qquad
        \mathrm{lse}_i = \log \Big( e^\mathrm{sink} + \sum_{j\ \mathrm{visible}} e^{s_{ij}} \Big),
        \qquad o_i = \sum_{j\ \mathrm{visible}} \mathrm{dropout}(e^{s_{ij} - \mathrm{lse}_i})\, v_j

    with ``cap(x) = softcap * tanh(x / softcap)``. Where nothing is visible the output is 0 and lse
    -inf (or the sink). What a query does not see has no part in its result or its gradients, NaN
    included.

    With ``cu_seqlens_q`` and ``cu_seqlens_k`` (``[sequences + 1]``) B is 1 and sequences follow one
    another along L; ``key_lengths [B]``: so many keys of each are there.
    """
    options = {
        "scale": scale,
        "window_left": window_left,
        "window_right": window_right,
        "bottom_right": bottom_right,
        "softcap": softcap,
        "dropout_p": dropout_p,
    }
    compute = compute_dtype(query.dtype)
    batch, heads, queries, _ = query.shape
    keep = None
    if seed is not None:
        columns = key.shape[2]
        keep = bits(seed, batch * heads * queries, columns) >= threshold(dropout_p)
        keep = keep.view(batch, heads, queries, columns)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(compute).expand(batch, heads)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        output = query.new_zeros((*query.shape[:3], value.shape[3]))
        lse = query.new_full(query.shape[:3], -math.inf, dtype=compute)
        parts = zip(
            sequences(cu_seqlens_q, queries), sequences(cu_seqlens_k, key.shape[2]), strict=True
        )
        outputs, lses, end = [output[:, :, :0]], [lse[:, :, :0]], 0
        for (start_q, end_q), (start_k, end_k) in parts:
            here = slice(start_q, end_q)
            there = slice(start_k, end_k)
            part = _dense(
                query[:, :, here],
                key[:, :, there],
                value[:, :, there],
                None,
                None,
                alibi_slopes,
                sinks,
                # A column is the key's number in its sequence.
                None if keep is None else keep[:, :, here, : end_k - start_k],
                **options,
            )
            outputs.append(part[0])
            lses.append(part[1])
            end = end_q
        outputs.append(output[:, :, end:])
        lses.append(lse[:, :, end:])
        return torch.cat(outputs, 2), torch.cat(lses, 2)
    if key_lengths is not None:
        results = []
        for b, length in enumerate(key_lengths.clamp(0, key.shape[2]).tolist()):
            one = slice(b, b + 1)
            results.append(
                _dense(
                    query[one],
                    key[one, :, :length],
                    value[one, :, :length],
                    None if bias is None else _rows(bias, b, length),
                    None if mask is None else _rows(mask, b, length),
                    None if alibi_slopes is None else alibi_slopes[one],
                    sinks,
                    None if keep is None else keep[one, ..., :length],
                    **options,
                )
            )
        if not results:
            return query.new_zeros((*query.shape[:3], value.shape[3])), query.new_zeros(
                query.shape[:3], dtype=compute
            )
        return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results])
    return _dense(query, key, value, bias, mask, alibi_slopes, sinks, keep, **options)


def sequences(cu_seqlens: Tensor, total: int) -> list[tuple[int, int]]:
    """``(start, end)`` of every sequence, within ``[0, total]`` and ascending whatever is given."""
    found, end = [], 0
    for first, last in pairwise(cu_seqlens.tolist()):
        start = min(max(first, end), total)
        end = min(max(last, start), total)
        found.append((start, end))
    return found


def _rows(tensor: Tensor, b: int, keys: int) -> Tensor:
    """A bias's or mask's part for batch b and the first ``keys`` keys."""
    tensor = tensor[:1] if tensor.shape[0] == 1 else tensor[b : b + 1]
    return tensor if tensor.shape[3] == 1 else tensor[..., :keys]


def _finite(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` with 0 where it is NaN or Inf, and where that is."""
    bad = ~x.isfinite()
    return torch.where(bad, 0.0, x), bad


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    keep: Tensor | None,
    *,
    dropout_p: float,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    weights, lse, visible = attention_weights(
        query, key, bias, mask, alibi_slopes, sinks, **options
    )
    v = value.to(weights.dtype)
    if v.shape[1] != weights.shape[1]:
        v = v.repeat_interleave(weights.shape[1] // v.shape[1], 1)
    v, bad = _finite(v)
    if keep is not None:
        weights = torch.where(keep, weights * keep_scale(dropout_p), 0.0)
    output = weights @ v
    output = torch.where(visible.any(-1, keepdim=True), output, 0.0)
    seen_bad = visible.to(v.dtype) @ bad.to(v.dtype) > 0
    output = torch.where(seen_bad, math.nan, output)
    return output.to(query.dtype), lse


def attention_weights(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(weights, lse, visible)``: ``e^(s - lse)`` where a query sees a key and 0 elsewhere."""
    compute = compute_dtype(query.dtype)
    q, k = query.to(compute), key.to(compute)
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    # 0 * NaN is NaN, in products and in their gradients: so what is not finite is left out of them,
    # and put where it is seen.
    q, bad_q = _finite(q)
    k, bad_k = _finite(k)
    scores = q @ k.mT * scale
    bad = bad_q.any(-1)[..., :, None] | bad_k.any(-1)[..., None, :]
    scores = torch.where(bad, math.nan, scores)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    relative = relative_positions(q.shape[2], k.shape[2], bottom_right, q.device)
    visible = visible_positions(relative, window_left, window_right).expand(scores.shape)
    if bias is not None:
        scores = scores + bias.to(compute)
        visible = visible & (bias != -math.inf)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, :, None, None] * relative.abs()
    if mask is not None:
        visible = visible & mask
    # Twice: exp(-inf) is 0, but its derivative times an infinite or NaN gradient would be NaN.
    scores = torch.where(visible, scores, -math.inf)
    if k.shape[2]:
        largest = scores.amax(-1, keepdim=True).detach()
    else:
        largest = torch.full_like(scores.sum(-1, keepdim=True), -math.inf)
    sink = None if sinks is None else sinks.to(compute)[:, None, None]
    if sink is not None:
        largest = torch.maximum(largest, sink.detach())
    largest = torch.where(largest == -math.inf, 0.0, largest)
    exponential = torch.where(visible, (scores - largest).exp(), 0.0)
    total = exponential.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - largest).exp()
    nothing = total == 0
    total = torch.where(nothing, 1.0, total)
    lse = torch.where(nothing, -math.inf, largest + total.log())
    return exponential / total, lse.squeeze(-1), visible


def append_to_cache(
    key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, lengths: Tensor
) -> Tensor:
    """``cache[b, :, lengths[b] + i] = new[b, :, i]`` of both, in place, where there is room."""
    room, new = key_cache.shape[2], key.shape[2]
    if room and new:
        # Of those that do not fit each writes again what the last that fits does.
        i = torch.arange(new, device=key.device)
        source = torch.minimum(i, room - 1 - lengths[:, None])
        at = (lengths[:, None] + i).clamp(0, room - 1)
        entry = torch.arange(len(lengths), device=key.device)[:, None]
        for cache, tensor in ((key_cache, key), (value_cache, value)):
            rows = tensor.to(cache.dtype)[entry, :, source.clamp(min=0)]
            fits = (source >= 0)[:, :, None, None]
            cache[entry, :, at] = torch.where(fits, rows, cache[entry, :, at])
    return (lengths + new).clamp(max=room)
