r"""Decoding: one or few queries against a long cache of keys and values, split over the keys.

A query has one row, and a program with one head's queries would leave most of the chip idle while
it reads a whole cache. So the cache is cut into chunks, a program for each chunk and key head, and
all query heads that share the key head (and all their queries) are rows of one tile: the cache is
read once whatever the group. Every program leaves an output and an lse of its own; the merge weighs
them by ``e^(lse_chunk - lse)``, as an online softmax would have::

    lse = log(e^sink + sum_chunks e^lse_chunk),    out = sum_chunks e^(lse_chunk - lse) out_chunk

Memory decides: a step for 32 query heads, 8 key heads and 32768 keys of 128 in bf16 reads 134 MB,
28 us at the datasheet's 4.8 TB/s of an H200 (31 at the 4.3 TB/s a copy attains); its 0.5 GFLOP are
nothing. A chunk of 512 keys is 256 KB, and 64 chunks of 8 key heads are 512 programs, 4 on every
SM, for a single sequence; what they leave, 4 rows of 128 in fp32, is 1/128 of what they read.

How a cache is cut depends on its length alone, not on the batch, so a row's bits do not either.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .attention_launch import (
    Launch,
    block_of,
    bounded,
    fitted,
    row_vector,
    strides_of,
    uses_tf32,
)
from .attention_tiles import (
    careful_dot,
    load_rows,
    sequence_of,
    tanh,
)
from .common import (
    INTERPRETED,
    ceil_div,
    device_of,
    dot,
    kernel,
    next_power_of_2,
    on_device,
    rounded,
)

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

#: Rows (queries times query heads of a group) up to which a call is one of decoding.
MAX_ROWS = 64
#: Keys from which a cache is worth cutting, and of a chunk at least.
CHUNK = 32 if INTERPRETED else 512
#: Chunks at most: the merge has all their lse in registers.
MAX_CHUNKS = 256


def serves(a: Any) -> bool:
    """Whether these kernels take the op's call: few queries, long cache, nothing by position."""
    rows = a.query.shape[2] * a.query.shape[1] // max(a.key.shape[1], 1)
    packed = a.cu_seqlens_q is not None or a.seed is not None
    planes = a.bias is not None or a.mask is not None
    return 0 < rows <= MAX_ROWS and a.key.shape[2] > CHUNK and not packed and not planes


def chunk_of(keys: int) -> int:
    """Keys of a chunk of a cache of so many."""
    return max(CHUNK, next_power_of_2(ceil_div(keys, MAX_CHUNKS)))


@kernel
def attention_chunk_kernel(
    query, key, value, partial, partial_lse, slopes, key_lengths,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, slopes_b,
    key_heads, group, total_q, total_k, chunk, chunks, scale, softcap, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VECTOR: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """All rows of one key head against one chunk of its keys."""
    number = tl.program_id(0)
    both = tl.program_id(1)
    b = both // key_heads
    key_head = both % key_heads
    _first_q, _first_k, queries, keys, shift = sequence_of(
        b, None, None, key_lengths, total_q, total_k, BOTTOM_RIGHT
    )
    zero = tl.full([], 0, tl.int64)
    key += (zero + b) * k_b + (zero + key_head) * k_h
    value += (zero + b) * v_b + (zero + key_head) * v_h

    r = tl.arange(0, BLOCK_R)
    rows = group * queries
    h = key_head * group + r // queries
    i = r % queries
    column = tl.arange(0, BLOCK_D)[None, :]
    at = (zero + b) * q_b + h[:, None].to(tl.int64) * q_h + i[:, None].to(tl.int64) * q_m
    q = tl.load(query + at + column, mask=(r < rows)[:, None] & (column < D), other=0.0)
    slope = tl.zeros([BLOCK_R], tl.float32)
    if slopes is not None:
        slope = tl.load(slopes + b * slopes_b + h, mask=r < rows, other=0.0).to(tl.float32)
        slope *= _LOG2_E

    # What no row sees is not read.
    start = number * chunk
    stop = tl.minimum(start + chunk, keys)
    if LEFT:
        start = tl.maximum(start, shift - left)
    if RIGHT:
        stop = tl.minimum(stop, queries + shift + right)
    m = tl.full([BLOCK_R], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    seen = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    for n in range(start, stop, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        k = load_rows(key, n, k_n, stop, BLOCK_N, D, BLOCK_D, VECTOR, True)
        v = load_rows(value, n, v_n, stop, BLOCK_N, DV, BLOCK_DV, VECTOR, True)
        products = dot(q.to(k.dtype), tl.trans(k), tl.zeros([BLOCK_R, BLOCK_N], tl.float32), TF32)
        if SOFTCAP:
            x = tanh(products * (scale / softcap)) * (softcap * _LOG2_E)
        else:
            x = products * (scale * _LOG2_E)
        relative = j[None, :] - i[:, None] - shift
        if slopes is not None:
            x -= slope[:, None] * tl.abs(relative).to(tl.float32)
        visible = tl.broadcast_to(j[None, :] < stop, x.shape)
        if LEFT:
            visible = visible & (relative >= -left)
        if RIGHT:
            visible = visible & (relative <= right)
        x = tl.where(visible, x, -float("inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(x - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, 1)
        m = m_new
        acc = acc * shrink[:, None]
        p = rounded(p, value.dtype.element_ty)
        if LEFT or RIGHT:
            # Rows do not see the same keys, and a NaN of one must not reach another. The products
            # are idle anyway.
            acc, seen = careful_dot(p, v, visible, acc, seen, TF32)
        else:
            acc = dot(p, v, acc, TF32)
    if LEFT or RIGHT:
        acc = tl.where(seen > 0.0, float("nan"), acc)
    nothing = l == 0.0
    total = tl.where(nothing, 1.0, l)
    row = (zero + both * chunks + number) * rows + r
    tl.store(partial_lse + row, tl.where(nothing, -float("inf"), m + tl.log2(total)), mask=r < rows)
    column = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(
        partial + row[:, None] * DV + column,
        acc / total[:, None],
        mask=(r < rows)[:, None] & (column < DV),
    )


@kernel
def attention_merge_kernel(
    partial, partial_lse, output, lse, sinks, o_b, o_h, o_m, heads, group, queries, chunks,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One query of one head: what its chunks left, put together."""
    i = tl.program_id(0)
    both = tl.program_id(1)
    b = both // heads
    h = both % heads
    zero = tl.full([], 0, tl.int64)
    rows = group * queries
    row = (zero + b) * (heads // group) + h // group
    c = tl.arange(0, BLOCK_C)
    at = (row * chunks + c) * rows + h % group * queries + i
    x = tl.load(partial_lse + at, mask=c < chunks, other=-float("inf"))
    m = tl.max(x, 0)
    sink = -float("inf")
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * _LOG2_E
        m = tl.maximum(m, sink)
    base = tl.where(m == -float("inf"), 0.0, m)
    weights = tl.exp2(x - base)
    total = tl.sum(weights, 0)
    if sinks is not None:
        total += tl.exp2(sink - base)
    column = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for number in range(0, chunks):
        here = (row * chunks + number) * rows + h % group * queries + i
        weight = tl.exp2(tl.load(partial_lse + here) - base)
        acc += weight * tl.load(partial + here * DV + column, mask=column < DV, other=0.0)
    nothing = total == 0.0
    safe = tl.where(nothing, 1.0, total)
    to = (zero + b) * o_b + (zero + h) * o_h + (zero + i) * o_m
    tl.store(output + to + column, rounded(acc / safe, output.dtype.element_ty), mask=column < DV)
    result = tl.where(nothing, -float("inf"), (base + tl.log2(safe)) * _LN_2)
    tl.store(lse + (zero + both) * queries + i, result)


def chunk_launch(block_r: int, block_d: int, block_dv: int, size: int, architecture: int) -> Launch:
    """The tile of the chunk kernel: block_m rows, block_n keys.

    64 keys of 128 in bf16 are 32 KB with their values; three such stages keep two programs of an SM
    at 128 KB under way, more than the 40 KB that latency times bandwidth asks of each.
    """
    if INTERPRETED:
        return Launch(block_r, 16, 4, 1)
    if size == 4:  # products by FMA hold their operands in registers
        launch = Launch(block_r, 32, 8, 3)
    else:
        launch = Launch(block_r, 64 if max(block_d, block_dv) <= 128 else 32, 4, 3)
    staged = launch.block_n * (block_d + block_dv) * size
    return fitted(
        launch, block_r * block_d * size, 2 * staged if size == 4 else staged, architecture
    )


def forward(a: Any, output: Tensor, lse: Tensor) -> None:
    """Fills ``output [B, H, Lq, Dv]`` and ``lse [B, H, Lq]``, as the forward kernel would.

    Args:
        a: the op's arguments (``fastseq/ops/attention.py``) that :func:`serves` takes.
    """
    query, key, value = a.query, a.key, a.value
    batch, heads, queries, d = query.shape
    key_heads, keys, dv = value.shape[1:]
    if not output.numel():
        return
    group = heads // key_heads
    chunk = chunk_of(keys)
    chunks = ceil_div(keys, chunk)
    rows = group * queries
    block_d, block_dv = block_of(d), block_of(dv)
    device = device_of(query)
    launch = chunk_launch(
        block_of(rows), block_d, block_dv, query.element_size(), device.architecture
    )
    partial = query.new_empty((batch * key_heads * chunks * rows, dv), dtype=torch.float32)
    partial_lse = query.new_empty(batch * key_heads * chunks * rows, dtype=torch.float32)
    with on_device(query):
        attention_chunk_kernel[(chunks, batch * key_heads)](
            *(query, key, value, partial, partial_lse, a.alibi_slopes, a.key_lengths),
            *strides_of(query, 3),
            *strides_of(key, 3),
            *strides_of(value, 3),
            *strides_of(a.alibi_slopes, 1),
            *(key_heads, group, queries, keys, chunk, chunks),
            *(a.scale, a.softcap, bounded(a.window_left), bounded(a.window_right)),
            D=d,
            DV=dv,
            BLOCK_R=launch.block_m,
            BLOCK_N=launch.block_n,
            BLOCK_D=block_d,
            BLOCK_DV=block_dv,
            VECTOR=row_vector(d | dv, key, value),
            SOFTCAP=bool(a.softcap),
            LEFT=a.window_left >= 0,
            RIGHT=a.window_right >= 0,
            BOTTOM_RIGHT=a.bottom_right,
            TF32=uses_tf32(query),
            **launch.options,
        )
        attention_merge_kernel[(queries, batch * heads)](
            *(partial, partial_lse, output, lse, a.sinks),
            *strides_of(output, 3),
            *(heads, group, queries, chunks),
            DV=dv,
            BLOCK_DV=block_dv,
            BLOCK_C=next_power_of_2(chunks),
            num_warps=1,
        )
