"""LayerNorm and RMSNorm, plain or with dropout and a residual in front (AddNorm): backward.

With the forward's ``x``, ``mean`` and ``rstd``, ``n = (x - mean) * rstd`` and
``g = grad_output * weight``::

    grad_x      = rstd * (g - E[g] - n * E[g * n]) + grad_new_residual    (RMSNorm: without E[g])
    grad_input  = dropout(grad_x)
    grad_weight = sum over rows of grad_output * n
    grad_bias   = sum over rows of grad_output

Sums over a row and sums over rows meet here. A program takes rows by turns with the others and adds
up its own in registers; these partial rows a third kernel sums up in their order. What is moved,
and why that is all that counts, is told in ``layer_norm.py``.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    ceil_div,
    device_of,
    kernel,
    next_power_of_2,
    on_device,
    row_offsets,
    row_strides,
    shared_memory_limit,
    sum_pair,
    vector_width,
)
from .layer_norm_tiles import (
    Launch,
    columns_from,
    dropout_from,
    load_parameter,
    load_tile,
    rows_of,
    store_tile,
)

# --- launch configurations -----------------------------------------------------------------------

#: Rows up to so many elements do backward: 16 a thread for 512 threads of 128 registers, where x,
#: grad_output, the weight and two sums for each leave no room for 32.
BACKWARD_LIMIT = 8192

#: Longer rows share a read and write of the partial rows among so many of them at most.
GROUP = 4

#: Partial rows are fp32 and begin on 128 bytes.
PARTIAL_VECTOR = tl.constexpr(4)


@cache
def backward_launch(
    row_length: int, stream_bytes: int, architecture: int, limit: int, weight_bytes: int = 0
) -> Launch:
    """``stream_bytes`` is what is read for one element of a row, ``weight_bytes`` for one of the
    weight where there is one and a residual."""
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
    # Of rows of 8192 in 16 bits Blackwell's compiler would spill in the loop: the weight comes anew
    # for every tile, from L2 and ahead of its use as the rows do. In fp32 there is no room for
    # that, nor need.
    keeps_weight = not weight_bytes or architecture < 100 or block_n <= 4096 or stream_bytes >= 12
    if not keeps_weight:
        stream_bytes += weight_bytes
    counts = split == (architecture < 100)  # where it takes away local accesses, and adds none
    block_m = 1 if split else max(1, 256 * num_warps // block_n)
    # Two tiles ahead keep 16 to 64 KB under way on an SM all the time; chips with less shared
    # memory (fp32 rows of 8192 with a residual on an A100) go with one or none.
    tiles = (shared_memory_limit(architecture) // programs - 4096) // (
        block_m * block_n * stream_bytes
    )
    num_stages = max(1, min(3, 1 + tiles))
    return Launch(
        block_m, block_n, num_warps, registers, split, num_stages, programs, keeps_weight, counts
    )


# --- kernels -------------------------------------------------------------------------------------

# An argument list set one name to a line would be longer than its kernel. Both kernels share
# theirs, so that the launcher calls either.
# fmt: off


@triton.jit
def _gradient(
    grad_output, x, mean, rstd, grad_start, x_start, row, row_exists, column, mask,
    NEEDS_X: tl.constexpr, VECTOR: tl.constexpr, LAST: tl.constexpr = False,
):
    """grad_output and the normalised x (0 where only grad_bias is asked for), with rstd ``[M]``."""
    grad = load_tile(grad_output, grad_start, column, mask, VECTOR, LAST)
    scaling = tl.load(rstd + row, mask=row_exists, other=0.0)
    normalised = tl.zeros_like(grad)
    if NEEDS_X:
        normalised = load_tile(x, x_start, column, mask, VECTOR, LAST)
        if mean is not None:
            normalised -= tl.load(mean + row, mask=row_exists, other=0.0)[:, None]
        normalised *= scaling[:, None]
    return grad, normalised, scaling


@triton.jit
def _write_gradients(
    grad_x, grad_input, grad_new_residual, seed, scaled, normalised, scaling, slope, offset,
    residual_start, start, row, begin, column, mask, threshold, scale, VECTOR: tl.constexpr,
    COUNTS: tl.constexpr, LAST: tl.constexpr = False,
):
    """``rstd * (g - offset - n * slope) + grad_new_residual``, and the dropout of that."""
    gradient = scaled
    if offset is not None:
        gradient -= offset[:, None]
    gradient = (gradient - normalised * slope[:, None]) * scaling[:, None]
    if grad_new_residual is not None:
        gradient += load_tile(grad_new_residual, residual_start, column, mask, VECTOR, LAST)
    if grad_x is not None:
        store_tile(grad_x, start, column, gradient, mask, VECTOR)
    if grad_input is not None:
        if seed is not None:
            gradient = dropout_from(gradient, seed, row, begin, threshold, scale, VECTOR, COUNTS)
        store_tile(grad_input, start, column, gradient, mask, VECTOR)


@kernel
def backward_kernel(
    grad_output, grad_new_residual, x, weight, mean, rstd, seed, grad_x, grad_input, scratch,
    grad_inner, grad_outer_stride, grad_stride, residual_inner, residual_outer_stride,
    residual_stride, x_inner, x_outer_stride, x_stride, rows, row_length, pitch, threshold,
    scale, group, inverse_length, GRAD_WEIGHT: tl.constexpr, GRAD_BIAS: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
    KEEPS_WEIGHT: tl.constexpr, COUNTS: tl.constexpr,
):
    """Rows that fit: each program goes through tiles ``[BLOCK_M, BLOCK_N]`` of them.

    In registers it keeps the sums for grad_weight and grad_bias, and with KEEPS_WEIGHT the weight.

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
    column, column_exists = columns_from(0, row_length, VECTOR, BLOCK_N)
    if GRAD and weight is not None and KEEPS_WEIGHT:
        gamma = load_parameter(weight, column, column_exists, VECTOR)
    weight_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for tile in tl.range(program, tl.cdiv(rows, BLOCK_M), programs, num_stages=NUM_STAGES):
        row, row_exists = rows_of(tile, rows, BLOCK_M)
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
                if KEEPS_WEIGHT:
                    grad *= gamma
                else:
                    grad *= load_parameter(weight, column, column_exists, VECTOR)
            if mean is None:
                slope, offset = tl.sum(grad * normalised, 1), None
            else:
                slope, offset = sum_pair(grad * normalised, grad, 1)
                offset *= inverse_length
            slope *= inverse_length
            _write_gradients(
                grad_x, grad_input, grad_new_residual, seed, grad, normalised, scaling, slope,
                offset, row_offsets(row, residual_inner, residual_outer_stride, residual_stride),
                row * row_length, row, 0, column, mask, threshold, scale, VECTOR, COUNTS,
            )

    partial_row = tl.full([1], pitch, tl.int64) * program
    if GRAD_WEIGHT:
        total = tl.sum(weight_sum, 0)[None, :]
        store_tile(scratch, partial_row, column, total, column_exists, PARTIAL_VECTOR)
        partial_row += tl.full([1], pitch, tl.int64) * programs
    if GRAD_BIAS:
        total = tl.sum(bias_sum, 0)[None, :]
        store_tile(scratch, partial_row, column, total, column_exists, PARTIAL_VECTOR)


@kernel
def backward_split_kernel(
    grad_output, grad_new_residual, x, weight, mean, rstd, seed, grad_x, grad_input, scratch,
    grad_inner, grad_outer_stride, grad_stride, residual_inner, residual_outer_stride,
    residual_stride, x_inner, x_outer_stride, x_stride, rows, row_length, pitch, threshold,
    scale, group, inverse_length, GRAD_WEIGHT: tl.constexpr, GRAD_BIAS: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
    KEEPS_WEIGHT: tl.constexpr, COUNTS: tl.constexpr,
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
                row, row_exists = rows_of(number, rows, BLOCK_M)
                grad_start = row_offsets(row, grad_inner, grad_outer_stride, grad_stride)
                x_start = row_offsets(row, x_inner, x_outer_stride, x_stride)
                slopes = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                offsets = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for begin in tl.range(0, row_length, BLOCK_N, num_stages=NUM_STAGES):
                    column, mask = columns_from(begin, row_length, VECTOR, BLOCK_N)
                    grad, normalised, _ = _gradient(
                        grad_output, x, mean, rstd, grad_start, x_start, row, row_exists, column,
                        mask, True, VECTOR,
                    )
                    if weight is not None:
                        grad *= load_parameter(weight, column, mask, VECTOR)
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
            begin = (tiles - 1 - tile) * BLOCK_N
            column, mask = columns_from(begin, row_length, VECTOR, BLOCK_N)
            seen = mask & (first >= programs * group)
            if GRAD and weight is not None:
                gamma = load_parameter(weight, column, mask, VECTOR)
            if GRAD_WEIGHT:
                weight_sum = load_tile(scratch, weight_row, column, seen, PARTIAL_VECTOR)
            if GRAD_BIAS:
                bias_sum = load_tile(scratch, bias_row, column, seen, PARTIAL_VECTOR)
            for number in range(first, last):
                row, row_exists = rows_of(number, rows, BLOCK_M)
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
                        row * row_length, row, begin, column, mask, threshold, scale, VECTOR,
                        COUNTS, True,
                    )
            if GRAD_WEIGHT:
                store_tile(scratch, weight_row, column, weight_sum, mask, PARTIAL_VECTOR)
            if GRAD_BIAS:
                store_tile(scratch, bias_row, column, bias_sum, mask, PARTIAL_VECTOR)


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
    column, column_exists = columns_from(tl.program_id(0) * BLOCK_N, row_length, 1, BLOCK_N)
    first = tl.program_id(1) * programs
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for begin in range(0, programs, BLOCK_P):
        program = begin + tl.arange(0, BLOCK_P)
        mask = (program < programs)[:, None] & column_exists
        start = (first + program).to(tl.int64) * pitch
        total += load_tile(partials, start, column, mask, PARTIAL_VECTOR)
    total = tl.sum(total, 0)[None, :]
    if grad_weight is not None and tl.program_id(1) == 0:
        store_tile(grad_weight, tl.zeros([1], tl.int64), column, total, column_exists, 1)
    if grad_bias is not None and tl.program_id(1) == tl.num_programs(1) - 1:
        store_tile(grad_bias, tl.zeros([1], tl.int64), column, total, column_exists, 1)


# fmt: on

# --- launcher ------------------------------------------------------------------------------------


def _wanted(output: Tensor) -> Tensor | None:
    return output if output.numel() else None


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
    weight_bytes = 0
    if weight is not None and grad_new_residual is not None:
        weight_bytes = weight.element_size()
    launch = backward_launch(row_length, streams, device.architecture, BACKWARD_LIMIT, weight_bytes)
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
            1.0 / row_length,  # a register less than the quotient, which the loop would hold
            GRAD_WEIGHT=wanted_weight is not None,
            GRAD_BIAS=wanted_bias is not None,
            VECTOR=vector,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            NUM_STAGES=launch.num_stages,
            KEEPS_WEIGHT=launch.keeps_weight,
            COUNTS=launch.counts,
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
