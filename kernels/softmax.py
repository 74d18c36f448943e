r"""Softmax, log_softmax and masked_softmax, forward and backward, along any dimension.

Forward, for every row or column of ``N`` elements::

    z      = x                                     (masked: scale * x + mask, -inf where masked out)
    output = exp(z - max) / sum(exp(z - max))      (log: z - max - log(sum(exp(z - max))))

Backward, from the output alone::

    grad_input = scale * y * (grad - sum(grad * y))      (log: grad - exp(y) * sum(grad))

Both are bound by memory: some 10 instructions and one exponential an element, where an H200 could
issue 27 and 3.4 (16 a clock and SM) in the time that its memory takes to deliver a bf16 element and
take the result. So a tile is read once, in 16-byte accesses, and stays in registers until it is
written. Least traffic and time for 8192 rows of 4096 in bf16, at the datasheet's 4.8 TB/s (at the
4.3 TB/s a copy attains)::

    forward     read x, write output                     134 MB   28 us (31)
    backward    read output and grad, write grad_input   201 MB   42 us (47)
    masked      the mask too, once for every row that shares it: the rest comes from L2

What does not fit the registers of one program is read twice, the second time from the end: there L2
is likeliest to have it still. The first sweep keeps a maximum and a sum for every lane of the tile,
one exponential an element, and merges the lanes at the end (Milakov & Gimelshein 2018).

Along a dimension that is not the last, a tile has neighbouring columns in its first dimension:
those are what lies side by side in memory, so accesses are as wide and nothing is transposed. The
arithmetic is the same; the compiler lays threads along the dimension whose addresses are
consecutive.

A tile's shape depends on lengths and dtypes alone, and there are no atomics: results are bitwise
reproducible, and a row's do not depend on the rows around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    RowStrides,
    aligned,
    ceil_div,
    kernel,
    next_power_of_2,
    on_device,
    rounded,
    row_offsets,
    row_strides,
    vector_width,
)

_LOG2_E = tl.constexpr(1.4426950408889634)

# --- launch configurations -----------------------------------------------------------------------

#: Tiles up to so many elements stay in registers forward: 16 a thread for 1024 threads of 64
#: registers, the most an SM has for one program. Beyond, in backward (two operands) and with a mask
#: from half of it on, two sweeps.
LIMIT = 16384


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut up. None of it depends on the number of rows.

    The figures come from the generated code (``tests/codegen``), not yet from a clock.
    """

    block_m: int  # rows or columns of a tile
    block_n: int  # and their elements
    num_warps: int
    split: bool = False  # a row takes several tiles


@cache
def rows_launch(length: int, element_size: int, limit: int) -> Launch:
    """Along the last dimension; ``limit``: the elements that fit registers."""
    block_n = max(8, next_power_of_2(length))
    if block_n > limit:
        # 16 elements a thread, each with its maximum and sum: 8 warps keep 32 to 64 KB under way on
        # an SM with the three or more programs that fit.
        return Launch(1, min(limit, 4096), 8, split=True)
    row_bytes = block_n * element_size
    if row_bytes < 512:
        # Not a vector for every lane: 32 bytes a thread in rows side by side.
        return Launch(4096 // row_bytes, block_n, 4)
    if row_bytes <= 2048:
        # A warp to itself needs neither shared memory nor barriers.
        return Launch(2048 // row_bytes, block_n, 1)
    return Launch(1, block_n, min(32, max(4, block_n // 512)))


@cache
def columns_launch(length: int, inner: int, element_size: int, limit: int) -> Launch:
    """Along another dimension, with ``inner`` elements behind it."""
    # A row of the tile is one cache line of 128 bytes, or two where the columns are short: wider,
    # and # fewer elements of a column would fit.
    block_m = min(128 // element_size, max(8, next_power_of_2(inner)))
    block_n = max(8, next_power_of_2(length))
    if block_n <= 32 and inner > block_m:
        block_m *= 2
    split = block_m * block_n > limit
    if split:
        # 4096 elements in 8 warps, as for rows.
        block_n = 4096 // block_m
    return Launch(block_m, block_n, min(32, max(4, block_m * block_n // 512)), split)


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _program(count, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr):
    """What a program is for: the number of its outer slice, and of its rows or columns ``[M]``.

    Rows are counted from 0 in all; columns within their slice, of which each has ``count``.
    """
    program = tl.program_id(0)
    if COLUMNS:
        tiles = tl.cdiv(count, BLOCK_M)
        outer = tl.full([1], 1, tl.int64) * (program // tiles)
        first = (program % tiles) * BLOCK_M
    else:
        outer = tl.full([1], 0, tl.int64)
        first = tl.full([1], BLOCK_M, tl.int64) * program
    item = first + tl.arange(0, BLOCK_M).to(tl.int64)
    return outer, item


@triton.jit
def _starts(outer, item, length, inner, outer_stride, stride, COLUMNS: tl.constexpr):
    """Where rows or columns ``[M]`` begin in a tensor of these row strides."""
    if COLUMNS:
        start = row_offsets(outer * length, inner, outer_stride, stride) + item
    else:
        start = row_offsets(item, inner, outer_stride, stride)
    return start


@triton.jit
def _exists(item, number, count, length, VECTOR: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements ``[M, N]`` exist; whole vectors do or do not."""
    mask = (item < count)[:, None] & (number < length)
    if COLUMNS:
        mask = tl.max_constancy(mask, (VECTOR, 1))
    else:
        mask = tl.max_constancy(mask, (1, VECTOR))
    return mask


@triton.jit
def _pointers(pointer, start, number, stride, VECTOR: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to the elements ``number [1, N]`` of rows or columns that begin at ``start [M]``."""
    SIZE: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    BYTES: tl.constexpr = VECTOR * SIZE if VECTOR * SIZE < 16 else 16
    if COLUMNS:
        pointers = pointer + start[:, None] + number.to(tl.int64) * stride
        pointers = tl.multiple_of(pointers, (BYTES, SIZE))
    else:
        pointers = aligned(pointer, start, number, VECTOR)
    return pointers


@triton.jit
def _load(
    pointer, start, number, stride, mask, other, VECTOR: tl.constexpr, COLUMNS: tl.constexpr,
    LAST: tl.constexpr = False,
):  # fmt: skip
    """A tile in fp32. LAST: nothing reads it again."""
    pointers = _pointers(pointer, start, number, stride, VECTOR, COLUMNS)
    policy: tl.constexpr = "evict_first" if LAST else ""
    return tl.load(pointers, mask=mask, other=other, eviction_policy=policy).to(tl.float32)


@triton.jit
def _store(
    pointer, start, number, stride, x, mask, VECTOR: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    pointers = _pointers(pointer, start, number, stride, VECTOR, COLUMNS)
    tl.store(pointers, rounded(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _scores(
    input, mask, start, mask_start, item, number, exists, stride, scale, queries, causal_offset,
    MASKED: tl.constexpr, MASK_BY_COLUMN: tl.constexpr, CAUSAL: tl.constexpr,
    VECTOR: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr = False,
):  # fmt: skip
    """A tile of ``z``: -inf where there is nothing, or nothing that takes part."""
    z = _load(input, start, number, stride, exists, -float("inf"), VECTOR, COLUMNS, LAST)
    if MASKED:
        z = tl.where(exists, z * scale, -float("inf"))
        if mask is not None:
            if MASK_BY_COLUMN:
                m = tl.load(aligned(mask, mask_start, number, VECTOR), mask=exists, other=0)
            else:
                m = tl.load(mask + mask_start)[:, None]
            if mask.dtype.element_ty == tl.uint8:
                z = tl.where(m != 0, z, -float("inf"))
            else:
                m = m.to(tl.float32)
                z = tl.where(m == -float("inf"), m, z + m)
        if CAUSAL:
            last = item % queries + causal_offset
            z = tl.where(number <= last[:, None], z, -float("inf"))
    return z


@triton.jit
def _finish(z, largest, total, LOG: tl.constexpr, MASKED: tl.constexpr):
    """The output from the scores and their statistics ``[M]``."""
    if LOG:
        y = z - largest[:, None] - tl.log(total)[:, None]
    else:
        factor = 1.0 / total
        if MASKED:  # a row of which nothing takes part
            factor = tl.where(total == 0.0, 0.0, factor)
        y = tl.exp2((z - largest[:, None]) * _LOG2_E) * factor[:, None]
    return y


@triton.jit
def _finite(largest):
    """What to subtract: 0 where all is -inf, as -inf - -inf would make NaN of a sum that is 0."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@kernel
def softmax_forward_kernel(
    input, mask, output,
    input_inner, input_outer_stride, input_stride,
    count, length, pitch,
    mask_size_1, mask_size_2, mask_stride_0, mask_stride_1, mask_stride_2,
    scale, queries, causal_offset,
    LOG: tl.constexpr, MASKED: tl.constexpr, MASK_BY_COLUMN: tl.constexpr, CAUSAL: tl.constexpr,
    COLUMNS: tl.constexpr, SPLIT: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_M, BLOCK_N]`` in registers, or with SPLIT tile by tile in two sweeps.

    ``count`` rows in all, or columns of each slice, of ``length`` elements; in the output, which is
    contiguous, rows begin and elements of a column lie ``pitch`` apart.
    """
    outer, item = _program(count, BLOCK_M, COLUMNS)
    start = _starts(outer, item, length, input_inner, input_outer_stride, input_stride, COLUMNS)
    output_start = _starts(outer, item, length, None, None, pitch, COLUMNS)
    mask_start = item
    if mask is not None:
        row = tl.where(item < count, item, 0)
        rest = row // mask_size_2
        mask_start = (
            rest // mask_size_1 * mask_stride_0
            + rest % mask_size_1 * mask_stride_1
            + row % mask_size_2 * mask_stride_2
        )
    number = tl.arange(0, BLOCK_N)[None, :]
    if SPLIT:
        tiles = tl.cdiv(length, BLOCK_N)
        lane_largest = tl.full([BLOCK_M, BLOCK_N], -float("inf"), tl.float32)
        lane_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for tile in range(0, tiles):
            at = tile * BLOCK_N + number
            exists = _exists(item, at, count, length, VECTOR, COLUMNS)
            z = _scores(
                input, mask, start, mask_start, item, at, exists, input_stride, scale, queries,
                causal_offset, MASKED, MASK_BY_COLUMN, CAUSAL, VECTOR, COLUMNS,
            )  # fmt: skip
            # One exponential: whichever of the two is less is scaled to the other.
            power = tl.exp2(-tl.abs(z - lane_largest) * _LOG2_E)
            power = tl.where(z == -float("inf"), 0.0, power)
            larger = z > lane_largest
            lane_total = tl.where(larger, lane_total * power + 1.0, lane_total + power)
            lane_largest = tl.where(larger, z, lane_largest)
        largest = _finite(tl.max(lane_largest, 1))
        total = tl.sum(lane_total * tl.exp2((lane_largest - largest[:, None]) * _LOG2_E), 1)
        for tile in range(0, tiles):
            at = (tiles - 1 - tile) * BLOCK_N + number
            exists = _exists(item, at, count, length, VECTOR, COLUMNS)
            z = _scores(
                input, mask, start, mask_start, item, at, exists, input_stride, scale, queries,
                causal_offset, MASKED, MASK_BY_COLUMN, CAUSAL, VECTOR, COLUMNS, True,
            )  # fmt: skip
            y = _finish(z, largest, total, LOG, MASKED)
            _store(output, output_start, at, pitch, y, exists, VECTOR, COLUMNS)
    else:
        exists = _exists(item, number, count, length, VECTOR, COLUMNS)
        z = _scores(
            input, mask, start, mask_start, item, number, exists, input_stride, scale, queries,
            causal_offset, MASKED, MASK_BY_COLUMN, CAUSAL, VECTOR, COLUMNS,
        )  # fmt: skip
        largest = _finite(tl.max(z, 1))
        total = tl.sum(tl.exp2((z - largest[:, None]) * _LOG2_E), 1)
        y = _finish(z, largest, total, LOG, MASKED)
        _store(output, output_start, number, pitch, y, exists, VECTOR, COLUMNS)


@triton.jit
def _pair(
    grad_output, output, grad_start, start, number, exists, grad_stride, stride,
    LOG: tl.constexpr, MASKED: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr,
    LAST: tl.constexpr = False,
):  # fmt: skip
    """The gradient and the softmax of a tile."""
    grad = _load(grad_output, grad_start, number, grad_stride, exists, 0.0, VECTOR, COLUMNS, LAST)
    y = _load(
        output, start, number, stride, exists, -float("inf") if LOG else 0.0, VECTOR, COLUMNS, LAST
    )
    if LOG:
        y = tl.exp2(y * _LOG2_E)
    if MASKED:  # what takes no part may have any gradient, NaN included
        grad = tl.where(y == 0.0, 0.0, grad)
    return grad, y


@triton.jit
def _gradient(grad, y, total, scale, LOG: tl.constexpr, MASKED: tl.constexpr):
    if LOG:
        gradient = grad - y * total[:, None]
    else:
        gradient = (grad - total[:, None]) * y
        if MASKED:  # 0 times an infinite sum
            gradient = tl.where(y == 0.0, 0.0, gradient * scale)
    return gradient


@kernel
def softmax_backward_kernel(
    grad_output, output, grad_input,
    grad_inner, grad_outer_stride, grad_stride,
    output_inner, output_outer_stride, output_stride,
    count, length, pitch, scale,
    LOG: tl.constexpr, MASKED: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As the forward, with one sum instead of two statistics."""
    outer, item = _program(count, BLOCK_M, COLUMNS)
    grad_start = _starts(outer, item, length, grad_inner, grad_outer_stride, grad_stride, COLUMNS)
    start = _starts(outer, item, length, output_inner, output_outer_stride, output_stride, COLUMNS)
    input_start = _starts(outer, item, length, None, None, pitch, COLUMNS)
    number = tl.arange(0, BLOCK_N)[None, :]
    if SPLIT:
        tiles = tl.cdiv(length, BLOCK_N)
        lane_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for tile in range(0, tiles):
            at = tile * BLOCK_N + number
            exists = _exists(item, at, count, length, VECTOR, COLUMNS)
            grad, y = _pair(
                grad_output, output, grad_start, start, at, exists, grad_stride, output_stride,
                LOG, MASKED, VECTOR, COLUMNS,
            )  # fmt: skip
            lane_total += grad if LOG else grad * y
        total = tl.sum(lane_total, 1)
        for tile in range(0, tiles):
            at = (tiles - 1 - tile) * BLOCK_N + number
            exists = _exists(item, at, count, length, VECTOR, COLUMNS)
            grad, y = _pair(
                grad_output, output, grad_start, start, at, exists, grad_stride, output_stride,
                LOG, MASKED, VECTOR, COLUMNS, True,
            )  # fmt: skip
            gradient = _gradient(grad, y, total, scale, LOG, MASKED)
            _store(grad_input, input_start, at, pitch, gradient, exists, VECTOR, COLUMNS)
    else:
        exists = _exists(item, number, count, length, VECTOR, COLUMNS)
        grad, y = _pair(
            grad_output, output, grad_start, start, number, exists, grad_stride, output_stride,
            LOG, MASKED, VECTOR, COLUMNS,
        )  # fmt: skip
        total = tl.sum(grad if LOG else grad * y, 1)
        gradient = _gradient(grad, y, total, scale, LOG, MASKED)
        _store(grad_input, input_start, number, pitch, gradient, exists, VECTOR, COLUMNS)


# --- launchers -----------------------------------------------------------------------------------


def _launch(length: int, inner: int, element_size: int, limit: int) -> Launch:
    if inner == 1:
        return rows_launch(length, element_size, limit)
    return columns_launch(length, inner, element_size, limit)


def _grid(elements: int, length: int, inner: int, launch: Launch) -> tuple[int]:
    if inner == 1:
        return (ceil_div(elements // length, launch.block_m),)
    return (elements // (length * inner) * ceil_div(inner, launch.block_m),)


def forward(input: Tensor, output: Tensor, length: int, inner: int, log: bool) -> None:
    """Fills ``output`` with the softmax of ``input`` or its logarithm.

    Args:
        input: contiguous, or a view ``[*, *, row_length]`` of contiguous rows, which are the
            dimension itself where ``inner`` is 1, else what lies behind it.
        output: contiguous.
        length: the size of the dimension.
        inner: how many elements lie behind it.
    """
    _forward(input, None, output, length, inner, log=log)


def masked_forward(
    input: Tensor,
    mask: Tensor | None,
    output: Tensor,
    scale: float,
    queries: int,
    causal_offset: int,
) -> None:
    """Fills ``output`` with the masked softmax of the rows of ``input``.

    Args:
        input, output: as :func:`forward`, along the last dimension.
        mask: a view ``[*, *, *, length]`` whose leading dimensions are the rows, broadcast by
            strides of 0; boolean or additive.
        queries: row r sees the columns up to ``r % queries + causal_offset``; 0: all.
    """
    length = output.shape[-1]
    _forward(
        input,
        mask,
        output,
        length,
        1,
        masked=True,
        scale=scale,
        queries=queries,
        causal_offset=causal_offset,
    )


def _forward(
    input: Tensor,
    mask: Tensor | None,
    output: Tensor,
    length: int,
    inner: int,
    *,
    log: bool = False,
    masked: bool = False,
    scale: float = 1.0,
    queries: int = 0,
    causal_offset: int = 0,
) -> None:
    row_length = length if inner == 1 else inner
    strides = row_strides(input, row_length)
    sizes, mask_strides = (1, 1), (0, 0, 0)
    by_column = True
    promised = [strides]
    if mask is not None:
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        sizes = (mask.shape[1], mask.shape[2])
        mask_strides = mask.stride()[:3]
        by_column = length == 1 or mask.stride(3) != 0
        if by_column:
            promised += [RowStrides(None, None, stride) for stride in mask_strides]
    limit = LIMIT // 2 if mask is not None else LIMIT
    launch = _launch(length, inner, max(input.element_size(), output.element_size()), limit)
    with on_device(input):
        softmax_forward_kernel[_grid(output.numel(), length, inner, launch)](
            input,
            mask,
            output,
            *strides,
            output.numel() // length if inner == 1 else inner,
            length,
            row_length,
            *sizes,
            *mask_strides,
            scale,
            queries,
            causal_offset,
            LOG=log,
            MASKED=masked,
            MASK_BY_COLUMN=by_column,
            CAUSAL=queries > 0,
            COLUMNS=inner > 1,
            SPLIT=launch.split,
            VECTOR=vector_width(
                row_length, tuple(promised), input, mask if by_column else None, output
            ),
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            num_warps=launch.num_warps,
        )


def backward(
    grad_output: Tensor,
    output: Tensor,
    grad_input: Tensor,
    length: int,
    inner: int,
    log: bool,
    *,
    masked: bool = False,
    scale: float = 1.0,
) -> None:
    """Fills ``grad_input``; arguments as :func:`forward`, ``masked`` for what is 0 to stay 0."""
    row_length = length if inner == 1 else inner
    strides = row_strides(grad_output, row_length), row_strides(output, row_length)
    launch = _launch(length, inner, output.element_size(), LIMIT // 2)
    with on_device(output):
        softmax_backward_kernel[_grid(output.numel(), length, inner, launch)](
            grad_output,
            output,
            grad_input,
            *strides[0],
            *strides[1],
            output.numel() // length if inner == 1 else inner,
            length,
            row_length,
            scale,
            LOG=log,
            MASKED=masked,
            COLUMNS=inner > 1,
            SPLIT=launch.split,
            VECTOR=vector_width(row_length, strides, grad_output, output, grad_input),
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            num_warps=launch.num_warps,
        )
