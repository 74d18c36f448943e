"""When torch's own call of attention is the best there is: on the CPU, for plain shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import current_backend
from ..ops.attention_blockwise import may_hide
from ..ops.attention_flash import DECODE_ELEMENTS, DECODE_ROWS, has_better_products, is_quicker
from ._dispatch import FLOATING, is_transformed, records_gradient

#: Multiplications up to which torch's operations on all scores are quicker, without and with
#: gradients: than our kernels, and than blocks of the library's products. One core of an AVX-512
#: EPYC: the kernels 1.0 and 0.9 of torch at 0.4 million, 1.5 and 1.1 at 1.6; the blocks 0.9 at 8
#: million without and 1.0 to 1.2 at 130 with.
_FEW = (1 << 18, 1 << 20)
_FEW_FOR_BLOCKS = (1 << 24, 1 << 27)


def torch_serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    causal: bool,
    grouped: bool,
) -> str | None:
    """Why torch's own call is the best there is, or None: on the CPU where a call is so small that
    the way to a kernel is what it costs, and where the library's products beat ours."""
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
    flash = width == value_width
    flash = flash and query.stride(3) == 1 and key.stride(3) == 1 and value.stride(3) == 1
    if mask is not None:
        flash = flash and not mask.requires_grad and mask.dim() in (2, 4) and 0 not in mask.stride()
    multiplications = batch * heads * queries * keys * (width + value_width)
    blocks = has_better_products(query.dtype)
    if flash and is_quicker(query.dtype, multiplications, records=records):
        reason = "its flash kernel serves the call"
    elif not flash and multiplications < (_FEW_FOR_BLOCKS if blocks else _FEW)[records]:
        reason = "so small that all scores stay in the cache"
    else:
        return None
    if (mask is not None or causal) and may_hide(key, value):
        return None  # in torch's, NaN that is masked out comes through
    if mask is not None and may_hide(query):
        return None  # and that of a query that sees nothing
    return reason


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
