"""scaled_dot_product_attention, as torch has it, and when torch's own is the best there is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import note
from ._attention_by_torch import torch_serves
from ._dispatch import is_foreign
from .attention import attention_and_lse, autocast


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Attention, as :func:`torch.nn.functional.scaled_dot_product_attention`.

    .. math:: \mathrm{softmax}\Big(\frac{Q K^T}{\sqrt{D}} + M\Big) V

    in memory proportional to the lengths, not to their product, with any of the arguments.

    Args:
        query: ``[*, H, Lq, D]``; fp32, fp64, fp16 or bf16; any strides. Or query, key and value are
            jagged nested tensors ``[B, H, L*, D]``, sequences of different lengths.
        key: ``[*, H, Lk, D]``; with ``enable_gqa`` its heads may be fewer, a divisor of H.
        value: ``[*, H, Lk, Dv]``.
        attn_mask: broadcast to ``[*, H, Lq, Lk]``. Boolean: True takes part. Floating: added to the
            scores; -Inf takes no part; its gradient is summed over the dimensions it is broadcast
            along.
        dropout_p: probability of dropping a weight; applied whether or not anything trains, as in
            torch. The mask is a function of a seed from torch's generator and the position.
        is_causal: query i sees the keys up to i. Together with ``attn_mask`` both hold (torch
            refuses that on some devices and on others, too, applies both).
        scale: of the scores; None means :math:`1 / \sqrt{D}`.
        enable_gqa: as above; query head h uses key head ``h // (H / Hk)``.

    Returns:
        ``[*, H, Lq, Dv]`` in the query's dtype. A query that sees nothing gives 0, and passes on no
        gradient; what a query does not see, NaN included, has no part in its result.

    Raises:
        ValueError: ``dropout_p`` is outside [0, 1].
        RuntimeError: shapes, dtypes or devices do not fit each other.
        NotImplementedError: the inputs are not floating point.

    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1; Dao et al.,
    "FlashAttention", 2022.
    """
    name = "scaled_dot_product_attention"
    if attn_mask is None and _are_jagged(query, key, value) and key.shape[2] == value.shape[2]:
        return _jagged(name, query, key, value, dropout_p, is_causal, scale, enable_gqa)
    if is_foreign(query, key, value, attn_mask):
        note(name, "torch", "a tensor subclass, layout or trace that torch must handle")
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    if reason := torch_serves(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        note(name, "torch", reason)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    matrices = query.dim() == key.dim() == value.dim() == 2
    query, key, value = _broadcast(query, key, value, grouped=enable_gqa)
    output = attention_and_lse(
        name,
        query,
        key,
        value,
        bias=None if boolean else attn_mask,
        mask=attn_mask if boolean else None,
        mask_name="attn_mask",
        causal=is_causal,
        dropout_p=dropout_p,
        scale=scale,
        grouped=enable_gqa,
    )[0]
    return output[0] if matrices else output


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, *, grouped: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """With the same leading dimensions, as torch's matrix products make them the same.

    What does not broadcast is left as it is, for the validation to name.
    """
    if key.shape[:-2] == query.shape[:-2] == value.shape[:-2] and query.dim() > 2:
        return query, key, value
    tensors = tuple(t[None] if t.dim() == 2 else t for t in (query, key, value))
    kept = 3 if grouped else 2  # with groups the numbers of heads differ
    if min(t.dim() for t in tensors) < kept:
        return query, key, value
    try:
        leading = torch.broadcast_shapes(*(t.shape[:-kept] for t in tensors))
    except RuntimeError:
        return query, key, value
    query, key, value = (t.expand(*leading, *t.shape[-kept:]) for t in tensors)
    return query, key, value


# --- jagged nested tensors -----------------------------------------------------------------------


def _are_jagged(*tensors: Tensor) -> bool:
    """Whether all are nested ``[B, H, L*, D]``, as ``[B, L*, H, D]`` transposed, without gaps."""
    return not torch.compiler.is_compiling() and all(
        type(t) is not Tensor
        and t.is_nested
        and t.layout is torch.jagged
        and t.dim() == 4
        and t.transpose(1, 2).is_contiguous()
        and t._lengths is None  # type: ignore[attr-defined]
        for t in tensors
    )


def _jagged(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> Tensor:
    """As packed sequences, which is how they lie in memory."""
    queries, keys = (t.offsets() for t in (query, key))  # type: ignore[attr-defined]
    query, key, value = (t.transpose(1, 2).values() for t in (query, key, value))
    query, key, value, _ = autocast(query, key, value, None)
    output, _ = attention_and_lse(
        name,
        query,
        key,
        value,
        cu_seqlens_q=queries,
        cu_seqlens_k=keys,
        causal=causal,
        dropout_p=dropout_p,
        scale=scale,
        grouped=grouped,
    )
    jagged: Tensor = torch.nested.nested_tensor_from_jagged(output, queries)
    return jagged.transpose(1, 2)
