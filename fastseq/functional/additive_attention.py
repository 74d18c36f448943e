"""additive_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import current_backend, note
from ..ops.additive_attention import AdditiveAttentionFunction, forward_op
from ..reference import additive_attention as reference
from ._dispatch import FLOATING, is_foreign, is_transformed, records_gradient, under_autocast


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Additive (Bahdanau, MLP) attention without the ``[Lq, Lk, hidden]`` tensor.

    .. math::
        s_{ij} = \sum_h u_h \tanh(q_{ih} + k_{jh}), \qquad
        y_i = \sum_j \frac{\exp s_{ij}}{\sum_{j'} \exp s_{ij'}} v_j

    over the keys that take part. Memory is that of inputs and result and of the scores of a block
    of queries: linear in the lengths, forward and backward.

    Args:
        query: :math:`q = W_q x`, already projected, ``[B, Lq, H]``; fp32, fp64, fp16 or bf16.
        key: :math:`k = W_k z`, already projected, ``[B, Lk, H]``.
        value: :math:`v`, ``[B, Lk, Dv]``.
        score_weight: :math:`u`, ``[H]``, of any floating dtype.
        mask: boolean, broadcast to ``[B, Lq, Lk]``; True: the key takes part. A query without any
            key gives 0 and has no gradient. A key that no query takes (padding) may hold anything,
            NaN included.

    Returns:
        ``[B, Lq, Dv]`` in the query's dtype (autocast's where that is on), contiguous. Scores and
        softmax are fp32, or fp64 for fp64 input.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit each other; the mask is not boolean or
            does not broadcast.
        NotImplementedError: an input is not floating point.

    Source: Bahdanau, Cho & Bengio, "Neural Machine Translation by Jointly Learning to Align and
    Translate", 2015, appendix A.1.2.
    """
    name = "additive_attention"
    device = query.device.type
    if under_autocast(query) and query.dtype != torch.float64:
        half = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return additive_attention(
                query.to(half), key.to(half), value.to(half), score_weight.to(half), mask
            )
    _validate(name, query, key, value, score_weight, mask)
    if mask is not None:
        mask = mask[(None,) * (3 - mask.dim())]
    if is_foreign(query, key, value, score_weight, mask) or is_transformed():
        note(name, "reference", "a tensor subclass, a trace, torch.func or forward-mode AD")
        return reference.additive_attention(query, key, value, score_weight, mask)
    records = records_gradient(query, key, value, score_weight)
    if _torch_is_quicker(query, key, records):
        note(
            name, "torch", "so few queries or pairs that the call costs more than the kernel saves"
        )
        return _by_torch(query, key, value, score_weight, mask)
    if records:
        output: Tensor = AdditiveAttentionFunction.apply(  # type: ignore[no-untyped-call]
            query, key, value, score_weight, mask
        )
        return output
    return forward_op(query, key, value, score_weight, mask)  # type: ignore[no-any-return]


def _torch_is_quicker(query: Tensor, key: Tensor, records: bool) -> bool:
    """Whether torch is done before our kernel has brought the keys into the form it wants.

    Measured on one core of an AVX-512 EPYC in fp32: even at 2 queries forward and 3 or 4 where
    gradients are recorded, or at 20 and 100 thousand elements of the tensor that torch makes (which
    are no matter for memory).
    """
    if not query.is_cpu or current_backend() != "auto" or torch.compiler.is_compiling():
        return False
    queries = query.shape[1]
    elements = query.numel() * key.shape[1]
    return queries < 4 or elements < 100_000 if records else queries < 2 or elements < 20_000


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, mask: Tensor | None
) -> Tensor:
    if mask is not None or query.dtype != torch.float32:
        return reference.additive_attention(query, key, value, score_weight, mask)
    scores = torch.tanh(query[:, :, None] + key[:, None]) @ score_weight.to(query.dtype)
    return torch.softmax(scores, -1) @ value


def _validate(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_weight: Tensor,
    mask: Tensor | None,
) -> None:
    for role, tensor, form in (
        ("query", query, "[B, Lq, H]"),
        ("key", key, "[B, Lk, H]"),
        ("value", value, "[B, Lk, Dv]"),
        ("score_weight", score_weight, "[H]"),
    ):
        if tensor.dim() != form.count(",") + 1:
            raise RuntimeError(f"{name}: {role} must be {form}, got {list(tensor.shape)}")
        if tensor.dtype not in FLOATING:
            raise NotImplementedError(
                f"{name}: {role} must be fp32, fp64, fp16 or bf16, got {tensor.dtype}"
            )
        if tensor.dtype != query.dtype and role != "score_weight":
            raise RuntimeError(
                f"{name}: {role} must have the query's dtype {query.dtype}, got {tensor.dtype}"
            )
        if tensor.device != query.device:
            raise RuntimeError(
                f"{name}: {role} must be on the query's device {query.device}, got {tensor.device}"
            )
    (batch, queries, hidden), keys = query.shape, key.shape[1]
    for role, tensor, wanted in (
        ("key", key, (batch, keys, hidden)),
        ("value", value, (batch, keys, value.shape[2])),
        ("score_weight", score_weight, (hidden,)),
    ):
        if tensor.shape != wanted:
            raise RuntimeError(
                f"{name}: {role} must be {list(wanted)} beside a query {list(query.shape)} and a "
                f"key {list(key.shape)}, got {list(tensor.shape)}"
            )
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise RuntimeError(f"{name}: mask must be boolean (True takes part), got {mask.dtype}")
    if mask.device != query.device:
        raise RuntimeError(
            f"{name}: mask must be on the query's device {query.device}, got {mask.device}"
        )
    full = (batch, queries, keys)
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    if mask.dim() > 3 or any(size not in (1, whole) for size, whole in sizes):
        raise RuntimeError(
            f"{name}: mask must broadcast to [B, Lq, Lk] = {list(full)}, got {list(mask.shape)}"
        )
