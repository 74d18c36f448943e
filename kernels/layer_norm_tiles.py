"""What the layer_norm kernels share: how they are launched, tiles of rows, their dropout."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .common import aligned, random_bits, rounded, row_key


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut up. None of it depends on the number of rows.

    The figures come from the generated code (``tests/codegen``), not yet from a clock.
    """

    block_m: int  # rows of a tile
    block_n: int  # and columns
    num_warps: int
    registers: int | None = None  # a thread's share where so many programs are to live on an SM
    split: bool = False  # a row takes several tiles
    num_stages: int = 1  # one more than the tiles fetched ahead, through shared memory
    programs: int = 0  # of a persistent kernel on every SM, all resident
    keeps_weight: bool = True  # in registers, for all tiles of a persistent kernel
    counts: bool = False  # columns for dropout, see dropout_from


# --- device --------------------------------------------------------------------------------------


@triton.jit
def load_tile(pointer, row_start, column, mask, VECTOR: tl.constexpr, LAST: tl.constexpr = False):
    """A tile of rows that begin at ``row_start`` in fp32; 0 where masked. LAST: the last read."""
    pointers = aligned(pointer, row_start, column, VECTOR)
    policy: tl.constexpr = "evict_first" if LAST else ""
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy=policy).to(tl.float32)


@triton.jit
def store_tile(pointer, row_start, column, x, mask, VECTOR: tl.constexpr):
    """``x`` rounded to what ``pointer`` points to, where the mask is set."""
    pointers = aligned(pointer, row_start, column, VECTOR)
    tl.store(pointers, rounded(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def columns_from(start, row_length, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr):
    """Column numbers and which of them exist, ``[1, BLOCK_N]``; whole vectors do or do not."""
    column = start + tl.arange(0, BLOCK_N)[None, :]
    return column, tl.max_constancy(column < row_length, (1, VECTOR))


@triton.jit
def rows_of(tile, rows, BLOCK_M: tl.constexpr):
    """Row numbers ``[BLOCK_M]`` in int64, and which of them exist; of a tile of one row it does."""
    row = tl.full([BLOCK_M], tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = tl.full([1], True, tl.int1) if BLOCK_M == 1 else row < rows
    return row, exists


@triton.jit
def load_parameter(pointer, column, mask, VECTOR: tl.constexpr):
    """Weight or bias as a row ``[1, BLOCK_N]``, so that it comes in the layout of a tile's rows."""
    return load_tile(pointer, tl.zeros([1], tl.int64), column, mask, VECTOR)


@triton.jit
def dropout_from(
    x, seed, row, begin, threshold, scale, VECTOR: tl.constexpr, COUNTS: tl.constexpr
):  # fmt: skip
    """``common.dropout`` of a tile whose columns begin at ``begin``, for loops over tiles.

    Given column numbers, a loop keeps each of a thread's in a register: 15 of 128 where it has 16
    elements, for which others may be spilled. With COUNTS only every fourth is a number, and within
    the loop the other three are counted on from its sum with the row's key; in vectors shorter than
    that the four would lie in different threads.
    """
    BLOCK_N: tl.constexpr = x.shape[1]
    first, second = row_key(seed, row)
    if VECTOR < 4 or not COUNTS:
        position = begin + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
        position = position.to(tl.uint32) + first[:, None]  # [BLOCK_M, BLOCK_N]
    else:
        position = begin + 4 * tl.arange(0, BLOCK_N // 4)[None, :]
        position = position.to(tl.uint32) + first[:, None]
        position = tl.interleave(position, position + 2)  # 0 2
        position = tl.interleave(position, position + 1)  # 0 1 2 3
    bits = random_bits(0, second[:, None], position)
    return tl.where(bits >= threshold.to(tl.uint32), x * scale, 0.0)
