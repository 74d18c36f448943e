r"""Flash attention, backward: the scores are drawn again, tile by tile, from inputs and lse.

With the forward's ``p_ij = e^(s_ij - lse_i)``, and ``dp_ij = dout_i . v_j``::

    delta_i = sum_j p_ij dropout(dp_ij) = dout_i . out_i      (minus dlse_i, if that has a gradient)
    ds_ij   = p_ij (dropout(dp_ij) - delta_i)                  the gradient of the bias
    dv_j    = sum_i dropout(p_ij) dout_i
    dk_j    = scale * sum_i ds_ij cap'_ij q_i
    dq_i    = scale * sum_j ds_ij cap'_ij k_j

Sums over queries and sums over keys want different owners: dk and dv a program for every tile of
keys, dq one for every tile of queries. Here they are two kernels, and nobody adds to memory that
another adds to: no atomics, so two runs are equal to the bit. The price is that scores and dp are
multiplied twice, 7 products where 5 would do; FlashAttention-2 and -3 pay for atomics instead (and
for an fp32 buffer that dq is added up in and converted from). The kernels::

    attention_delta_kernel    delta, one pass over out and dout
    attention_kv_kernel       dk, dv: keys and values stay, queries and gradients come by
    attention_q_kernel        dq: the other way round, as in the forward
    attention_bias_kernel     db, if wanted: a tile of the bias stays, what it was broadcast over
                              comes by, so that nothing of the scores' size is written but db itself

In the kv kernel a tile of scores is transposed, ``[keys, queries]``: so p and ds, as they come out
of one product, are the left operands of the next, and stay in registers.

Arithmetic for bf16 at head_dim 128 on an H200: 14 * L^2 * D flops a head, of which 10 count as
useful. Were all of it to run at the forward's 0.48 of the peak, that were 0.34 of it by the usual
count; of stock Triton on Hopper 0.27 is published, at head_dim 64. No GPU has timed these yet.

NaN is dealt with as in the forward: what has one runs again carefully.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention_bias
from .attention_launch import (
    Launch,
    Statistics,
    block_of,
    careful_launch,
    fitted,
    has_planes,
    hides,
    planes_of,
    row_vector,
    strides_of,
    tile_kernel,
)
from .attention_tiles import (
    any_nan,
    careful_dot,
    described,
    key_range,
    load_rows,
    load_statistics,
    load_tile,
    sequence_of,
    store_rows,
    tile_gradients,
    tile_of_packed,
    tile_weights,
)
from .common import (
    INTERPRETED,
    ceil_div,
    device_of,
    dot,
    kernel,
    on_device,
    rounded,
    row_key,
)

_LOG2_E = tl.constexpr(1.4426950408889634)

# --- launch configurations -----------------------------------------------------------------------


@cache
def kv_launch(
    block_d: int, block_dv: int, element_size: int, rich: bool, architecture: int
) -> Launch:
    """The tile of the kv kernel: block_n keys stay, block_m queries come by.

    ``rich``: there is a bias or a mask to load, a third loop for a window's end, or a packed
    sequence to be found.
    """
    if INTERPRETED:
        return Launch(16, 32, 4, 1)
    width = max(block_d, block_dv)
    if element_size == 4:
        launch = Launch(32, 32, 8, 1) if width <= 128 else Launch(16, 32, 8, 1)
    elif width <= 64:
        # A warp group has 64 keys: scores and dp of 64 x 64 (32 registers a thread each), dk and dv
        # of 64 x 64 (32 each). Where more is to be held, or elsewhere than on Hopper, half the
        # scores.
        if architecture == 90:
            launch = Launch(32 if rich else 64, 128, 8, 3)
        else:
            launch = Launch(32, 32, 8, 2) if rich else Launch(32, 128, 8, 3)
    elif width <= 128:
        # dk and dv take 64 registers each; 64 queries at a time would spill in the loop.
        if architecture == 90:
            launch = Launch(32, 32, 8, 2) if rich else Launch(32, 128, 8, 3)
        else:
            launch = Launch(32, 64 if architecture < 90 else 32, 8, 2)
    else:
        # 64 registers for each of dk and dv at 64 keys; only Hopper's products fit beside them.
        launch = Launch(16, 64, 8, 2) if architecture == 90 else Launch(32, 32, 8, 2)
    return fitted(
        launch,
        launch.block_n * (block_d + block_dv) * element_size,
        launch.block_m * (block_d + block_dv) * element_size,
        architecture,
    )


@cache
def q_launch(
    block_d: int, block_dv: int, element_size: int, planes: bool, architecture: int
) -> Launch:
    """The tile of the q kernel: block_m queries stay, block_n keys come by."""
    if INTERPRETED:
        return Launch(32, 16, 4, 1)
    width = max(block_d, block_dv)
    if element_size == 4:
        launch = Launch(32, 32, 8, 1) if width <= 128 else Launch(32, 16, 8, 1)
    elif width <= 128:
        launch = Launch(128, 64 if architecture >= 90 and not planes else 32, 8, 3)
    else:
        launch = Launch(64, 16, 8, 2)
    return fitted(
        launch,
        launch.block_m * (block_d + block_dv) * element_size,
        launch.block_n * (block_d + block_dv) * element_size,
        architecture,
    )


# --- kernels -------------------------------------------------------------------------------------


@kernel
def attention_delta_kernel(
    grad_output, output, grad_lse, lse, base, delta,
    g_b, g_h, g_m, o_b, o_h, o_m, l_b, l_h, l_m, heads, queries,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_M queries of one head ``base``, lse in base 2, and ``delta``, ``sum(dout * out) -
    dlse``; where they see nothing +Inf, so that every p is 0, and 0.
    """
    both = tl.program_id(1).to(tl.int64)
    b = both // heads
    h = both % heads
    i0 = tl.program_id(0) * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    g = load_rows(
        grad_output + b * g_b + h * g_h, i0, g_m, queries, BLOCK_M, DV, BLOCK_DV, VECTOR, True
    )
    o = load_rows(output + b * o_b + h * o_h, i0, o_m, queries, BLOCK_M, DV, BLOCK_DV, VECTOR, True)
    total = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    exists = i < queries
    if grad_lse is not None:
        at = b * l_b + h * l_h + i.to(tl.int64) * l_m
        total -= tl.load(grad_lse + at, mask=exists, other=0.0).to(tl.float32)
    row = both * queries + i
    l = tl.load(lse + row, mask=exists, other=0.0)
    sees = l != -float("inf")
    tl.store(base + row, tl.where(sees, l * _LOG2_E, float("inf")), mask=exists)
    tl.store(delta + row, tl.where(sees, total, 0.0), mask=exists)


@triton.jit
def _kv_tiles(
    dk, dv, seen_k, seen_v, k, v, query, grad_output, query_tiles, grad_tiles, lse, delta, row,
    start, stop, j0, queries, keys, shift, q_m, g_m, scale, softcap, left, right,
    bias, bias_m, bias_n, mask, mask_m, mask_n, slope, seed, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, VECTOR: tl.constexpr, SIMPLE: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PLANE: tl.constexpr, TF32: tl.constexpr,
    BAND: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The queries of ``[start, stop)`` of one head, tile by tile, into dk and dv."""
    N: tl.constexpr = k.shape[0]
    for m in range(start, stop, BLOCK_M):
        i = m + tl.arange(0, BLOCK_M)
        q = load_tile(query_tiles, query, m, q_m, queries, BLOCK_M, D, BLOCK_D, VECTOR, True)
        l, d = load_statistics(lse, delta, i, queries)
        first = None
        second = None
        if seed is not None:
            first, second = row_key(tl.load(seed), row + i)
            first = first[None, :]
            second = second[None, :]
        products = dot(k, tl.trans(q), tl.zeros([N, BLOCK_M], tl.float32), TF32)
        p, keep, t, visible = tile_weights(
            products, l[None, :], first, second,
            m, j0, queries, keys, shift, scale, softcap, left, right,
            bias, bias_m, bias_n, mask, mask_m, mask_n, slope, seed, threshold, keep_scale,
            SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, BAND, True,
        )  # fmt: skip
        # dv at once: so the scores' registers are free before dp needs as many.
        dropped = p
        if seed is not None:
            dropped = p * keep
        dropped = rounded(dropped, grad_output.dtype.element_ty)
        g = load_tile(grad_tiles, grad_output, m, g_m, queries, BLOCK_M, DV, BLOCK_DV, VECTOR, True)
        if CAREFUL:
            dv, seen_v = careful_dot(dropped, g, visible, dv, seen_v, TF32)
        else:
            dv = dot(dropped, g, dv, TF32)
        grads = dot(v, tl.trans(g), tl.zeros([N, BLOCK_M], tl.float32), TF32)
        _ds, raw = tile_gradients(p, keep, t, visible, grads, d[None, :], seed, SOFTCAP, CAREFUL)
        raw = rounded(raw, query.dtype.element_ty)
        if CAREFUL:
            dk, seen_k = careful_dot(raw, q, visible, dk, seen_k, TF32)
        else:
            dk = dot(raw, q, dk, TF32)
    return dk, dv, seen_k, seen_v


@kernel
def attention_kv_kernel(
    query, key, value, grad_output, lse, delta, grad_key, grad_value,
    bias, mask, slopes, cu_q, cu_k, key_lengths, seed,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_m, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    bias_b, bias_h, bias_m, bias_n, mask_b, mask_h, mask_m, mask_n, slopes_b,
    heads, group, total_q, total_k, sequences, tiles,
    scale, softcap, left, right, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_B: tl.constexpr, VECTOR: tl.constexpr,
    SIMPLE: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PLANE: tl.constexpr, TF32: tl.constexpr, CAREFUL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head, from all queries that see them."""
    key_heads = heads // group
    program = tl.program_id(0)
    # The first keys, which with causal attention the most queries see, begin first.
    key_head = program % key_heads
    if cu_q is not None:
        b, tile = tile_of_packed(program // key_heads, cu_k, sequences, total_k, BLOCK_N, BLOCK_B)
        if b >= sequences:
            return
    else:
        b = program // key_heads % sequences
        tile = program // (key_heads * sequences)
    first_q, first_k, queries, keys, shift = sequence_of(
        b, cu_q, cu_k, key_lengths, total_q, total_k, BOTTOM_RIGHT
    )
    zero = tl.full([], 0, tl.int64)
    storage_b = zero + b
    if cu_q is not None:
        storage_b = zero
    head64 = zero + key_head
    key += storage_b * k_b + head64 * k_h + (zero + first_k) * k_n
    value += storage_b * v_b + head64 * v_h + (zero + first_k) * v_n
    grad_key += storage_b * dk_b + head64 * dk_h + (zero + first_k) * dk_n
    grad_value += storage_b * dv_b + head64 * dv_h + (zero + first_k) * dv_n

    j0 = tile * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    stored = keys
    if key_lengths is not None:
        stored = total_k  # what is past the length has no gradient, and that is written
    if CAREFUL:
        bad = any_nan(load_rows(grad_key, j0, dk_n, stored, BLOCK_N, D, BLOCK_D, VECTOR, True))
        if not bad:
            bad = any_nan(
                load_rows(grad_value, j0, dv_n, stored, BLOCK_N, DV, BLOCK_DV, VECTOR, True)
            )
        if not bad:
            return
    k = load_rows(key, j0, k_n, keys, BLOCK_N, D, BLOCK_D, VECTOR, True)
    v = load_rows(value, j0, v_n, keys, BLOCK_N, DV, BLOCK_DV, VECTOR, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    seen_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    seen_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # Which queries see which keys is the forward's question with the roles exchanged.
    last = tl.minimum(j0 + BLOCK_N, keys) - 1
    start, full_start, full_stop, stop = key_range(
        j0, last, queries, -shift, right, left, BLOCK_M, RIGHT, LEFT
    )
    if not LEFT:
        full_stop = stop
    if j0 >= keys:
        stop = start
        full_start = start
        full_stop = start
    for g in range(0, group):
        h = head64 * group + g
        q_head = query + storage_b * q_b + h * q_h + (zero + first_q) * q_m
        g_head = grad_output + storage_b * g_b + h * g_h + (zero + first_q) * g_m
        query_tiles = None
        grad_tiles = None
        if DESCRIPTORS:
            query_tiles = described(q_head, queries, q_m, BLOCK_M, D, BLOCK_D)
            grad_tiles = described(g_head, queries, g_m, BLOCK_M, DV, BLOCK_DV)
        row = (storage_b * heads + h) * total_q + first_q
        bias_head = bias
        mask_head = mask
        slope = None
        if bias is not None:
            bias_head = bias + storage_b * bias_b + h * bias_h
        if mask is not None:
            mask_head = mask + storage_b * mask_b + h * mask_h
        if slopes is not None:
            slope = tl.load(slopes + b * slopes_b + h).to(tl.float32)
        if CAREFUL:
            dk, dv, seen_k, seen_v = _kv_tiles(
                dk, dv, seen_k, seen_v, k, v, q_head, g_head, query_tiles, grad_tiles,
                lse + row, delta + row, row, start, stop, j0, queries, keys, shift, q_m, g_m,
                scale, softcap, left, right,
                bias_head, bias_m, bias_n, mask_head, mask_m, mask_n, slope,
                seed, threshold, keep_scale, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, VECTOR,
                SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, TF32, True, True,
            )  # fmt: skip
        if RIGHT and not CAREFUL:
            dk, dv, _, _ = _kv_tiles(
                dk, dv, dk, dv, k, v, q_head, g_head, query_tiles, grad_tiles,
                lse + row, delta + row, row, start, full_start, j0, queries, keys, shift, q_m, g_m,
                scale, softcap, left, right,
                bias_head, bias_m, bias_n, mask_head, mask_m, mask_n, slope,
                seed, threshold, keep_scale, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, VECTOR,
                SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, TF32, True, False,
            )  # fmt: skip
        # Queries past the end are read as 0, with base +Inf: nobody has to ask for them.
        if not CAREFUL:
            dk, dv, _, _ = _kv_tiles(
                dk, dv, dk, dv, k, v, q_head, g_head, query_tiles, grad_tiles,
                lse + row, delta + row, row, full_start, full_stop,
                j0, queries, keys, shift, q_m, g_m, scale, softcap, left, right,
                bias_head, bias_m, bias_n, mask_head, mask_m, mask_n, slope,
                seed, threshold, keep_scale, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, VECTOR,
                SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, TF32, False, False,
            )  # fmt: skip
        if LEFT and not CAREFUL:
            dk, dv, _, _ = _kv_tiles(
                dk, dv, dk, dv, k, v, q_head, g_head, query_tiles, grad_tiles,
                lse + row, delta + row, row, full_stop, stop, j0, queries, keys, shift, q_m, g_m,
                scale, softcap, left, right,
                bias_head, bias_m, bias_n, mask_head, mask_m, mask_n, slope,
                seed, threshold, keep_scale, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, VECTOR,
                SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, TF32, True, False,
            )  # fmt: skip
    if CAREFUL:
        dk = tl.where(seen_k > 0.0, float("nan"), dk)
        dv = tl.where(seen_v > 0.0, float("nan"), dv)
    if key_lengths is not None:
        dk = tl.where((j < keys)[:, None], dk, 0.0)
        dv = tl.where((j < keys)[:, None], dv, 0.0)
    store_rows(grad_key, j0, dk_n, stored, dk * scale, D, BLOCK_D, VECTOR)
    store_rows(grad_value, j0, dv_n, stored, dv, DV, BLOCK_DV, VECTOR)


@triton.jit
def _q_tiles(
    dq, seen, q, g, l, d, key, value, key_tiles, value_tiles, start, stop,
    i0, queries, keys, shift, k_n, v_n,
    scale, softcap, left, right, bias, bias_m, bias_n, mask, mask_m, mask_n, slope,
    seed, first, second, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, VECTOR: tl.constexpr, SIMPLE: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PLANE: tl.constexpr, TF32: tl.constexpr,
    BAND: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The keys of ``[start, stop)``, tile by tile, into dq."""
    M: tl.constexpr = q.shape[0]
    for n in range(start, stop, BLOCK_N):
        k = load_tile(key_tiles, key, n, k_n, keys, BLOCK_N, D, BLOCK_D, VECTOR, BAND)
        v = load_tile(value_tiles, value, n, v_n, keys, BLOCK_N, DV, BLOCK_DV, VECTOR, BAND)
        products = dot(q, tl.trans(k), tl.zeros([M, BLOCK_N], tl.float32), TF32)
        p, keep, t, visible = tile_weights(
            products, l[:, None], first, second,
            i0, n, queries, keys, shift, scale, softcap, left, right,
            bias, bias_m, bias_n, mask, mask_m, mask_n, slope, seed, threshold, keep_scale,
            SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, BAND, False,
        )  # fmt: skip
        grads = dot(g, tl.trans(v), tl.zeros([M, BLOCK_N], tl.float32), TF32)
        _ds, raw = tile_gradients(p, keep, t, visible, grads, d[:, None], seed, SOFTCAP, CAREFUL)
        raw = rounded(raw, key.dtype.element_ty)
        if CAREFUL:
            dq, seen = careful_dot(raw, k, visible, dq, seen, TF32)
        else:
            dq = dot(raw, k, dq, TF32)
    return dq, seen


@kernel
def attention_q_kernel(
    query, key, value, grad_output, lse, delta, grad_query,
    bias, mask, slopes, cu_q, cu_k, key_lengths, seed,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_m, dq_b, dq_h, dq_m,
    bias_b, bias_h, bias_m, bias_n, mask_b, mask_h, mask_m, mask_n, slopes_b,
    heads, group, total_q, total_k, sequences, tiles,
    scale, softcap, left, right, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_B: tl.constexpr, VECTOR: tl.constexpr,
    SIMPLE: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PLANE: tl.constexpr, TF32: tl.constexpr, CAREFUL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head, from all keys they see."""
    program = tl.program_id(0)
    h = program % heads
    if cu_q is not None:
        b, tile = tile_of_packed(program // heads, cu_q, sequences, total_q, BLOCK_M, BLOCK_B)
        if b >= sequences:
            return
    else:
        b = program // heads % sequences
        tile = tiles - 1 - program // (heads * sequences)
    first_q, first_k, queries, keys, shift = sequence_of(
        b, cu_q, cu_k, key_lengths, total_q, total_k, BOTTOM_RIGHT
    )
    zero = tl.full([], 0, tl.int64)
    storage_b = zero + b
    if cu_q is not None:
        storage_b = zero
    h64 = zero + h
    key_head = h64 // group
    query += storage_b * q_b + h64 * q_h + (zero + first_q) * q_m
    grad_query += storage_b * dq_b + h64 * dq_h + (zero + first_q) * dq_m
    grad_output += storage_b * g_b + h64 * g_h + (zero + first_q) * g_m
    key += storage_b * k_b + key_head * k_h + (zero + first_k) * k_n
    value += storage_b * v_b + key_head * v_h + (zero + first_k) * v_n
    row = (storage_b * heads + h64) * total_q + first_q
    if bias is not None:
        bias += storage_b * bias_b + h64 * bias_h
    if mask is not None:
        mask += storage_b * mask_b + h64 * mask_h
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + b * slopes_b + h).to(tl.float32)

    i0 = tile * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    if CAREFUL:
        if not any_nan(load_rows(grad_query, i0, dq_m, queries, BLOCK_M, D, BLOCK_D, VECTOR, True)):
            return
    query_tiles = None
    grad_tiles = None
    key_tiles = None
    value_tiles = None
    if DESCRIPTORS:
        query_tiles = described(query, queries, q_m, BLOCK_M, D, BLOCK_D)
        grad_tiles = described(grad_output, queries, g_m, BLOCK_M, DV, BLOCK_DV)
        key_tiles = described(key, keys, k_n, BLOCK_N, D, BLOCK_D)
        value_tiles = described(value, keys, v_n, BLOCK_N, DV, BLOCK_DV)
    q = load_tile(query_tiles, query, i0, q_m, queries, BLOCK_M, D, BLOCK_D, VECTOR, True)
    g = load_tile(grad_tiles, grad_output, i0, g_m, queries, BLOCK_M, DV, BLOCK_DV, VECTOR, True)
    l, d = load_statistics(lse + row, delta + row, i, queries)
    first = None
    second = None
    if seed is not None:
        first, second = row_key(tl.load(seed), row + i)
        first = first[:, None]
        second = second[:, None]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.minimum(i0 + BLOCK_M, queries) - 1
    start, full_start, full_stop, stop = key_range(
        i0, last, keys, shift, left, right, BLOCK_N, LEFT, RIGHT
    )
    if LEFT and not CAREFUL:
        dq, _ = _q_tiles(
            dq, dq, q, g, l, d, key, value, key_tiles, value_tiles, start, full_start,
            i0, queries, keys, shift, k_n, v_n,
            scale, softcap, left, right, bias, bias_m, bias_n, mask, mask_m, mask_n, slope,
            seed, first, second, threshold, keep_scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, VECTOR,
            SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, TF32, True, False,
        )  # fmt: skip
    if not CAREFUL:
        dq, _ = _q_tiles(
            dq, dq, q, g, l, d, key, value, key_tiles, value_tiles, full_start, full_stop,
            i0, queries, keys, shift, k_n, v_n,
            scale, softcap, left, right, bias, bias_m, bias_n, mask, mask_m, mask_n, slope,
            seed, first, second, threshold, keep_scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, VECTOR,
            SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, TF32, False, False,
        )  # fmt: skip
        start = full_stop
    dq, seen = _q_tiles(
        dq, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), q, g, l, d, key, value,
        key_tiles, value_tiles,
        start, stop, i0, queries, keys, shift, k_n, v_n,
        scale, softcap, left, right, bias, bias_m, bias_n, mask, mask_m, mask_n, slope,
        seed, first, second, threshold, keep_scale, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, VECTOR,
        SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, TF32, True, CAREFUL,
    )  # fmt: skip
    if CAREFUL:
        dq = tl.where(seen > 0.0, float("nan"), dq)
    store_rows(grad_query, i0, dq_m, queries, dq * scale, D, BLOCK_D, VECTOR)


# --- launching -----------------------------------------------------------------------------------


def statistics_of(a: Any) -> tuple[Tensor, Tensor]:
    """``base`` and ``delta`` of every query, ``[B, H, Lq]``, of :func:`attention_delta_kernel`."""
    batch, heads, queries, dv = a.output.shape
    base, delta = torch.empty_like(a.lse), torch.empty_like(a.lse)
    if not delta.numel():
        return base, delta
    block_dv = block_of(dv)
    block_m = max(1, 4096 // block_dv)  # 16 elements of both a thread
    with on_device(delta):
        attention_delta_kernel[(ceil_div(queries, block_m), batch * heads)](
            a.grad_output,
            a.output,
            a.grad_lse,
            a.lse,
            base,
            delta,
            *strides_of(a.grad_output, 3),
            *strides_of(a.output, 3),
            *strides_of(a.grad_lse, 3),
            heads,
            queries,
            DV=dv,
            BLOCK_DV=block_dv,
            BLOCK_M=block_m,
            VECTOR=row_vector(dv, a.grad_output, a.output),
            num_warps=8,
        )
    return base, delta


def backward(
    a: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, grad_bias: Tensor
) -> None:
    """Fills the gradients; that of the bias if it has elements, in the bias's shape.

    Args:
        a: the op's arguments (``fastseq/ops/attention.py``); rows of query, key, value,
            grad_output and output lie side by side.
    """
    statistics = statistics_of(a)
    if grad_key.numel() or grad_value.numel():
        _backward_kv(a, statistics, grad_key, grad_value)
    if grad_query.numel():
        _backward_q(a, statistics, grad_query)
    if grad_bias.numel():
        attention_bias.backward(a, statistics, grad_bias)


def _backward_kv(a: Any, statistics: Statistics, grad_key: Tensor, grad_value: Tensor) -> None:
    inputs, results = (a.query, a.key, a.value, a.grad_output), (grad_key, grad_value)
    tensors = (*inputs, *statistics, *results, *planes_of(a))
    run = tile_kernel(attention_kv_kernel, a, tensors, (*inputs, *results), of_keys=True)
    d, dv = a.query.shape[3], a.value.shape[3]
    rich = has_planes(a) or a.window_left >= 0 or a.cu_seqlens_k is not None
    architecture = device_of(a.query).architecture
    with on_device(a.query):
        run(kv_launch(block_of(d), block_of(dv), a.query.element_size(), rich, architecture))
        if hides(a):
            launch = careful_launch(max(d, dv))
            turned = replace(launch, block_m=launch.block_n, block_n=launch.block_m)
            run(turned, careful=True)


def _backward_q(a: Any, statistics: Statistics, grad_query: Tensor) -> None:
    inputs = (a.query, a.key, a.value, a.grad_output)
    tensors = (*inputs, *statistics, grad_query, *planes_of(a))
    run = tile_kernel(attention_q_kernel, a, tensors, (*inputs, grad_query))
    d, dv = a.query.shape[3], a.value.shape[3]
    planes, architecture = has_planes(a), device_of(a.query).architecture
    with on_device(a.query):
        run(q_launch(block_of(d), block_of(dv), a.query.element_size(), planes, architecture))
        if hides(a):
            run(careful_launch(max(d, dv)), careful=True)
