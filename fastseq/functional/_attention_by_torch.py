"""When torch's own call of attention is the best there is: on the CPU, for plain shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import current_backend
from ..ops.attention_blockwise import may_hide
from ..ops.attention_flash import DECODE_ELEMENTS, DECODE_ROWS
from ._dispatch import FLOATING, is_transformed, records_gradient

#: Scores up to which the CPU's caches hold all of them and torch's operations on the whole are the
#: quickest, without and with gradients. One core of an AVX-512 EPYC: 0.9 and 1.2 of torch at 64 and
#: 256 thousand without; 0.4 to 0.8 below a million with, 1.0 to 1.2 there.
_SMALL = (1 << 17, 1 << 20)


def torch_serves(
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
    if dropout_p or not query.is_cpu or current_backend() != "auto" or is_transformed():
        return None
    if torch.compiler.is_compiling() or (mask is not None and causal):
        return None
    if torch._C._len_torch_dispatch_stack():
        return None  # fake tensors have no numbers to look at
    if not _fits(query, key, value, mask, grouped):
        return None
    batch, heads, queries, width = query.shape
    _, key_heads, keys, value_width = value.shape
    records = records_gradient(query, key, value, mask)
    few = queries * heads // key_heads <= DECODE_ROWS and query.dtype != torch.float64
    if few and not records and batch * key_heads * keys * width >= DECODE_ELEMENTS:
        return None  # decoding: ours reads the cache at the memory's rate
    if (mask is not None or causal) and may_hide(key, value):
        return None  # in torch's, NaN that is masked out comes through
    if mask is not None and may_hide(query):
        return None  # and that of a query that sees nothing
    flash = width == value_width
    flash = flash and query.stride(3) == 1 and key.stride(3) == 1 and value.stride(3) == 1
    if mask is not None:
        flash = flash and not mask.requires_grad and mask.dim() in (2, 4) and 0 not in mask.stride()
    if flash:
        return "its flash kernel serves the call"
    if batch * heads * queries * keys < _SMALL[records]:
        return "so small that all scores stay in the cache"
    return None


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grouped: bool) -> bool:
    """Whether these are the plain shapes and dtypes, with nothing empty."""
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) == 4 or 0 in q or 0 in k or 0 in v:
        return False
    dtype = query.dtype
    if dtype not in FLOATING or key.dtype != dtype or value.dtype != dtype:
        return False
    if not (key.is_cpu and value.is_cpu) or k[:3] != v[:3] or q[0] != k[0] or q[3] != k[3]:
        return False
    if q[1] != k[1] and (not grouped or q[1] % k[1]):
        return False
    if mask is None:
        return True
    scores = (*q[:3], k[2])
    return (
        mask.dtype in (torch.bool, dtype)
        and mask.is_cpu
        and mask.dim() <= 4
        and all(
            size in (1, full)
            for size, full in zip(mask.shape, scores[4 - mask.dim() :], strict=True)
        )
    )
