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

Arithmetic for bf16 at head_dim 128 on an H200 (989 TFLOP/s dense, 132 SMs): a tile of 128 x 64 has
2 * 2 * 128 * 64 * 128 = 4.2 MFLOP: 4096 clocks of an SM's tensor cores at 1024 flop a clock... per
product; its 8192 exponentials take 512 clocks of the MUFU (16 a clock), its other fp32 operations,
some 6 an element, 400 (128 a clock). Without explicit ping-pong of two warp groups the softmax is
hidden in part only: the best published for stock Triton is 0.48 of the peak (460 to 490 TFLOP/s,
``research`` figures of others, H100); that is what these configurations should reach, and no GPU
has timed them yet.

NaN. What a query does not see must not reach it, but in a product 0 times NaN is NaN. Products stay
as they are; a program whose result has a NaN, and which hides anything, runs again carefully: what
is not finite is left out of the product, and NaN put where it was seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    INTERPRETED,
    RowStrides,
    ceil_div,
    device_of,
    dot,
    kernel,
    next_power_of_2,
    on_device,
    random_bits,
    rounded,
    row_key,
    shared_memory_limit,
    vector_width,
)

_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(0.6931471805599453)

# --- launch configurations -----------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut up: a tile of queries by keys, and who works on it.

    It depends on head_dim, dtype and architecture alone, so a row's result does not depend on the
    batch it comes in. The figures are from the generated code (``tests/codegen``) and what others
    have measured on H100 with the same compiler, not yet from a clock.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """As Triton takes them."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def fitted(launch: Launch, resident: int, staged: int, architecture: int) -> Launch:
    """With as many stages as shared memory has room for, one at least.

    Args:
        resident: bytes a program keeps all the time.
        staged: bytes of a stage.
    """
    room = shared_memory_limit(architecture) - 2048 - resident  # 2 KB: reductions, barriers
    return replace(launch, num_stages=max(1, min(launch.num_stages, room // max(staged, 1))))


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


#: The tile of a careful run, which is never in a hurry and holds every sum twice.
CAREFUL_LAUNCH = Launch(32, 16, 4, 1) if INTERPRETED else Launch(64, 16, 8, 1)

#: Bytes of keys and values that are to stay in L2 while all queries of their heads come by: half of
#: an H200's 50 MB.
L2_SECTION = 24 << 20


# --- what forward and backward share -------------------------------------------------------------


@triton.jit
def _row_pointers(
    pointer, first, stride, N: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr
):
    """Pointers to rows ``[first, first + N)``, each vector of which begins on its own boundary.

    The first row is a 64-bit scalar, what is added to it 32 bits: half the registers, and all but
    the scalar is the same in every turn of a loop.
    """
    SIZE: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    BYTES: tl.constexpr = VECTOR * SIZE if VECTOR * SIZE < 16 else 16
    pointer += (tl.full([], 0, tl.int64) + first) * stride
    offsets = tl.arange(0, N)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    return tl.multiple_of(pointer + offsets, (SIZE, BYTES))


@triton.jit
def load_rows(
    pointer, first, stride, rows, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Rows ``[first, first + N)`` of D elements as a tile ``[N, BLOCK_D]``, 0 where there is none.

    CHECKED: rows past the end may be asked for.
    """
    pointers = _row_pointers(pointer, first, stride, N, BLOCK_D, VECTOR)
    if CHECKED or D < BLOCK_D:
        exists = tl.arange(0, BLOCK_D)[None, :] < D
        if CHECKED:
            exists = exists & (tl.arange(0, N)[:, None] < rows - first)
        exists = tl.broadcast_to(exists, pointers.shape)
        x = tl.load(pointers, mask=tl.max_constancy(exists, (1, VECTOR)), other=0.0)
    else:
        x = tl.load(pointers)
    if _INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(
    pointer, first, stride, rows, x, D: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr
):
    """A tile ``[N, BLOCK_D]`` into rows from ``first`` on, rounded."""
    N: tl.constexpr = x.shape[0]
    pointers = _row_pointers(pointer, first, stride, N, BLOCK_D, VECTOR)
    exists = (tl.arange(0, N)[:, None] < rows - first) & (tl.arange(0, BLOCK_D)[None, :] < D)
    exists = tl.max_constancy(tl.broadcast_to(exists, pointers.shape), (1, VECTOR))
    tl.store(pointers, rounded(x, pointer.dtype.element_ty), mask=exists)


@triton.jit
def tanh(x):
    """tanh(x); near 0 by its series, where ``1 - 2 / (e^2x + 1)`` would cancel."""
    square = x * x
    series = square * 0.021869488 - 0.053968254
    series = series * square + 0.13333334
    series = series * square - 0.33333334
    large = 1.0 - 2.0 / (tl.exp2(x * (2.0 * _LOG2_E)) + 1.0)
    return tl.where(square < 0.04, x + x * square * series, large)


@triton.jit
def load_plane(
    pointer, i0, j0, di, dj, stride_m, stride_n, exists, VECTOR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A tile of a bias or mask, from row i0 and column j0 on.

    The origin is a 64-bit scalar and what is added to it 32 bits an element: a tile's addresses
    would fill the registers otherwise. VECTOR: so many columns lie side by side and are aligned
    (vector_width); 0: they may be anywhere.
    """
    SIZE: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    zero = tl.full([], 0, tl.int64)  # so that the origin is 64 bits wide
    pointer += (zero + i0) * stride_m + (zero + j0) * stride_n
    if VECTOR == 0:
        pointers = pointer + (di * stride_m + dj * stride_n)
    else:
        BYTES: tl.constexpr = VECTOR * SIZE if VECTOR * SIZE < 16 else 16
        pointers = pointer + (di * stride_m + dj)
        if TRANSPOSED:
            pointers = tl.multiple_of(pointers, (BYTES, SIZE))
            exists = tl.max_constancy(exists, (VECTOR, 1))
        else:
            pointers = tl.multiple_of(pointers, (SIZE, BYTES))
            exists = tl.max_constancy(exists, (1, VECTOR))
    return tl.load(pointers, mask=exists, other=0)


@triton.jit
def scores(
    products, i0, j0, queries, keys, shift, scale, softcap, left, right,
    bias, bias_m, bias_n, mask, mask_m, mask_n, slope,
    SIMPLE: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PLANE: tl.constexpr, BAND: tl.constexpr, TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """What becomes of a tile of products, of queries from i0 and keys from j0 on: ``(x, visible,
    t)``.

    ``x * factor`` are the scores in base 2, -Inf where nothing is seen; the factor is ``scale *
    log2(e)`` with SIMPLE, where nothing is added to the products, and 1 otherwise. ``t`` is the
    tanh of the softcap. BAND: a bound runs through the tile. TRANSPOSED: the tile is ``[keys,
    queries]``. PLANE: the VECTOR of :func:`load_plane`.
    """
    if TRANSPOSED:
        di = tl.arange(0, products.shape[1])[None, :]
        dj = tl.arange(0, products.shape[0])[:, None]
    else:
        di = tl.arange(0, products.shape[0])[:, None]
        dj = tl.arange(0, products.shape[1])[None, :]
    x = products
    t = products
    if SOFTCAP:
        t = tanh(products * (scale / softcap))
        x = t * (softcap * _LOG2_E)
    elif not SIMPLE:
        x = products * (scale * _LOG2_E)
    relative = (j0 + dj) - (i0 + shift + di)
    if slope is not None:
        x -= slope * _LOG2_E * tl.abs(relative).to(tl.float32)
    hides: tl.constexpr = BAND or bias is not None or mask is not None
    visible = products == products  # only its shape counts
    if hides:
        visible = tl.broadcast_to((di < queries - i0) & (dj < keys - j0), products.shape)
        exists = visible
        if BAND and LEFT:
            visible = visible & (relative >= -left)
        if BAND and RIGHT:
            visible = visible & (relative <= right)
        if bias is not None:
            b = load_plane(bias, i0, j0, di, dj, bias_m, bias_n, exists, PLANE, TRANSPOSED)
            x += b.to(tl.float32) * _LOG2_E
            visible = visible & (b.to(tl.float32) != -float("inf"))
        if mask is not None:
            seen = load_plane(mask, i0, j0, di, dj, mask_m, mask_n, exists, PLANE, TRANSPOSED)
            visible = visible & (seen != 0)
        x = tl.where(visible, x, -float("inf"))
    return x, visible, t


@triton.jit
def careful_dot(weights, x, visible, acc, seen, TF32: tl.constexpr):
    """``acc + weights @ x`` without what is not finite in x, and ``seen`` plus how often that is
    seen.

    ``weights [M, N]`` are 0 where ``visible`` is not, and have x's dtype.
    """
    bad = (x - x) != 0.0  # Inf - Inf is NaN, and NaN differs from everything
    acc = dot(weights, tl.where(bad, 0.0, x).to(x.dtype), acc, TF32)
    return acc, dot(visible.to(x.dtype), bad.to(x.dtype), seen, TF32)


@triton.jit
def any_nan(x):
    """Whether a tile has a NaN."""
    return tl.max(tl.max(tl.where(x == x, 0, 1), 1), 0) > 0


@triton.jit
def keep_factor(first, second, j, threshold, keep_scale):
    """``1 / (1 - p)`` where dropout keeps a weight, else 0; from the keys of rows."""
    bits = random_bits(first, second, j)
    return tl.where(bits >= threshold.to(tl.uint32), keep_scale, 0.0)


@triton.jit
def sequence_of(b, cu_q, cu_k, key_lengths, queries, keys, BOTTOM_RIGHT: tl.constexpr):
    """Of batch or sequence b: where its queries and keys begin, how many there are, the shift.

    Whatever the numbers are, nothing lies past the end.
    """
    first_q = 0
    first_k = 0
    if cu_q is not None:
        first_q = tl.minimum(tl.maximum(tl.load(cu_q + b).to(tl.int32), 0), queries)
        last_q = tl.minimum(tl.maximum(tl.load(cu_q + b + 1).to(tl.int32), first_q), queries)
        first_k = tl.minimum(tl.maximum(tl.load(cu_k + b).to(tl.int32), 0), keys)
        last_k = tl.minimum(tl.maximum(tl.load(cu_k + b + 1).to(tl.int32), first_k), keys)
        queries = last_q - first_q
        keys = last_k - first_k
    if key_lengths is not None:
        keys = tl.minimum(tl.maximum(tl.load(key_lengths + b).to(tl.int32), 0), keys)
    shift = 0
    if BOTTOM_RIGHT:
        shift = keys - queries
    return first_q, first_k, queries, keys, shift


@triton.jit
def tile_of_packed(program, cu, sequences, total, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr):
    """The sequence and the tile within it that a program has, among all tiles of all sequences.

    Past the last tile: sequence ``sequences``.
    """
    b = tl.arange(0, BLOCK_B)
    start = tl.load(cu + b, mask=b < sequences, other=0).to(tl.int32)
    stop = tl.load(cu + b + 1, mask=b < sequences, other=0).to(tl.int32)
    start = tl.minimum(tl.maximum(start, 0), total)
    stop = tl.minimum(tl.maximum(stop, start), total)
    tiles = tl.where(b < sequences, (stop - start + BLOCK - 1) // BLOCK, 0)
    through = tl.cumsum(tiles, 0)
    sequence = tl.sum(tl.where((through <= program) & (b < sequences), 1, 0), 0)
    before = tl.sum(tl.where(b < sequence, tiles, 0), 0)
    return sequence, program - before


@triton.jit
def key_range(
    first, last, keys, shift, left, right, BLOCK: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):  # fmt: skip
    """The keys that queries ``first`` to ``last`` see, ``[start, stop)``, and within them the tiles
    ``[full_start, full_stop)`` that all of them see in full. All but stop are multiples of BLOCK.
    """
    start = 0
    stop = keys
    full_start = 0
    full_stop = keys
    if LEFT:
        start = tl.maximum(first + shift - left, 0) // BLOCK * BLOCK
        full_start = tl.cdiv(tl.maximum(last + shift - left, 0), BLOCK) * BLOCK
    if RIGHT:
        stop = tl.minimum(tl.maximum(last + shift + right + 1, 0), keys)
        full_stop = tl.minimum(tl.maximum(first + shift + right + 1, 0), keys)
    stop = tl.maximum(stop, start)
    end = tl.cdiv(stop, BLOCK) * BLOCK
    full_start = tl.minimum(tl.maximum(full_start, start), end)
    full_stop = tl.maximum(full_stop // BLOCK * BLOCK, full_start)
    return start, full_start, full_stop, stop


# --- forward -------------------------------------------------------------------------------------


@triton.jit
def _forward_tiles(
    acc, m, l, seen, q, key, value, start, stop, i0, queries, keys, shift, k_n, v_n,
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
        k = load_rows(key, n, k_n, keys, BLOCK_N, D, BLOCK_D, VECTOR, BAND)
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
        v = load_rows(value, n, v_n, keys, BLOCK_N, DV, BLOCK_DV, VECTOR, BAND)
        p = rounded(p, value.dtype.element_ty)
        if CAREFUL:
            acc, seen = careful_dot(p, v, visible, acc, seen, TF32)
        else:
            acc = dot(p, v, acc, TF32)
    return acc, m, l, seen


@kernel
def attention_forward_kernel(
    query, key, value, output, lse,
    bias, mask, slopes, sinks, cu_q, cu_k, key_lengths, seed,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m,
    bias_b, bias_h, bias_m, bias_n, mask_b, mask_h, mask_m, mask_n, slopes_b,
    heads, group, total_q, total_k, sequences, tiles, section,
    scale, softcap, left, right, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_B: tl.constexpr, VECTOR: tl.constexpr,
    SIMPLE: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PLANE: tl.constexpr, TF32: tl.constexpr, CAREFUL: tl.constexpr,
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
    q = load_rows(query, i0, q_m, queries, BLOCK_M, D, BLOCK_D, VECTOR, True)
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
            acc, m, l, acc, q, key, value, start, full_start, i0, queries, keys, shift, k_n, v_n,
            scale, softcap, left, right, bias, bias_m, bias_n, mask, mask_m, mask_n, slope,
            seed, first, second, threshold, keep_scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, VECTOR, SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, TF32,
            True, False,
        )  # fmt: skip
    if not CAREFUL:
        acc, m, l, _ = _forward_tiles(
            acc, m, l, acc, q, key, value, full_start, full_stop, i0, queries, keys, shift,
            k_n, v_n,
            scale, softcap, left, right, bias, bias_m, bias_n, mask, mask_m, mask_n, slope,
            seed, first, second, threshold, keep_scale,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, VECTOR, SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, TF32,
            False, False,
        )  # fmt: skip
        start = full_stop
    acc, m, l, seen = _forward_tiles(
        acc, m, l, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), q, key, value, start, stop,
        i0, queries, keys, shift, k_n, v_n,
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


def strides_of(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """The first strides, 0 along dimensions of size 1; zeros for what is not there."""
    if tensor is None:
        return (0,) * count
    pairs = zip(tensor.shape[:count], tensor.stride()[:count], strict=True)
    return tuple(stride if size > 1 else 0 for size, stride in pairs)


def row_vector(width: int, *tensors: Tensor) -> int:
    """Consecutive elements that every access to rows of these tensors may take together."""
    strides = [
        RowStrides(None, None, stride) for tensor in tensors for stride in strides_of(tensor, 3)
    ]
    return vector_width(width, strides, *tensors)


def block_of(width: int) -> int:
    """The tile's width for rows of that many elements: products want 16 at least."""
    return max(16, next_power_of_2(max(width, 1)))


def uses_tf32(tensor: Tensor) -> bool:
    """Whether fp32 products may be TF32, as torch's own are asked to be."""
    return tensor.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32


def tile_count(a: Any, block: int, length: int, starts: Tensor | None) -> tuple[int, int, int]:
    """``(sequences, tiles, BLOCK_B)`` of a grid over lengths: of each, or packed, of all."""
    if starts is None:
        return a.query.shape[0], ceil_div(length, block), 1
    sequences = len(starts) - 1
    # As many as there can be: each sequence has one that is not full.
    return sequences, ceil_div(length, block) + sequences, next_power_of_2(max(sequences, 1))


def terms_of(a: Any) -> dict[str, Any]:
    """The kernels' flags, of the op's arguments."""
    added = a.softcap or a.bias is not None or a.alibi_slopes is not None
    return {
        "SIMPLE": not added and a.scale > 0,
        "SOFTCAP": bool(a.softcap),
        "LEFT": a.window_left >= 0,
        "RIGHT": a.window_right >= 0,
        "BOTTOM_RIGHT": a.bottom_right,
        "PLANE": plane_vector(a),
        "TF32": uses_tf32(a.query),
    }


def dropout_of(a: Any) -> tuple[int, float]:
    """Threshold and factor. The threshold is an int32's bits, so that its type is always one."""
    if a.seed is None:
        return 0, 1.0
    threshold = min(round(a.dropout_p * 2**32), 0xFFFFFFFF)
    threshold -= (threshold >> 31) << 32
    return threshold, 0.0 if a.dropout_p >= 1.0 else 1.0 / (1.0 - a.dropout_p)


def hides(a: Any) -> bool:
    """Whether there may be keys within reach of a program that a query of it does not see."""
    return a.window_left >= 0 or a.window_right >= 0 or has_planes(a)


def has_planes(a: Any) -> bool:
    """Whether tiles of a bias or a mask are loaded."""
    return a.bias is not None or a.mask is not None


def plane_vector(a: Any) -> int:
    """Columns of bias and mask that every access may take together; 0: they are not contiguous."""
    planes = [plane for plane in (a.bias, a.mask) if plane is not None]
    keys = a.key.shape[2]
    if any(plane.shape[3] != keys or plane.stride(3) != 1 for plane in planes):
        return 0
    if a.key_lengths is not None:  # a sequence may end within a vector
        return 1
    strides = [RowStrides(None, None, s) for plane in planes for s in strides_of(plane, 3)]
    return vector_width(keys, strides, *planes)


def bounded(window: int) -> int:
    """A window's bound that can be added to positions without overflow."""
    return min(window, 2**30)


def scalars_of(a: Any) -> tuple[Any, ...]:
    """Numbers that every kernel takes last."""
    bounds = (bounded(a.window_left), bounded(a.window_right))
    return (a.scale, a.softcap, *bounds, *dropout_of(a))


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as the bytes it is."""
    return None if mask is None else mask.view(torch.uint8)


def forward(a: Any, output: Tensor, lse: Tensor) -> None:
    """Fills ``output [B, H, Lq, Dv]`` and ``lse [B, H, Lq]``.

    Args:
        a: the op's arguments (``fastseq/ops/attention.py``); rows of query, key and value lie side
            by side.
    """
    query, key, value = a.query, a.key, a.value
    batch, heads, queries, d = query.shape
    keys, dv = value.shape[2:]
    if not output.numel() and not lse.numel():
        return
    block_d, block_dv = block_of(d), block_of(dv)
    architecture = device_of(query).architecture
    launch = forward_launch(block_d, block_dv, query.element_size(), has_planes(a), architecture)
    per_head = max(1, key.shape[2] * (d + dv) * query.element_size())
    group = heads // max(key.shape[1], 1)
    section = min(batch * heads, max(1, L2_SECTION // per_head) * group)
    tensors = (
        *(query, key, value, output, lse, a.bias, mask_bytes(a.mask), a.alibi_slopes, a.sinks),
        *(a.cu_seqlens_q, a.cu_seqlens_k, a.key_lengths, a.seed),
        *strides_of(query, 3),
        *strides_of(key, 3),
        *strides_of(value, 3),
        *strides_of(output, 3),
        *strides_of(a.bias, 4),
        *strides_of(a.mask, 4),
        *strides_of(a.alibi_slopes, 1),
    )

    def run(launch: Launch, *, careful: bool) -> None:
        sequences, tiles, block_b = tile_count(a, launch.block_m, queries, a.cu_seqlens_q)
        programs = tiles * heads * (1 if a.cu_seqlens_q is not None else batch)
        attention_forward_kernel[(programs,)](
            *tensors,
            *(heads, group, queries, keys, sequences, tiles, section),
            *scalars_of(a),
            D=d,
            DV=dv,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            BLOCK_D=block_d,
            BLOCK_DV=block_dv,
            BLOCK_B=block_b,
            VECTOR=row_vector(d | dv, query, key, value, output),
            CAREFUL=careful,
            **terms_of(a),
            **launch.options,
        )

    with on_device(query):
        run(launch, careful=False)
        if hides(a):
            run(CAREFUL_LAUNCH, careful=True)
