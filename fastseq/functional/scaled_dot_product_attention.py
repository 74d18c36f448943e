"""scaled_dot_product_attention, as torch has it, and when torch's own is the best there is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import current_backend, note
from ..ops.attention import DECODE_ROWS
from ..ops.attention_blockwise import all_finite
from ._dispatch import FLOATING, is_foreign, is_transformed, records_gradient
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
    if reason := _torch_serves(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
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


#: Elements of a key cache from which our decoding is ahead, its way through Python included.
_DECODE_ELEMENTS = 1 << 17
#: Scores up to which the CPU's caches hold all of them and torch's operations on the whole are the
#: quickest, without and with gradients. One core of an AVX-512 EPYC: 0.9 and 1.2 of torch at 64 and
#: 256 thousand without; 0.4 to 0.8 below a million with, 1.0 to 1.2 there.
_SMALL = (1 << 17, 1 << 20)


def _torch_serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    causal: bool,
    grouped: bool,
) -> str | None:
    """Why torch's own call is the best there is, or None.

    On the CPU its flash kernel runs at the rate of the GEMMs, forward and backward, where it runs.
    """
    if not query.is_cpu or current_backend() != "auto" or torch.compiler.is_compiling():
        return None
    if is_transformed() or dropout_p or (mask is not None and causal):
        return None
    if not _fits(query, key, value, mask, grouped):
        return None
    records = records_gradient(query, key, value, mask)
    few = query.shape[2] * query.shape[1] // key.shape[1] <= DECODE_ROWS
    if few and key.numel() >= _DECODE_ELEMENTS and query.dtype != torch.float64 and not records:
        return None  # decoding: ours reads the cache at the memory's rate
    if (mask is not None or causal) and not all_finite(key, value):
        return None  # in torch's, NaN that is masked out comes through
    flash = query.shape[-1] == value.shape[-1] and key.shape == value.shape
    flash = flash and all(t.stride(-1) == 1 for t in (query, key, value))
    if mask is not None:
        flash = flash and not mask.requires_grad and mask.dim() in (2, 4) and 0 not in mask.stride()
    if flash:
        return "its flash kernel serves the call"
    if query.numel() // query.shape[-1] * key.shape[2] < _SMALL[records]:
        return "so small that all scores stay in the cache"
    return None


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grouped: bool) -> bool:
    """Whether these are the plain shapes and dtypes, with nothing empty."""
    if not query.dim() == key.dim() == value.dim() == 4 or query.dtype not in FLOATING:
        return False
    if not query.dtype == key.dtype == value.dtype:
        return False
    if not all(t.numel() and t.is_cpu for t in (query, key, value)):
        return False
    same = key.shape[:3] == value.shape[:3] and query.shape[0] == key.shape[0]
    if not same or query.shape[3] != key.shape[3]:
        return False
    if query.shape[1] != key.shape[1] and (not grouped or query.shape[1] % key.shape[1]):
        return False
    if mask is None:
        return True
    scores = (*query.shape[:3], key.shape[2])
    return (
        mask.dtype in (torch.bool, query.dtype)
        and mask.is_cpu
        and mask.dim() <= 4
        and all(
            size in (1, full)
            for size, full in zip(mask.shape, scores[4 - mask.dim() :], strict=True)
        )
    )


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
