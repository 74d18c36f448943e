"""Appending to a key/value cache: the new rows of both go to their places in one launch.

Bound by the launch: a token of 8 key heads of 128 in bf16 is 4 KB. With torch's indexing it is two
writes and four more kernels for their positions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention_launch import block_of, row_vector, strides_of
from .common import aligned, ceil_div, kernel, on_device, rounded


@triton.jit
def _move(
    source, target, from_row, to_row, goes, D: tl.constexpr, BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = tl.max_constancy(goes[:, None] & (column < D), (1, VECTOR))
    x = tl.load(aligned(source, from_row, column, VECTOR), mask=mask, other=0.0)
    x = rounded(x.to(tl.float32), target.dtype.element_ty)
    tl.store(aligned(target, to_row, column, VECTOR), x, mask=mask)


@kernel
def append_to_cache_kernel(
    key_cache, value_cache, key, value, lengths, new_lengths,
    kc_b, kc_h, kc_n, vc_b, vc_h, vc_n, k_b, k_h, k_n, v_b, v_h, v_n,
    rows, heads, new, room,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of ``[B, heads, new]``; what is past the cache's room is left out."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    row = tl.where(exists, row, 0)
    b = row // (heads * new)
    h = row // new % heads
    i = row % new
    before = tl.load(lengths + b).to(tl.int64)
    at = before + i
    goes = exists & (at >= 0) & (at < room)
    at = tl.where(goes, at, 0)
    k_row = b * k_b + h * k_h + i * k_n
    v_row = b * v_b + h * v_h + i * v_n
    _move(key, key_cache, k_row, b * kc_b + h * kc_h + at * kc_n, goes, D, BLOCK_D, VECTOR)
    _move(value, value_cache, v_row, b * vc_b + h * vc_h + at * vc_n, goes, DV, BLOCK_DV, VECTOR)
    first = exists & (h == 0) & (i == 0)
    tl.store(new_lengths + b, tl.minimum(before + new, room), mask=first)


def append(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    new_lengths: Tensor,
) -> None:
    """Writes ``key [B, H, n, D]`` and ``value`` behind the lengths of ``[B, H, L, D]``, and theirs.

    Rows of all four lie side by side; none is empty.
    """
    batch, heads, new, d = key.shape
    dv = value.shape[3]
    block_d, block_dv = block_of(d), block_of(dv)
    rows = batch * heads * new
    block_m = max(1, 1024 // max(block_d, block_dv))  # 8 elements a thread
    tensors = (key_cache, value_cache, key, value)
    with on_device(key):
        append_to_cache_kernel[(ceil_div(rows, block_m),)](
            *tensors,
            lengths,
            new_lengths,
            *(stride for tensor in tensors for stride in strides_of(tensor, 3)),
            *(rows, heads, new, key_cache.shape[2]),
            D=d,
            DV=dv,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            BLOCK_DV=block_dv,
            VECTOR=row_vector(d | dv, *tensors),
            num_warps=4,
        )
