"""What the attention kernels share: tiles of rows, of scores and of masks, and which keys are seen.

A tile of scores becomes, in this order, ``cap(scale * products)``, plus the bias, minus ALiBi, and
-Inf where a query does not see a key: :func:`scores`. Everything is in base 2, as the GPU's
exponential is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    INTERPRETED,
    RowStrides,
    ceil_div,
    dot,
    next_power_of_2,
    random_bits,
    rounded,
    shared_memory_limit,
    vector_width,
)

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)

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


def careful_launch(width: int) -> Launch:
    """The tile of a careful run, which is never in a hurry and holds every sum twice."""
    if INTERPRETED:
        return Launch(32, 16, 4, 1)
    return Launch(64 if width <= 64 else 32, 16, 8, 1)


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


#: lse in base 2 and delta of every query.
Statistics = tuple[Tensor, Tensor]

# --- host ----------------------------------------------------------------------------------------


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


def planes_of(a: Any) -> tuple[Any, ...]:
    """What is added to scores, as every kernel takes it after its tensors."""
    return (a.bias, mask_bytes(a.mask), a.alibi_slopes)


def plane_strides_of(a: Any) -> tuple[int, ...]:
    """The strides of those, likewise."""
    return (*strides_of(a.bias, 4), *strides_of(a.mask, 4), *strides_of(a.alibi_slopes, 1))
