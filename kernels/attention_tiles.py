"""What the attention kernels share: tiles of rows, of scores and of masks, and which keys are seen.

A tile of scores becomes, in this order, ``cap(scale * products)``, plus the bias, minus ALiBi, and
-Inf where a query does not see a key: :func:`scores`. Everything is in base 2, as the GPU's
exponential is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    INTERPRETED,
    dot,
    random_bits,
    rounded,
)

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)

# --- device --------------------------------------------------------------------------------------


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
def described(pointer, rows, stride, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tensor descriptor of rows of D elements, by tiles ``[N, BLOCK_D]``: the copy engine (TMA)
    then makes the addresses, and 0 of what is past the last of the ``rows`` or past D."""
    return tl.make_tensor_descriptor(pointer, [rows, D], [stride, 1], [N, BLOCK_D])


@triton.jit
def load_tile(
    tiles, pointer, first, stride, rows, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """:func:`load_rows`, through ``tiles`` if that is a descriptor of them and not None."""
    if tiles is not None:
        x = tiles.load([first, 0])
        if _INTERPRETED:
            x = x.to(tl.float32)
    else:
        x = load_rows(pointer, first, stride, rows, N, D, BLOCK_D, VECTOR, CHECKED)
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


@triton.jit
def tile_weights(
    products, base, first, second, i0, j0, queries, keys, shift, scale, softcap,
    left, right, bias, bias_m, bias_n, mask, mask_m, mask_n, slope, seed, threshold, keep_scale,
    SIMPLE: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PLANE: tl.constexpr, BAND: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Of a tile of products: ``(p, keep, t, visible)``: dropout multiplies p by keep, and t is the
    tanh of the softcap.

    ``base`` (lse in base 2) and the dropout keys are of the tile's queries, broadcast along its
    keys.
    """
    x, visible, t = scores(
        products, i0, j0, queries, keys, shift, scale, softcap, left, right,
        bias, bias_m, bias_n, mask, mask_m, mask_n, slope,
        SIMPLE, SOFTCAP, LEFT, RIGHT, PLANE, BAND, TRANSPOSED,
    )  # fmt: skip
    factor = 1.0
    if SIMPLE:
        factor = scale * _LOG2_E
    p = tl.exp2(x * factor - base)
    keep = p
    if seed is not None:
        if TRANSPOSED:
            j = j0 + tl.arange(0, products.shape[0])[:, None]
        else:
            j = j0 + tl.arange(0, products.shape[1])[None, :]
        keep = keep_factor(first, second, j, threshold, keep_scale)
    return p, keep, t, visible


@triton.jit
def tile_gradients(
    p, keep, t, visible, grads, delta, seed, SOFTCAP: tl.constexpr, CAREFUL: tl.constexpr
):
    """``(ds, ds cap')`` of a tile from ``dp``."""
    if seed is not None:
        grads = grads * keep
    ds = p * (grads - delta)
    if CAREFUL:
        ds = tl.where(visible, ds, 0.0)
    raw = ds
    if SOFTCAP:
        raw = ds * (1.0 - t * t)
    return ds, raw


@triton.jit
def load_statistics(base, delta, i, queries):
    """lse in base 2 and delta of queries, +Inf and 0 of those that are not there."""
    exists = i < queries
    l = tl.load(base + i, mask=exists, other=float("inf"))
    return l, tl.load(delta + i, mask=exists, other=0.0)
