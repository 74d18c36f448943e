r"""Flash attention, forward: attention in one pass over keys, without the matrix of scores.

For a query i, over the keys j that it sees::

    s_ij  = cap(scale * q_i . k_j) + bias_ij - slope * |j - i|
    lse_i = log(e^sink + sum_j e^s_ij)
    out_i = sum_j dropout(e^(s_ij - lse_i)) v_j

How it works. A program has BLOCK_M queries of one head and walks over the keys in tiles of BLOCK_N.
A softmax needs the largest score and the sum before it can weigh a value, and both are known only
at the end; so the program keeps, of every query, the largest score so far ``m``, the sum ``l`` and
the weighted sum of values ``acc``, all relative to ``m``. When a tile brings a larger score, what
has been summed is scaled down by ``e^(m_old - m_new)`` (the online softmax of Milakov & Gimelshein
2018). At the end ``out = acc / l``, and ``lse = m + log l`` is all that backward needs to know of
the softmax. Scores live in registers only: memory is O(L), and traffic falls from L^2 to
``L^2 * D / BLOCK_M``, which comes from L2.

Three things make it fast:

* Exponentials are of base 2: ``e^(scale * s - m) = 2^(scale * log2(e) * s - m')`` is one FFMA and
  one MUFU.EX2 an element, where e^x and a scaling would be three.
* Only tiles that a bound runs through ask which keys are seen. The loop is cut in three: the tiles
  the left end of the window crosses, those that all queries of the program see in full (no masks),
  and those that the causal diagonal or the end of the keys crosses. What nobody sees is skipped.
* Causal programs do not have the same work: the last queries see the most keys. They are started
  first, and short programs fill the gaps at the end. Heads are taken in sections whose keys and
  values fit into L2 together.

Arithmetic for bf16 at head_dim 128 on an H200 (989 TFLOP/s dense, 132 SMs, so 4096 flop a clock and
SM): a tile of 128 x 64 has 2 products of 2 * 128 * 64 * 128 flop, 1024 clocks of the tensor cores;
its 8192 exponentials take 512 clocks of the MUFU (16 a clock), its other fp32 operations, some 6 an
element, 400 more (128 a clock). What of those 900 is not hidden behind products is lost: without
two groups of warps that take turns explicitly, the best published for stock Triton is 0.48 of the
peak (460 to 490 TFLOP/s forward, on H100). That is what these configurations should come to; no GPU
has timed them yet.

NaN. What a query does not see must not reach it, but in a product 0 times NaN is NaN. Products stay
as they are; a program whose result has a NaN, and which hides anything, runs again carefully: what
is not finite is left out of the product, and NaN put where it was seen.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .attention_launch import (
    Launch,
    block_of,
    careful_launch,
    fitted,
    has_planes,
    hides,
    planes_of,
    tile_kernel,
)
from .attention_tiles import (
    any_nan,
    careful_dot,
    described,
    keep_factor,
    key_range,
    load_rows,
    load_tile,
    scores,
    sequence_of,
    store_rows,
    tile_of_packed,
)
from .common import INTERPRETED, device_of, dot, kernel, on_device, rounded, row_key

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

# --- launch configuration ------------------------------------------------------------------------


@cache
def forward_launch(
    block_d: int, block_dv: int, element_size: int, planes: bool, architecture: int
) -> Launch:
    """The tile of the forward kernel; ``planes``: there is a bias or a mask to load."""
    if INTERPRETED:  # small, so that a test has several
        return Launch(32, 16, 4, 1)
    width = max(block_d, block_dv)
    if element_size == 4:
        # Products by FMA (or TF32): a thread holds its share of both operands in registers.
        launch = (
            Launch(64, 32, 8, 2) if width <= 64 else Launch(32, 32 if width <= 128 else 16, 8, 2)
        )
    elif width <= 64:
        # Two warp groups of 64 x 128 scores (64 registers a thread) and 64 x 64 sums (32) share the
        # keys. Where a tile of a plane is loaded too, or elsewhere than on Hopper, half the scores.
        launch = Launch(128, 128 if architecture == 90 and not planes else 64, 8, 3)
    elif width <= 128:
        # 64 x 64 scores (32 registers) and 64 x 128 sums (64) a warp group. Shared memory: queries
        # 32 KB and 3 stages of keys and values, 96 KB.
        launch = Launch(128, 32 if architecture < 90 and planes else 64, 8, 3)
    else:
        # 64 x 256 sums are 128 registers a thread of a warp group already.
        launch = Launch(64, 32, 4 if architecture >= 90 else 8, 2)
    return fitted(
        launch,
        launch.block_m * block_d * element_size,
        launch.block_n * (block_d + block_dv) * element_size,
        architecture,
    )


#: Bytes of keys and values that are to stay in L2 while all queries of their heads come by: half of
#: an H200's 50 MB.
L2_SECTION = 24 << 20


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _forward_tiles(
    acc, m, l, seen, q, key, value, key_tiles, value_tiles, start, stop,
    i0, queries, keys, shift, k_n, v_n,
    scale, softcap, left, right, bias, bias_m, bias_n, mask, mask_m, mask_n, slope,
    seed, first, second, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, VECTOR: tl.constexpr, SIMPLE: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PLANE: tl.constexpr, TF32: tl.constexpr,
    BAND: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The keys of ``[start, stop)``, tile by tile, into ``acc``, ``m`` and ``l``."""
    factor = 1.0
    if SIMPLE:
        factor = scale * _LOG2_E
    for n in range(start, stop, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        k = load_tile(key_tiles, key, n, k_n, keys, BLOCK_N, D, BLOCK_D, VECTOR, BAND)
        x = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32), TF32)
        x, visible, _ = scores(
            x, i0, n, queries, keys, shift, scale, softcap, left, right,
            bias, bias_m, bias_n, mask, mask_m, mask_n, slope,
            SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, BAND,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(x, 1) * factor)
        # -Inf - -Inf would be NaN: where nothing is seen yet, 0 is subtracted.
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(x * factor - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, 1)
        m = m_new
        if seed is not None:  # the sum is of what there was before
            p *= keep_factor(first[:, None], second[:, None], j[None, :], threshold, keep_scale)
        acc = acc * shrink[:, None]
        v = load_tile(value_tiles, value, n, v_n, keys, BLOCK_N, DV, BLOCK_DV, VECTOR, BAND)
        p = rounded(p, value.dtype.element_ty)
        if CAREFUL:
            acc, seen = careful_dot(p, v, visible, acc, seen, TF32)
        else:
            acc = dot(p, v, acc, TF32)
    return acc, m, l, seen


@kernel
def attention_forward_kernel(
    query, key, value, output, lse, sinks,
    bias, mask, slopes, cu_q, cu_k, key_lengths, seed,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m,
    bias_b, bias_h, bias_m, bias_n, mask_b, mask_h, mask_m, mask_n, slopes_b,
    heads, group, total_q, total_k, sequences, tiles, section,
    scale, softcap, left, right, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_B: tl.constexpr, VECTOR: tl.constexpr,
    SIMPLE: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PLANE: tl.constexpr, TF32: tl.constexpr, CAREFUL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head against all keys they see.

    CAREFUL: only if there is a NaN in what has been written of them, and so that no NaN is in it
    but where it was seen.
    """
    # Which ones. Heads in sections, within them the last queries of all heads first.
    program = tl.program_id(0)
    if cu_q is not None:
        h = program % heads
        b, tile = tile_of_packed(program // heads, cu_q, sequences, total_q, BLOCK_M, BLOCK_B)
        if b >= sequences:
            return
    else:
        number = program // (section * tiles)
        within = program % (section * tiles)
        width = tl.minimum(section, sequences * heads - number * section)
        both = number * section + within % width
        tile = tiles - 1 - within // width
        b = both // heads
        h = both % heads
    first_q, first_k, queries, keys, shift = sequence_of(
        b, cu_q, cu_k, key_lengths, total_q, total_k, BOTTOM_RIGHT
    )
    storage_b = tl.full([], 0, tl.int64) + b
    if cu_q is not None:
        storage_b = tl.full([], 0, tl.int64)
    h64 = h.to(tl.int64)
    key_head = h64 // group
    first_q64 = tl.full([], 0, tl.int64) + first_q
    first_k64 = tl.full([], 0, tl.int64) + first_k
    query += storage_b * q_b + h64 * q_h + first_q64 * q_m
    key += storage_b * k_b + key_head * k_h + first_k64 * k_n
    value += storage_b * v_b + key_head * v_h + first_k64 * v_n
    output += storage_b * o_b + h64 * o_h + first_q64 * o_m
    row = (storage_b * heads + h64) * total_q + first_q64
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
        if not any_nan(load_rows(output, i0, o_m, queries, BLOCK_M, DV, BLOCK_DV, VECTOR, True)):
            return
    query_tiles = None
    key_tiles = None
    value_tiles = None
    if DESCRIPTORS:
        query_tiles = described(query, queries, q_m, BLOCK_M, D, BLOCK_D)
        key_tiles = described(key, keys, k_n, BLOCK_N, D, BLOCK_D)
        value_tiles = described(value, keys, v_n, BLOCK_N, DV, BLOCK_DV)
    q = load_tile(query_tiles, query, i0, q_m, queries, BLOCK_M, D, BLOCK_D, VECTOR, True)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # a key that has been seen already
        m = tl.full([BLOCK_M], 0.0, tl.float32) + tl.load(sinks + h).to(tl.float32) * _LOG2_E
        l = tl.where(m == -float("inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    first = None
    second = None
    if seed is not None:
        first, second = row_key(tl.load(seed), row + i)

    last = tl.minimum(i0 + BLOCK_M, queries) - 1
    start, full_start, full_stop, stop = key_range(
        i0, last, keys, shift, left, right, BLOCK_N, LEFT, RIGHT
    )
    if LEFT and not CAREFUL:
        acc, m, l, _ = _forward_tiles(
            acc, m, l, acc, q, key, value, key_tiles, value_tiles, start, full_start,
            i0, queries, keys, shift, k_n, v_n,
            scale, softcap, left, right, bias, bias_m, bias_n, mask, mask_m, mask_n, slope,
            seed, first, second, threshold, keep_scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, VECTOR, SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, TF32,
            True, False,
        )  # fmt: skip
    if not CAREFUL:
        acc, m, l, _ = _forward_tiles(
            acc, m, l, acc, q, key, value, key_tiles, value_tiles, full_start, full_stop,
            i0, queries, keys, shift, k_n, v_n,
            scale, softcap, left, right, bias, bias_m, bias_n, mask, mask_m, mask_n, slope,
            seed, first, second, threshold, keep_scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, VECTOR, SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, TF32,
            False, False,
        )  # fmt: skip
        start = full_stop
    acc, m, l, seen = _forward_tiles(
        acc, m, l, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), q, key, value, key_tiles, value_tiles,
        start, stop, i0, queries, keys, shift, k_n, v_n,
        scale, softcap, left, right, bias, bias_m, bias_n, mask, mask_m, mask_n, slope,
        seed, first, second, threshold, keep_scale,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, VECTOR, SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, TF32,
        True, CAREFUL,
    )  # fmt: skip

    if CAREFUL:
        acc = tl.where(seen > 0.0, float("nan"), acc)
    nothing = l == 0.0
    total = tl.where(nothing, 1.0, l)
    store_rows(output, i0, o_m, queries, acc / total[:, None], DV, BLOCK_DV, VECTOR)
    result = tl.where(nothing, -float("inf"), (m + tl.log2(total)) * _LN_2)
    tl.store(lse + row + i, result, mask=i < queries)


# --- launching -----------------------------------------------------------------------------------


def forward(a: Any, output: Tensor, lse: Tensor) -> None:
    """Fills ``output [B, H, Lq, Dv]`` and ``lse [B, H, Lq]``.

    Args:
        a: the op's arguments (``fastseq/ops/attention.py``); rows of query, key and value lie side
            by side.
    """
    query, key, value = a.query, a.key, a.value
    batch, heads, _, d = query.shape
    dv = value.shape[3]
    if not output.numel() and not lse.numel():
        return
    block_d, block_dv = block_of(d), block_of(dv)
    architecture = device_of(query).architecture
    launch = forward_launch(block_d, block_dv, query.element_size(), has_planes(a), architecture)
    per_head = max(1, key.shape[2] * (d + dv) * query.element_size())
    group = heads // max(key.shape[1], 1)
    section = min(batch * heads, max(1, L2_SECTION // per_head) * group)
    tensors = (query, key, value, output, lse, a.sinks, *planes_of(a))
    rows = (query, key, value, output)
    run = tile_kernel(attention_forward_kernel, a, tensors, rows, extra=(section,))
    with on_device(query):
        run(launch)
        if hides(a):
            run(careful_launch(max(d, dv)), careful=True)
