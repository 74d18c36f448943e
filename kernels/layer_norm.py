"""LayerNorm and RMSNorm, plain or with dropout and a residual in front (AddNorm): forward.

For every row of ``N`` elements::

    x      = residual + dropout(input)              (x = input without a residual)
    mean   = E[x]                                   (RMSNorm: 0)
    rstd   = 1 / sqrt(E[(x - mean)^2] + eps)
    output = (x - mean) * rstd * weight + bias

``layer_norm_backward.py`` has the gradients, ``layer_norm_tiles.py`` what both read and write by.

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

In each direction there are two kernels, one for rows that fit the registers of a program. What does
not fit is *split*: statistics in a first sweep over the row, the result in a second, which finds
most of the row in L2 still. No atomics anywhere, and the shape of a tile depends on the row length
and dtypes alone: results are bitwise reproducible, and a row's do not depend on the rows around it.
"""

from __future__ import annotations

from functools import cache

import triton
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
from .layer_norm_tiles import (
    Launch,
    columns_from,
    load_parameter,
    load_tile,
    rows_of,
    store_tile,
)

# --- launch configurations -----------------------------------------------------------------------

#: Rows up to so many bytes stay in registers forward: 16 or 32 elements a thread for 1024 threads
#: of 64 registers, the most an SM has for one program.
FORWARD_LIMIT = 65536


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


# --- kernels -------------------------------------------------------------------------------------

# An argument list set one name to a line would be longer than its kernel. Both kernels share
# theirs, so that the launcher calls either.
# fmt: off


@triton.jit
def _form_x(
    input, residual, seed, new_residual, input_start, residual_start, new_start, row, column,
    mask, threshold, scale, VECTOR: tl.constexpr,
):
    """The tile to normalise in fp32: with a residual, rounded as ``new_residual`` stores it."""
    x = load_tile(input, input_start, column, mask, VECTOR)
    if residual is not None:
        stream = load_tile(residual, residual_start, column, mask, VECTOR)
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
        y *= load_parameter(weight, column, column_mask, VECTOR)
    if bias is not None:
        y += load_parameter(bias, column, column_mask, VECTOR)
    store_tile(output, start, column, y, mask, VECTOR)


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
    row, row_exists = rows_of(tl.program_id(0), rows, BLOCK_M)
    column, column_exists = columns_from(0, row_length, VECTOR, BLOCK_N)
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
    row, _ = rows_of(tl.program_id(0), rows, BLOCK_M)
    input_start = row_offsets(row, input_inner, input_outer_stride, input_stride)
    residual_start = row_offsets(row, residual_inner, residual_outer_stride, residual_stride)
    start = row * row_length
    tiles = tl.cdiv(row_length, BLOCK_N)

    lane_mean = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lane_squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in tl.range(0, tiles, num_stages=NUM_STAGES):
        column, mask = columns_from(tile * BLOCK_N, row_length, VECTOR, BLOCK_N)
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
        column, mask = columns_from((tiles - 1 - tile) * BLOCK_N, row_length, VECTOR, BLOCK_N)
        if residual is None:
            x = load_tile(input, input_start, column, mask, VECTOR, True)
        else:
            x = load_tile(new_residual, start, column, mask, VECTOR, True)
        _write_output(output, weight, bias, x, average, scaling, start, column, mask, mask, VECTOR)


# fmt: on

# --- launcher ------------------------------------------------------------------------------------


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
