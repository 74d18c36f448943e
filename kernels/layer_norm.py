r"""LayerNorm and RMSNorm, plain or with dropout and a residual in front (AddNorm).

Forward, for every row of ``N`` elements::

    x      = residual + dropout(input)              (x = input without a residual)
    mean   = E[x]                                   (RMSNorm: 0)
    rstd   = 1 / sqrt(E[(x - mean)^2] + eps)
    output = (x - mean) * rstd * weight + bias

Backward, with ``n = (x - mean) * rstd`` and ``g = grad_output * weight``::

    grad_x      = rstd * (g - E[g] - n * E[g * n]) + grad_new_residual    (RMSNorm: without E[g])
    grad_input  = dropout(grad_x)
    grad_weight = sum over rows of grad_output * n
    grad_bias   = sum over rows of grad_output

Why fuse. A row is touched a dozen times by that arithmetic, but it need cross the memory bus once:
some 10 instructions an element forward and 25 backward, where an H200 could issue 27 and 40 (132
SMs * 128 lanes * 1.7 GHz) in the time its memory takes to deliver bf16 elements and take the
result. So the time is the traffic, and everything below serves to touch memory once, in 16-byte
accesses, with enough of them under way: 4.3 TB/s * 0.75 us of latency / 132 SMs = 25 KB in flight
on every SM.

Least traffic and time for 8192 rows of 4096 in bf16, at the datasheet's 4.8 TB/s (at the 4.3 TB/s a
copy attains)::

    forward                   read x, write output                          134 MB   28 us (31)
    forward with residual     read two, write output and new_residual       268 MB   56 us (62)
    backward                  read x and grad_output, write grad_x          201 MB   42 us (47)
    backward with residual    read grad_new_residual too                    268 MB   56 us (62)

Four kernels do this, by the direction and by whether a row fits the registers of one program. What
does not fit is *split*: statistics in a first sweep over the row, the result in a second, which
finds most of the row in L2 still. No atomics anywhere, and the shape of a tile depends on the row
length and dtypes alone: results are bitwise reproducible, and a row's do not depend on the rows
around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    aligned,
    ceil_div,
    device_of,
    dropout,
    kernel,
    next_power_of_2,
    on_device,
    rounded,
    row_offsets,
    row_strides,
    shared_memory_limit,
    sum_pair,
    vector_width,
)

# --- launch configurations -----------------------------------------------------------------------


#: Rows up to so many bytes stay in registers forward: 16 or 32 elements a thread for 1024 threads
#: of 64 registers, the most an SM has for one program.
FORWARD_LIMIT = 65536

#: Rows up to so many elements do backward: 16 a thread for 512 threads of 128 registers, where x,
#: grad_output, the weight and two sums for each leave no room for 32.
BACKWARD_LIMIT = 8192

#: Longer rows share a read and write of the partial rows among so many of them at most.
GROUP = 4


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


@cache
def forward_launch(row_length: int, element_size: int, limit: int) -> Launch:
    """``element_size`` is the wider of input and new residual in bytes."""
    block_n = max(8, next_power_of_2(row_length))
    row_bytes = block_n * element_size
    if row_length * element_size > limit:
        # 16 elements a thread with two statistics each: 80 registers and three programs an SM, two
        # with a residual, one where it is of another dtype; each fetches two tiles ahead.
        return Launch(1, min(limit // element_size, 4096), 8, split=True, num_stages=3)
    if row_bytes < 512:
        # Not a vector for every lane: 32 bytes a thread in rows side by side.
        return Launch(4096 // row_bytes, block_n, 4)
    if row_bytes <= 2048:
        # A warp to itself needs neither shared memory nor barriers. An SM takes 32 programs, so 64
        # bytes a thread are 64 KB under way.
        return Launch(2048 // row_bytes, block_n, 1)
    # 16 elements a thread, 40 to 64 registers: 1024 threads or more an SM and 32 KB under way. From
    # 16 warps on the compiler would rather spill than give up a third program, if it were let.
    num_warps = min(32, block_n // 512)
    return Launch(1, block_n, num_warps, registers=64 if num_warps >= 16 else None)


@cache
def backward_launch(row_length: int, stream_bytes: int, architecture: int, limit: int) -> Launch:
    """``stream_bytes`` is what is read for one element of a row."""
    block_n = max(8, next_power_of_2(row_length))
    split = row_length > limit
    # A program lives as long as the grid, so all of them must fit the SM at once: threads *
    # registers * programs <= 65536. 8 elements a thread while that fills the SM with warps; 16 from
    # 4096 on, where 8 or 16 warps share one row and every tile costs two barriers.
    if split:
        block_n, num_warps, registers, programs = min(limit, 4096), 16, None, 1
    elif block_n <= 256:
        num_warps, registers, programs = 4, None, 4
    elif block_n <= 2048:
        # On Blackwell 80 registers are too few, by the same compiler.
        num_warps, registers, programs = (8, 80, 3) if architecture < 100 else (8, 128, 2)
    elif block_n <= 4096 and architecture < 100:
        num_warps, registers, programs = 8, 128, 2
    else:
        num_warps, registers, programs = 16, None, 1  # 512 threads: 128 registers at most anyhow
    block_m = 1 if split else max(1, 256 * num_warps // block_n)
    # Two tiles ahead keep 16 to 64 KB under way on an SM all the time; chips with less shared
    # memory (fp32 rows of 8192 with a residual on an A100) go with one or none.
    tiles = (shared_memory_limit(architecture) // programs - 4096) // (
        block_m * block_n * stream_bytes
    )
    num_stages = max(1, min(3, 1 + tiles))
    return Launch(block_m, block_n, num_warps, registers, split, num_stages, programs)


# --- kernels -------------------------------------------------------------------------------------

# A kernel's argument list set one name to a line would be longer than the kernel. The two kernels
# of a direction share theirs, so that the launcher calls either.
# fmt: off

#: Partial rows are fp32 and begin on 128 bytes.
PARTIAL_VECTOR = tl.constexpr(4)


@triton.jit
def _load(pointer, row_start, column, mask, VECTOR: tl.constexpr, LAST: tl.constexpr = False):
    """A tile of rows that begin at ``row_start`` in fp32; 0 where masked. LAST: the last read."""
    pointers = aligned(pointer, row_start, column, VECTOR)
    policy: tl.constexpr = "evict_first" if LAST else ""
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy=policy).to(tl.float32)


@triton.jit
def _store(pointer, row_start, column, x, mask, VECTOR: tl.constexpr):
    pointers = aligned(pointer, row_start, column, VECTOR)
    tl.store(pointers, rounded(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _columns(start, row_length, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr):
    """Column numbers and which of them exist, ``[1, BLOCK_N]``; whole vectors do or do not."""
    column = start + tl.arange(0, BLOCK_N)[None, :]
    return column, tl.max_constancy(column < row_length, (1, VECTOR))


@triton.jit
def _rows(tile, rows, BLOCK_M: tl.constexpr):
    """Row numbers ``[BLOCK_M]`` in int64, and which of them exist; of a tile of one row it does."""
    row = tl.full([BLOCK_M], tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = tl.full([1], True, tl.int1) if BLOCK_M == 1 else row < rows
    return row, exists


@triton.jit
def _parameter(pointer, column, mask, VECTOR: tl.constexpr):
    """Weight or bias as a row ``[1, BLOCK_N]``, so that it comes in the layout of a tile's rows."""
    return _load(pointer, tl.zeros([1], tl.int64), column, mask, VECTOR)


@triton.jit
def _form_x(
    input, residual, seed, new_residual, input_start, residual_start, new_start, row, column,
    mask, threshold, scale, VECTOR: tl.constexpr,
):
    """The tile to normalise in fp32: with a residual, rounded as ``new_residual`` stores it."""
    x = _load(input, input_start, column, mask, VECTOR)
    if residual is not None:
        stream = _load(residual, residual_start, column, mask, VECTOR)
        if seed is not None:
            x = dropout(x, seed, row, column, threshold, scale)
        x = rounded(stream + x, new_residual.dtype.element_ty)
        tl.store(aligned(new_residual, new_start, column, VECTOR), x, mask=mask)
        x = x.to(tl.float32)
    return x


@triton.jit
def _reciprocal_root(x):
    """``1 / sqrt(x)``; the hardware's takes what is below 1.2e-38 (eps of 0, tiny rows) for 0."""
    tiny = x < 1e-30
    return tl.rsqrt(tl.where(tiny, x * 2.0**64, x)) * tl.where(tiny, 2.0**32, 1.0)


@triton.jit
def _write_output(
    output, weight, bias, x, mean, rstd, start, column, column_mask, mask, VECTOR: tl.constexpr
):
    y = (x - mean[:, None]) * rstd[:, None]
    if weight is not None:
        y *= _parameter(weight, column, column_mask, VECTOR)
    if bias is not None:
        y += _parameter(bias, column, column_mask, VECTOR)
    _store(output, start, column, y, mask, VECTOR)


@kernel
def forward_kernel(
    input, residual, weight, bias, seed, output, new_residual, mean, rstd, input_inner,
    input_outer_stride, input_stride, residual_inner, residual_outer_stride, residual_stride,
    rows, row_length, eps, threshold, scale, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):
    """Rows that fit: ``[BLOCK_M, BLOCK_N]`` of them in registers from their one read to the write.

    Moves each tensor once: ``rows * row_length * (read + written bytes of an element)``. Weight and
    bias come from L1 or L2 for every program; two reductions over the row, within a warp up to 2 KB
    of it and through shared memory beyond.
    """
    if seed is not None:
        seed = tl.load(seed)
    row, row_exists = _rows(tl.program_id(0), rows, BLOCK_M)
    column, column_exists = _columns(0, row_length, VECTOR, BLOCK_N)
    mask = row_exists[:, None] & column_exists  # [BLOCK_M, BLOCK_N]
    x = _form_x(
        input, residual, seed, new_residual,
        row_offsets(row, input_inner, input_outer_stride, input_stride),
        row_offsets(row, residual_inner, residual_outer_stride, residual_stride),
        row * row_length, row, column, mask, threshold, scale, VECTOR,
    )
    # With the row at hand the variance is taken around the mean proper: E[x^2] - E[x]^2 would lose
    # all digits to mean >> std. What is masked is 0, and must not count as 0 - mean.
    length = row_length.to(tl.float32)
    average = tl.zeros([BLOCK_M], tl.float32)
    centred = x  # [BLOCK_M, BLOCK_N]
    if mean is not None:
        average = tl.div_rn(tl.sum(x, 1), length)
        centred = tl.where(column_exists, x - average[:, None], 0.0)
        tl.store(mean + row, average, mask=row_exists)
    scaling = _reciprocal_root(tl.sum(centred * centred, 1) / length + eps)
    tl.store(rstd + row, scaling, mask=row_exists)
    _write_output(
        output, weight, bias, x, average, scaling, row * row_length, column, column_exists, mask,
        VECTOR,
    )


@kernel
def forward_split_kernel(
    input, residual, weight, bias, seed, output, new_residual, mean, rstd, input_inner,
    input_outer_stride, input_stride, residual_inner, residual_outer_stride, residual_stride,
    rows, row_length, eps, threshold, scale, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):
    """A longer row in two sweeps over tiles ``[1, BLOCK_N]``.

    The first keeps Welford's mean and sum of squares for each lane of the tile by itself, so that
    no lane waits for another, and merges the lanes once at the end (Chan et al. 1979). The second
    begins where the first ended: those tiles are the likeliest to lie in L2. Nothing reads them
    thereafter, so they are marked to leave first and keep the beginning of the row in. With three
    programs on each of 132 SMs, bf16 rows of 65536 are 52 MB, about what L2 holds: no longer rows,
    one and a half to two times the forward's floor.
    """
    if seed is not None:
        seed = tl.load(seed)
    row, _ = _rows(tl.program_id(0), rows, BLOCK_M)
    input_start = row_offsets(row, input_inner, input_outer_stride, input_stride)
    residual_start = row_offsets(row, residual_inner, residual_outer_stride, residual_stride)
    start = row * row_length
    tiles = tl.cdiv(row_length, BLOCK_N)

    lane_mean = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lane_squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in tl.range(0, tiles, num_stages=NUM_STAGES):
        column, mask = _columns(tile * BLOCK_N, row_length, VECTOR, BLOCK_N)
        x = _form_x(
            input, residual, seed, new_residual, input_start, residual_start, start, row, column,
            mask, threshold, scale, VECTOR,
        )
        if mean is None:
            lane_squares += x * x
        else:
            delta = tl.where(mask, x - lane_mean, 0.0)
            lane_mean += delta * (1.0 / tl.full([1, 1], tile + 1, tl.float32))
            lane_squares += delta * (x - lane_mean)

    length = row_length.to(tl.float32)
    average = tl.zeros([BLOCK_M], tl.float32)
    if mean is not None:
        lane = tl.arange(0, BLOCK_N)[None, :]
        count = ((row_length - lane + (BLOCK_N - 1)) // BLOCK_N).to(tl.float32)  # [1, BLOCK_N]
        average = tl.div_rn(tl.sum(lane_mean * count, 1), length)
        distance = lane_mean - average[:, None]
        lane_squares += distance * distance * count
        tl.store(mean + row, average)
    scaling = _reciprocal_root(tl.sum(lane_squares, 1) / length + eps)
    tl.store(rstd + row, scaling)

    tl.debug_barrier()  # other threads' new_residual is read below
    for tile in tl.range(0, tiles, num_stages=NUM_STAGES):
        column, mask = _columns((tiles - 1 - tile) * BLOCK_N, row_length, VECTOR, BLOCK_N)
        if residual is None:
            x = _load(input, input_start, column, mask, VECTOR, True)
        else:
            x = _load(new_residual, start, column, mask, VECTOR, True)
        _write_output(output, weight, bias, x, average, scaling, start, column, mask, mask, VECTOR)


@triton.jit
def _gradient(
    grad_output, x, mean, rstd, grad_start, x_start, row, row_exists, column, mask,
    NEEDS_X: tl.constexpr, VECTOR: tl.constexpr, LAST: tl.constexpr = False,
):
    """grad_output and the normalised x (0 where only grad_bias is asked for), with rstd ``[M]``."""
    grad = _load(grad_output, grad_start, column, mask, VECTOR, LAST)
    scaling = tl.load(rstd + row, mask=row_exists, other=0.0)
    normalised = tl.zeros_like(grad)
    if NEEDS_X:
        normalised = _load(x, x_start, column, mask, VECTOR, LAST)
        if mean is not None:
            normalised -= tl.load(mean + row, mask=row_exists, other=0.0)[:, None]
        normalised *= scaling[:, None]
    return grad, normalised, scaling


@triton.jit
def _write_gradients(
    grad_x, grad_input, grad_new_residual, seed, scaled, normalised, scaling, slope, offset,
    residual_start, start, row, column, mask, threshold, scale, VECTOR: tl.constexpr,
    LAST: tl.constexpr = False,
):
    """``rstd * (g - offset - n * slope) + grad_new_residual``, and the dropout of that."""
    gradient = scaled
    if offset is not None:
        gradient -= offset[:, None]
    gradient = (gradient - normalised * slope[:, None]) * scaling[:, None]
    if grad_new_residual is not None:
        gradient += _load(grad_new_residual, residual_start, column, mask, VECTOR, LAST)
    if grad_x is not None:
        _store(grad_x, start, column, gradient, mask, VECTOR)
    if grad_input is not None:
        if seed is not None:
            gradient = dropout(gradient, seed, row, column, threshold, scale)
        _store(grad_input, start, column, gradient, mask, VECTOR)


@kernel
def backward_kernel(
    grad_output, grad_new_residual, x, weight, mean, rstd, seed, grad_x, grad_input, scratch,
    grad_inner, grad_outer_stride, grad_stride, residual_inner, residual_outer_stride,
    residual_stride, x_inner, x_outer_stride, x_stride, rows, row_length, pitch, threshold,
    scale, group, GRAD_WEIGHT: tl.constexpr, GRAD_BIAS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):
    """Rows that fit: each program goes through tiles ``[BLOCK_M, BLOCK_N]`` of them.

    In registers it keeps the weight, and the sums for grad_weight and grad_bias.

    The sums stay as large as the tile until the end, so that in the loop threads exchange nothing
    but the two sums over a row; while they do, the loads of the next tiles are under way. Moves
    each tensor once, and ``16 * programs * row_length`` bytes of partial rows through L2 (2 to 8
    MB).
    """
    GRAD: tl.constexpr = grad_x is not None or grad_input is not None
    if seed is not None:
        seed = tl.load(seed)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    column, column_exists = _columns(0, row_length, VECTOR, BLOCK_N)
    inverse_length = 1.0 / row_length.to(tl.float32)
    if GRAD and weight is not None:
        gamma = _parameter(weight, column, column_exists, VECTOR)
    weight_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for tile in tl.range(program, tl.cdiv(rows, BLOCK_M), programs, num_stages=NUM_STAGES):
        row, row_exists = _rows(tile, rows, BLOCK_M)
        mask = row_exists[:, None] & column_exists
        grad, normalised, scaling = _gradient(
            grad_output, x, mean, rstd,
            row_offsets(row, grad_inner, grad_outer_stride, grad_stride),
            row_offsets(row, x_inner, x_outer_stride, x_stride), row, row_exists, column, mask,
            GRAD or GRAD_WEIGHT, VECTOR,
        )
        if GRAD_WEIGHT:
            weight_sum += grad * normalised
        if GRAD_BIAS:
            bias_sum += grad
        if GRAD:
            if weight is not None:
                grad *= gamma
            if mean is None:
                slope, offset = tl.sum(grad * normalised, 1), None
            else:
                slope, offset = sum_pair(grad * normalised, grad, 1)
                offset *= inverse_length
            slope *= inverse_length
            _write_gradients(
                grad_x, grad_input, grad_new_residual, seed, grad, normalised, scaling, slope,
                offset, row_offsets(row, residual_inner, residual_outer_stride, residual_stride),
                row * row_length, row, column, mask, threshold, scale, VECTOR,
            )

    partial_row = tl.full([1], pitch, tl.int64) * program
    if GRAD_WEIGHT:
        total = tl.sum(weight_sum, 0)[None, :]
        _store(scratch, partial_row, column, total, column_exists, PARTIAL_VECTOR)
        partial_row += tl.full([1], pitch, tl.int64) * programs
    if GRAD_BIAS:
        total = tl.sum(bias_sum, 0)[None, :]
        _store(scratch, partial_row, column, total, column_exists, PARTIAL_VECTOR)


@kernel
def backward_split_kernel(
    grad_output, grad_new_residual, x, weight, mean, rstd, seed, grad_x, grad_input, scratch,
    grad_inner, grad_outer_stride, grad_stride, residual_inner, residual_outer_stride,
    residual_stride, x_inner, x_outer_stride, x_stride, rows, row_length, pitch, threshold,
    scale, group, GRAD_WEIGHT: tl.constexpr, GRAD_BIAS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):
    """Longer rows, ``group`` of them at a time, in tiles ``[1, BLOCK_N]`` and two sweeps.

    The first sweep goes along each row for its two sums, the second across the rows of the group,
    tile by tile from the end, for the results. The sums for grad_weight and grad_bias are too long
    for registers: they lie in the program's partial rows, which a group reads and writes once: 16
    bytes an element shared by ``group`` rows. So L2 delivers or takes ``10 + 16 / group`` bytes an
    element of bf16, and for a group of 4 that, not DRAM, sets the time: some 1.8 times the floor.
    Larger groups would not find their rows in L2 again. Behind the partial rows lie the sums over
    each row.
    """
    GRAD: tl.constexpr = grad_x is not None or grad_input is not None
    if seed is not None:
        seed = tl.load(seed)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    inverse_length = 1.0 / row_length.to(tl.float32)
    weight_row = tl.full([1], pitch, tl.int64) * program
    partial_rows = tl.full([1], pitch, tl.int64) * programs
    bias_row = weight_row
    if GRAD_WEIGHT:
        bias_row += partial_rows
    tiles = tl.cdiv(row_length, BLOCK_N)
    if GRAD:
        sums = scratch + (GRAD_WEIGHT + GRAD_BIAS) * partial_rows + 2 * group * program

    for first in range(program * group, rows, programs * group):
        last = tl.minimum(first + group, rows)
        if GRAD:
            for number in range(first, last):
                row, row_exists = _rows(number, rows, BLOCK_M)
                grad_start = row_offsets(row, grad_inner, grad_outer_stride, grad_stride)
                x_start = row_offsets(row, x_inner, x_outer_stride, x_stride)
                slopes = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                offsets = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for begin in tl.range(0, row_length, BLOCK_N, num_stages=NUM_STAGES):
                    column, mask = _columns(begin, row_length, VECTOR, BLOCK_N)
                    grad, normalised, _ = _gradient(
                        grad_output, x, mean, rstd, grad_start, x_start, row, row_exists, column,
                        mask, True, VECTOR,
                    )
                    if weight is not None:
                        grad *= _parameter(weight, column, mask, VECTOR)
                    slopes += grad * normalised
                    if mean is not None:
                        offsets += grad
                if mean is None:
                    slope = tl.sum(slopes, 1)
                else:
                    slope, offset = sum_pair(slopes, offsets, 1)
                    tl.store(sums + (number - first + group), offset * inverse_length)
                tl.store(sums + (number - first), slope * inverse_length)

        tl.debug_barrier()  # what one thread stored of a row's sums, all read below
        for tile in range(0, tiles):
            column, mask = _columns((tiles - 1 - tile) * BLOCK_N, row_length, VECTOR, BLOCK_N)
            seen = mask & (first >= programs * group)
            if GRAD and weight is not None:
                gamma = _parameter(weight, column, mask, VECTOR)
            if GRAD_WEIGHT:
                weight_sum = _load(scratch, weight_row, column, seen, PARTIAL_VECTOR)
            if GRAD_BIAS:
                bias_sum = _load(scratch, bias_row, column, seen, PARTIAL_VECTOR)
            for number in range(first, last):
                row, row_exists = _rows(number, rows, BLOCK_M)
                grad, normalised, scaling = _gradient(
                    grad_output, x, mean, rstd,
                    row_offsets(row, grad_inner, grad_outer_stride, grad_stride),
                    row_offsets(row, x_inner, x_outer_stride, x_stride), row, row_exists, column,
                    mask, GRAD or GRAD_WEIGHT, VECTOR, True,
                )
                if GRAD_WEIGHT:
                    weight_sum += grad * normalised
                if GRAD_BIAS:
                    bias_sum += grad
                if GRAD:
                    if weight is not None:
                        grad *= gamma
                    _write_gradients(
                        grad_x, grad_input, grad_new_residual, seed, grad, normalised, scaling,
                        tl.load(sums + (number - first)),
                        tl.load(sums + (number - first + group)) if mean is not None else None,
                        row_offsets(row, residual_inner, residual_outer_stride, residual_stride),
                        row * row_length, row, column, mask, threshold, scale, VECTOR,
                        True,
                    )
            if GRAD_WEIGHT:
                _store(scratch, weight_row, column, weight_sum, mask, PARTIAL_VECTOR)
            if GRAD_BIAS:
                _store(scratch, bias_row, column, bias_sum, mask, PARTIAL_VECTOR)


@kernel
def finalise_kernel(
    partials, grad_weight, grad_bias, programs, row_length, pitch, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums the partial rows in their order, of grad_weight or (second grid axis) grad_bias.

    Reads ``4 * programs * row_length`` bytes each, 1.1 MB for 264 programs and rows of 1024, which
    lie in L2: about a microsecond, besides the launch. ``BLOCK_N`` = 32 columns are one 128-byte
    line, and make enough programs for rows of a few hundred; 64 rows at once are 16 loads a thread
    under way.
    """
    column, column_exists = _columns(tl.program_id(0) * BLOCK_N, row_length, 1, BLOCK_N)
    first = tl.program_id(1) * programs
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for begin in range(0, programs, BLOCK_P):
        program = begin + tl.arange(0, BLOCK_P)
        mask = (program < programs)[:, None] & column_exists
        start = (first + program).to(tl.int64) * pitch
        total += _load(partials, start, column, mask, PARTIAL_VECTOR)
    total = tl.sum(total, 0)[None, :]
    if grad_weight is not None and tl.program_id(1) == 0:
        _store(grad_weight, tl.zeros([1], tl.int64), column, total, column_exists, 1)
    if grad_bias is not None and tl.program_id(1) == tl.num_programs(1) - 1:
        _store(grad_bias, tl.zeros([1], tl.int64), column, total, column_exists, 1)


# fmt: on

# --- launchers -----------------------------------------------------------------------------------


def _wanted(output: Tensor) -> Tensor | None:
    return output if output.numel() else None


def forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    new_residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    row_length: int,
    eps: float,
    rms: bool,
    threshold: int,
    scale: float,
) -> None:
    """Fills ``output``, ``new_residual``, ``mean`` and ``rstd``; an empty one is not written.

    Args:
        input, residual: contiguous, or views ``[outer, inner, row_length]`` of contiguous rows.
        weight, bias: contiguous ``[row_length]``, or None.
        seed: ``int64 [1]`` on the device, or None: no dropout.
        threshold: the input is dropped where its random bits are below, times ``scale`` elsewhere.
    """
    input_strides = row_strides(input, row_length)
    residual_strides = row_strides(residual, row_length)
    rows = rstd.numel()
    size = max(input.element_size(), 0 if residual is None else new_residual.element_size())
    launch = forward_launch(row_length, size, FORWARD_LIMIT)
    run = forward_split_kernel if launch.split else forward_kernel
    stored = None if residual is None else new_residual
    strides = (input_strides, residual_strides)
    vector = vector_width(row_length, strides, input, residual, weight, bias, output, stored)
    with on_device(input):
        run[(ceil_div(rows, launch.block_m),)](
            input,
            residual,
            weight,
            bias,
            seed,
            output,
            stored,
            None if rms else mean,
            rstd,
            *input_strides,
            *residual_strides,
            rows,
            row_length,
            eps,
            threshold,
            scale,
            VECTOR=vector,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            NUM_STAGES=launch.num_stages,
            num_warps=launch.num_warps,
            maxnreg=launch.registers,
        )


def backward(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    grad_x: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    row_length: int,
    threshold: int,
    scale: float,
) -> None:
    """Fills the gradients that are not empty; arguments as :func:`forward`'s."""
    wanted_x, wanted_input = _wanted(grad_x), _wanted(grad_input)
    wanted_weight, wanted_bias = _wanted(grad_weight), _wanted(grad_bias)
    sums = (wanted_weight is not None) + (wanted_bias is not None)
    if not sums and wanted_x is None and wanted_input is None:
        return
    strides = (
        row_strides(grad_output, row_length),
        row_strides(grad_new_residual, row_length),
        row_strides(x, row_length),
    )
    rows = rstd.numel()
    device = device_of(x)
    streams = grad_output.element_size() + x.element_size()
    if grad_new_residual is not None:
        streams += grad_new_residual.element_size()
    launch = backward_launch(row_length, streams, device.architecture, BACKWARD_LIMIT)
    resident = device.multiprocessors * launch.programs
    programs = min(ceil_div(rows, launch.block_m), resident)
    group = min(GROUP, ceil_div(rows, programs)) if launch.split else 0
    pitch = ceil_div(row_length, 32) * 32
    # The programs' partial rows, then two sums for every row of a program's group.
    scratch = None
    if sums or launch.split:
        size = programs * (sums * pitch + 2 * group)
        scratch = torch.empty(size, dtype=torch.float32, device=x.device)
    tensors = (grad_output, grad_new_residual, x, weight, wanted_x, wanted_input)
    vector = vector_width(row_length, strides, *tensors)
    run = backward_split_kernel if launch.split else backward_kernel
    with on_device(x):
        run[(programs,)](
            grad_output,
            grad_new_residual,
            x,
            weight,
            _wanted(mean),
            rstd,
            seed,
            wanted_x,
            wanted_input,
            scratch,
            *strides[0],
            *strides[1],
            *strides[2],
            rows,
            row_length,
            pitch,
            threshold,
            scale,
            group,
            GRAD_WEIGHT=wanted_weight is not None,
            GRAD_BIAS=wanted_bias is not None,
            VECTOR=vector,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            NUM_STAGES=launch.num_stages,
            num_warps=launch.num_warps,
            maxnreg=launch.registers,
        )
        if sums:
            finalise_kernel[(ceil_div(row_length, 32), sums)](
                scratch,
                wanted_weight,
                wanted_bias,
                programs,
                row_length,
                pitch,
                BLOCK_P=64,
                BLOCK_N=32,
                num_warps=4,
            )
