r"""Rotary position embedding, one kernel for both directions: the backward turns the other way.

For the position p of a row and each pair of its first ``2 * half`` numbers::

    y1 = x1 * cos[p] - x2 * sin[p]        y2 = x2 * cos[p] + x1 * sin[p]

A number is read and written once, with 3 operations: bound by memory, 2 * 2 bytes a number in bf16.
The tables are read once for every head from L2, half as many bytes again in fp32. 8192 rows x 32
heads of 128 in bf16 move 134 MB: 31 us at the 4.3 TB/s an H200 copies with. Rows are taken by tiles
of 1024 pairs in 4 warps, 8 pairs a thread: two vectors of 16 bytes of a bf16 row under way.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .common import (
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

#: Pairs of a tile.
TILE = 1024


@kernel
def rotary_embedding_kernel(
    input, output, cos, sin, positions,
    input_inner, input_outer_stride, input_stride,
    rows, size, half, length, entry, positions_stride, offset,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """A tile of rows ``[BLOCK_M, BLOCK_N]`` pairs wide; the output is contiguous."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < rows
    row = tl.where(there, row, 0)
    if positions is None:
        position = row % length + offset
    else:
        position = tl.load(positions + row // entry * positions_stride + row % length)
    source = row_offsets(row, input_inner, input_outer_stride, input_stride)
    target = row * size
    column = tl.arange(0, BLOCK_N)[None, :]
    mask = tl.max_constancy(there[:, None] & (column < half), (1, VECTOR))
    c = tl.load(aligned(cos, position * half, column, VECTOR), mask=mask, other=0.0)
    s = tl.load(aligned(sin, position * half, column, VECTOR), mask=mask, other=0.0)
    if INVERSE:
        s = -s
    dtype = output.dtype.element_ty
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_N)[None, :]
        mask = tl.max_constancy(there[:, None] & (both < 2 * half), (1, VECTOR))
        x = tl.load(aligned(input, source, both, VECTOR), mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [BLOCK_M, BLOCK_N, 2]))
        y = tl.reshape(tl.join(a * c - b * s, b * c + a * s), [BLOCK_M, 2 * BLOCK_N])
        tl.store(aligned(output, target, both, VECTOR), rounded(y, dtype), mask=mask)
    else:
        first, second = aligned(input, source, column, VECTOR), half + column
        a = tl.load(first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(aligned(input, source, second, VECTOR), mask=mask, other=0.0).to(tl.float32)
        y = rounded(a * c - b * s, dtype)
        tl.store(aligned(output, target, column, VECTOR), y, mask=mask)
        y = rounded(b * c + a * s, dtype)
        tl.store(aligned(output, target, second, VECTOR), y, mask=mask)
    if BLOCK_REST > 0:
        rest = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
        mask = there[:, None] & (rest < size)
        kept = tl.load(input + source[:, None] + rest, mask=mask)
        tl.store(output + target[:, None] + rest, kept, mask=mask)


def rotate(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    output: Tensor,
    offset: int,
    length: int,
    entry: int,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Fills ``output`` with the rows of ``input``, turned.

    Args:
        input: contiguous, or a view ``[outer, inner, size]`` of contiguous rows.
        cos, sin: ``[positions, rotated / 2]``, fp32 and contiguous.
        positions: ``[batch, length]`` or ``[1, length]``, contiguous; None: ``offset`` and on.
        output: contiguous, not empty.
        length, entry: rows of a sequence, and of an entry of the batch.
        interleaved, inverse: which numbers are pairs, and which way they are turned.
    """
    size, half = output.shape[-1], cos.shape[1]
    rows = output.numel() // size
    block_n = next_power_of_2(half)
    block_m = max(1, TILE // block_n)
    rest = size - 2 * half
    stride = length if positions is not None and positions.shape[0] > 1 else 0
    strides = row_strides(input, size)
    vector = vector_width(size | half, (strides,), input, output, cos, sin)
    with on_device(input):
        rotary_embedding_kernel[(ceil_div(rows, block_m),)](
            input, output, cos, sin, positions, *strides,
            rows, size, half, length, entry, stride, offset,
            INTERLEAVED=interleaved, INVERSE=inverse, VECTOR=vector,
            BLOCK_M=block_m, BLOCK_N=block_n,
            BLOCK_REST=next_power_of_2(rest) if rest else 0, num_warps=4,
        )  # fmt: skip
