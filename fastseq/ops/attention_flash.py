"""torch's flash kernel for the CPU, below autograd: the calls it takes and what they then return.

Called here and not by ``F.scaled_dot_product_attention``, its lse is at hand, and its gradient can
be differentiated again, as all of ours can.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _extension
from .attention_blockwise import may_hide

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

#: Whether our kernels have vectors worth the name (elsewhere the library's products are quicker),
#: and whether the machine multiplies tiles of 16 bits, which torch's kernel does and ours do not.
_VECTORS = _extension.cpu_instruction_set() not in (None, "generic")
_TILES = torch.cpu._is_amx_tile_supported()
#: Multiplications up to which torch's call, which is one call, is quicker than ours, by bytes of an
#: element, without and with gradients. One core of an AVX-512 EPYC: 0.7 of torch at 2 million in
#: fp32, 1.0 at 16, both ways; in bf16 0.6 and 1.6 at half a million, 1.0 and 2.1 at 2.
_FEW = {4: (1 << 23, 1 << 23), 2: (1 << 21, 1 << 18)}


def has_better_products(dtype: torch.dtype) -> bool:
    """Whether torch's kernel is the quicker one on this machine whatever the size."""
    return dtype == torch.float64 or not _VECTORS or (_TILES and dtype.itemsize == 2)


def is_quicker(dtype: torch.dtype, multiplications: int, *, records: bool) -> bool:
    """Whether torch's public function is quicker than ours, where its kernel serves."""
    return has_better_products(dtype) or multiplications < _FEW[dtype.itemsize][records]


#: Elements of a key cache from which our decoding is ahead, its way through Python included.
DECODE_ELEMENTS = 1 << 17
#: Queries that share a key head, up to which our decoding kernel takes a call.
DECODE_ROWS = 16


def serves(a: Any) -> bool:
    """Whether the kernel takes a call of the forward op: plain or causal, on the CPU, of one
    head_dim, rows of elements side by side, and not for decoding from a long cache. Not fp64, where
    its gradients err a little more than the library's products do."""
    query, key, value = a.query, a.key, a.value
    if (
        not query.is_cpu
        or query.dtype == torch.float64
        or a.seed is not None
        or a.softcap
        or a.sinks is not None
    ):
        return False
    if a.bias is not None or a.mask is not None or a.alibi_slopes is not None:
        return False
    if a.cu_seqlens_q is not None or a.key_lengths is not None:
        return False
    if a.window_left >= 0 or a.window_right > 0 or key.shape != value.shape:
        return False
    _, heads, queries, width = query.shape
    _, key_heads, keys, _ = key.shape
    if a.bottom_right and a.window_right == 0 and queries != keys:
        return False
    if 0 in query.shape or 0 in key.shape:
        return False
    if query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
        return False
    few = queries * heads // key_heads <= DECODE_ROWS
    return not few or key_heads * keys * width * key.shape[0] < DECODE_ELEMENTS


def forward(a: Any) -> tuple[Tensor, Tensor] | None:
    """Output and lse of a call it serves; None where a NaN is in it, which may be from a value that
    was not seen: it multiplies those by 0."""
    causal = a.window_right == 0
    output, lse = _forward(a.query, a.key, a.value, 0.0, causal, scale=a.scale)
    return None if causal and may_hide(output) else (output, lse)


def backward(a: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of query, key and value; None where something that is not finite is at hand."""
    causal = a.window_right == 0
    if causal and may_hide(a.query, a.key, a.value, a.grad_output):
        return None
    made: tuple[Tensor, Tensor, Tensor] = _backward(
        *(a.grad_output, a.query, a.key, a.value, a.output, a.lse, 0.0, causal), scale=a.scale
    )
    return made
