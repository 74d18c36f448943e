r"""Token, position and segment embedding in one pass; and their dropout again, for the gradient.

::

    output[r] = dropout(scale * token[ids[r]] + position[p(r)] + segment[segments[r]])

Bound by memory: a token's row is read where it lies and the output's written, 2 * 2 bytes a number
in bf16; a position's row is read for every sequence of the batch but comes from L2 after the first.
8192 tokens of 4096 in bf16 move 134 MB: 31 us at the 4.3 TB/s an H200 copies with, where a lookup,
a lookup and a sum move 403 MB. Tiles have 2048 numbers in 4 warps, 16 a thread: two vectors of
16 bytes from each table under way in each.

The gradients of the tables are sums over the rows that read the same: torch sorts them and adds
them up, without atomics (``fastseq/ops/embedding.py``). With dropout the gradient has to pass the
mask first, which is the second kernel.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .common import (
    aligned,
    ceil_div,
    dropout,
    kernel,
    next_power_of_2,
    on_device,
    rounded,
    row_offsets,
    row_strides,
    vector_width,
)

#: Numbers of a tile, and the most of a row in it.
TILE, WIDEST = 2048, 1024


@kernel
def embedding_kernel(
    token, position, segment, ids, positions, segments, seed, output,
    rows, size, tokens, places, kinds, positions_count, segments_count, offset,
    scale, threshold, keep_scale,
    VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile ``[BLOCK_M, BLOCK_N]`` of the output.

    A row with a key that is out of its table's range reads nothing and becomes NaN.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    there = row < rows
    row = tl.where(there, row, 0)
    key = tl.load(ids + row)
    if positions is None:
        place = row % positions_count + offset
    else:
        place = tl.load(positions + row % positions_count)
    good = (key >= 0) & (key < tokens) & (place >= 0) & (place < places)
    kind = key
    if segment is not None:
        kind = tl.load(segments + row % segments_count)
        good = good & (kind >= 0) & (kind < kinds)
    mask = tl.max_constancy((there & good)[:, None] & (column < size), (1, VECTOR))
    x = tl.load(aligned(token, key * size, column, VECTOR), mask=mask, other=0.0)
    p = tl.load(aligned(position, place * size, column, VECTOR), mask=mask, other=0.0)
    y = x.to(tl.float32) * scale + p.to(tl.float32)
    if segment is not None:
        s = tl.load(aligned(segment, kind * size, column, VECTOR), mask=mask, other=0.0)
        y += s.to(tl.float32)
    if seed is not None:
        y = dropout(y, tl.load(seed), row, column, threshold, keep_scale)
    y = rounded(tl.where(good[:, None], y, float("nan")), output.dtype.element_ty)
    mask = tl.max_constancy(there[:, None] & (column < size), (1, VECTOR))
    tl.store(aligned(output, row * size, column, VECTOR), y, mask=mask)


@kernel
def embedding_dropout_kernel(
    grad, output, seed, grad_inner, grad_outer_stride, grad_stride,
    rows, size, threshold, keep_scale,
    VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile ``[BLOCK_M, BLOCK_N]`` of the gradient, through the mask of the forward."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    there = row < rows
    row = tl.where(there, row, 0)
    mask = tl.max_constancy(there[:, None] & (column < size), (1, VECTOR))
    source = row_offsets(row, grad_inner, grad_outer_stride, grad_stride)
    g = tl.load(aligned(grad, source, column, VECTOR), mask=mask, other=0.0).to(tl.float32)
    g = dropout(g, tl.load(seed), row, column, threshold, keep_scale)
    y = rounded(g, output.dtype.element_ty)
    tl.store(aligned(output, row * size, column, VECTOR), y, mask=mask)


def _tile(rows: int, size: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and a tile's size."""
    block_n = min(WIDEST, next_power_of_2(size))
    block_m = TILE // block_n
    return (ceil_div(rows, block_m), ceil_div(size, block_n)), {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }


def forward(
    token: Tensor,
    position: Tensor,
    segment: Tensor | None,
    ids: Tensor,
    positions: Tensor | None,
    segments: Tensor | None,
    offset: int,
    scale: float,
    seed: Tensor | None,
    threshold: int,
    keep_scale: float,
    output: Tensor,
) -> None:
    """Fills ``output``, contiguous and not empty.

    Args:
        token, position, segment: contiguous, of the output's dtype.
        ids: a key for every row, contiguous.
        positions, segments: contiguous, keys for every row or for those of one sequence;
            ``positions`` None: ``offset`` and on.
    """
    size, length = token.shape[1], ids.shape[-1]
    grid, tile = _tile(ids.numel(), size)
    vector = vector_width(size, (), token, position, segment, output)
    with on_device(token):
        embedding_kernel[grid](
            token, position, segment, ids, positions, segments, seed, output,
            ids.numel(), size, token.shape[0], position.shape[0],
            0 if segment is None else segment.shape[0],
            length if positions is None else positions.numel(),
            1 if segments is None else segments.numel(),
            offset, scale, threshold, keep_scale, VECTOR=vector, **tile, num_warps=4,
        )  # fmt: skip


def dropped(grad: Tensor, seed: Tensor, threshold: int, keep_scale: float, output: Tensor) -> None:
    """Fills ``output`` with ``grad`` through the forward's mask.

    Args:
        grad: contiguous, or a view ``[outer, inner, size]`` of contiguous rows.
        output: contiguous, not empty.
    """
    size = output.shape[-1]
    rows = output.numel() // size
    grid, tile = _tile(rows, size)
    strides = row_strides(grad, size)
    vector = vector_width(size, (strides,), grad, output)
    with on_device(grad):
        embedding_dropout_kernel[grid](
            grad, output, seed, *strides, rows, size, threshold, keep_scale,
            VECTOR=vector, **tile, num_warps=4,
        )  # fmt: skip
