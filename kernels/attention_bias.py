"""The gradient of an additive bias: the scores' gradients, summed over what it was broadcast along.

Every program has a tile of the bias and goes over the batches, heads, queries or keys that share
it, drawing their scores and gradients again: two products a tile, and nothing of the scores' size
is ever written but the gradient itself. A bias that is nowhere broadcast costs as much as dq; one
shared by a batch of B, written once, costs B times the products and 1 / B of the memory that
writing all and adding up would.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from .attention_launch import (
    Statistics,
    block_of,
    plane_strides_of,
    planes_of,
    row_vector,
    scalars_of,
    strides_of,
    terms_of,
)
from .attention_tiles import (
    load_rows,
    load_statistics,
    sequence_of,
    tile_gradients,
    tile_weights,
)
from .common import INTERPRETED, ceil_div, device_of, dot, kernel, on_device, row_key


@kernel
def attention_bias_kernel(
    query, key, value, grad_output, lse, delta, grad_bias,
    bias, mask, slopes, key_lengths, seed,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_m,
    bias_b, bias_h, bias_m, bias_n, mask_b, mask_h, mask_m, mask_n, slopes_b,
    db_b, db_h, db_m, db_n, batch, heads, group, total_q, total_k, bias_heads, tiles_m, tiles_n,
    scale, softcap, left, right, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VECTOR: tl.constexpr,
    SIMPLE: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PLANE: tl.constexpr, TF32: tl.constexpr,
    OVER_BATCH: tl.constexpr, OVER_HEADS: tl.constexpr, OVER_ROWS: tl.constexpr,
    OVER_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the bias's gradient, summed over what OVER_ says it was broadcast along."""
    program = tl.program_id(0)
    tile_n = program % tiles_n
    tile_m = program // tiles_n % tiles_m
    both = program // (tiles_n * tiles_m)
    bias_batch = both // bias_heads
    bias_head = both % bias_heads
    first_b = bias_batch
    last_b = bias_batch + 1
    first_h = bias_head
    last_h = bias_head + 1
    first_m = tile_m * BLOCK_M
    last_m = first_m + 1
    first_n = tile_n * BLOCK_N
    last_n = first_n + 1
    if OVER_BATCH:
        last_b = batch
    if OVER_HEADS:
        last_h = heads
    if OVER_ROWS:
        last_m = total_q
    if OVER_COLUMNS:
        last_n = total_k
    zero = tl.full([], 0, tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in range(first_b, last_b):
        _first_q, _first_k, queries, keys, shift = sequence_of(
            b, None, None, key_lengths, total_q, total_k, BOTTOM_RIGHT
        )
        for h in range(first_h, last_h):
            b64 = zero + b
            h64 = zero + h
            key_head = h64 // group
            row = (b64 * heads + h64) * total_q
            mask_head = mask
            if mask is not None:
                mask_head = mask + b64 * mask_b + h64 * mask_h
            bias_here = bias + b64 * bias_b + h64 * bias_h
            slope = None
            if slopes is not None:
                slope = tl.load(slopes + b * slopes_b + h).to(tl.float32)
            for m in range(first_m, last_m, BLOCK_M):
                i = m + tl.arange(0, BLOCK_M)
                q = load_rows(
                    query + b64 * q_b + h64 * q_h,
                    m,
                    q_m,
                    queries,
                    BLOCK_M,
                    D,
                    BLOCK_D,
                    VECTOR,
                    True,
                )
                g = load_rows(
                    grad_output + b64 * g_b + h64 * g_h,
                    m,
                    g_m,
                    queries,
                    BLOCK_M,
                    DV,
                    BLOCK_DV,
                    VECTOR,
                    True,
                )
                l, d = load_statistics(lse + row, delta + row, i, queries)
                first = None
                second = None
                if seed is not None:
                    first, second = row_key(tl.load(seed), row + i)
                    first = first[:, None]
                    second = second[:, None]
                for n in range(first_n, last_n, BLOCK_N):
                    j = n + tl.arange(0, BLOCK_N)
                    k = load_rows(
                        key + b64 * k_b + key_head * k_h,
                        n,
                        k_n,
                        keys,
                        BLOCK_N,
                        D,
                        BLOCK_D,
                        VECTOR,
                        True,
                    )
                    v = load_rows(
                        value + b64 * v_b + key_head * v_h,
                        n,
                        v_n,
                        keys,
                        BLOCK_N,
                        DV,
                        BLOCK_DV,
                        VECTOR,
                        True,
                    )
                    products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), TF32)
                    p, keep, t, visible = tile_weights(
                        products, l[:, None], first, second,
                        m, n, queries, keys, shift, scale, softcap, left, right,
                        bias_here, bias_m, bias_n, mask_head, mask_m, mask_n, slope,
                        seed, threshold, keep_scale,
                        SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, True, False,
                    )  # fmt: skip
                    grads = dot(g, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), TF32)
                    ds, _raw = tile_gradients(
                        p, keep, t, visible, grads, d[:, None], seed, SOFTCAP, True
                    )
                    acc += ds
    i = first_m + tl.arange(0, BLOCK_M)[:, None]
    j = first_n + tl.arange(0, BLOCK_N)[None, :]
    exists = (i < total_q) & (j < total_k)
    if OVER_ROWS:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], [BLOCK_M, BLOCK_N])
        exists = exists & (i == 0)
    if OVER_COLUMNS:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], [BLOCK_M, BLOCK_N])
        exists = exists & (j == 0)
    grad_bias += (zero + bias_batch) * db_b + (zero + bias_head) * db_h
    at = i.to(tl.int64) * db_m + j.to(tl.int64) * db_n
    tl.store(grad_bias + at, acc, mask=exists)


def backward(a: Any, statistics: Statistics, grad_bias: Tensor) -> None:
    """Fills the bias's gradient, ``[B or 1, H or 1, Lq or 1, Lk or 1]``.

    Args:
        a: the op's arguments (``fastseq/ops/attention.py``).
    """
    query, key, value, grad_output = a.query, a.key, a.value, a.grad_output
    batch, heads, queries, d = query.shape
    key_heads, keys, dv = value.shape[1:]
    # Four operands of 64 x 128 fit where products read them from shared memory, as Hopper's do.
    block = 64 if device_of(query).architecture >= 90 else 32
    if INTERPRETED or query.element_size() == 4:
        block = 16
    over = [one == 1 for one in grad_bias.shape]
    tiles_m = 1 if over[2] else ceil_div(queries, block)
    tiles_n = 1 if over[3] else ceil_div(keys, block)
    programs = grad_bias.shape[0] * grad_bias.shape[1] * tiles_m * tiles_n
    block_d, block_dv = block_of(d), block_of(dv)
    with on_device(query):
        attention_bias_kernel[(programs,)](
            *(query, key, value, grad_output, *statistics, grad_bias),
            *planes_of(a),
            *(a.key_lengths, a.seed),
            *strides_of(query, 3),
            *strides_of(key, 3),
            *strides_of(value, 3),
            *strides_of(grad_output, 3),
            *plane_strides_of(a),
            *strides_of(grad_bias, 4),
            *(batch, heads, heads // key_heads, queries, keys, grad_bias.shape[1]),
            *(tiles_m, tiles_n),
            *scalars_of(a),
            D=d,
            DV=dv,
            BLOCK_M=block,
            BLOCK_N=block,
            BLOCK_D=block_d,
            BLOCK_DV=block_dv,
            VECTOR=row_vector(d | dv, query, key, value, grad_output),
            OVER_BATCH=over[0],
            OVER_HEADS=over[1],
            OVER_ROWS=over[2],
            OVER_COLUMNS=over[3],
            num_warps=8,
            num_stages=1,
            **terms_of(a),
        )
