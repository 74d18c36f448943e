r"""Cross-entropy of class indices.

Forward, for every row of ``C`` logits with target ``t``::

    z    = x, or softcap * tanh(x / softcap)
    lse  = log(sum(exp(z))) = maximum + log_sum
    loss = w[t] * ((1 - s) * (lse - z[t]) + z_loss * lse^2) + s / C * sum(w * (lse - z))

Backward, with ``p = exp(z - lse)`` and a gradient ``g`` of the row's loss::

    grad_z = (g * w[t] * (1 - s + 2 * z_loss * lse) + g * s / C * sum(w) + grad_lse) * p
             - g * s / C * w - g * w[t] * (1 - s) * [c = t]
    grad_x = grad_z * (1 - (z / softcap)^2)

Least traffic and time for 8192 rows of 128256 in bf16 (2.1 GB of logits), at the datasheet's 4.8
TB/s (at the 4.3 TB/s a copy attains)::

    forward      read the logits                  2.1 GB    438 us (489)
    backward     read them, write the gradient    4.2 GB    876 us (977)

An exponential an element is all the arithmetic that counts: 132 SMs deliver 132 * 16 * 1.7e9 =
3.6e12 a second, memory 2.1e12 bf16 logits. So forward may take one exponential an element, not the
two of an online sum that every lane keeps for itself: the maximum of a tile is shared first, and
the sum so far rescaled once a tile.

Forward gives a row to one program, which loops over tiles of it; ignored rows are not read. The
backward has no sums at all, and its grid is tiles: rows times column blocks. No atomics; the shape
of a tile depends on the number of classes and the dtype alone, so results are bitwise reproducible
and a row's do not depend on the rows around it. A row whose target is out of range gets NaN, and
nothing is read or written out of bounds for it.
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
    kernel,
    next_power_of_2,
    on_device,
    random_bits,
    rounded,
    row_key,
    row_offsets,
    row_strides,
    vector_width,
)

# --- launch configurations -----------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut up. None of it depends on the number of rows."""

    block_m: int  # rows of a tile
    block_n: int  # and columns
    num_warps: int
    num_stages: int = 1  # one more than the tiles fetched ahead, through shared memory


@cache
def forward_launch(classes: int, element_size: int) -> Launch:
    """The launch of the forward."""
    block_n = max(8, next_power_of_2(classes))
    if block_n <= 4096:
        # The whole row at once, 16 elements a thread; below a warp's 512, rows side by side.
        block_m = max(1, 512 // block_n)
        return Launch(block_m, block_n, max(1, block_m * block_n // 512))
    # 32 bytes (bf16) or 64 (fp32) a thread and two tiles ahead: 48 or 96 KB of shared memory, so
    # that four or two programs an SM keep 64 KB under way.
    return Launch(1, 8192 if element_size == 2 else 4096, 8, num_stages=3)


@cache
def backward_launch(classes: int) -> Launch:
    """The launch of the backward: 8 elements a thread, so that SMs are full of warps."""
    block_n = min(2048, max(8, next_power_of_2(classes)))
    block_m = max(1, 256 // block_n)
    return Launch(block_m, block_n, max(1, block_m * block_n // 256))


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    """Below 0.6 by a polynomial (Chebyshev's fit), where 1 - 2 / (e^2x + 1) would lose digits."""
    square = x * x
    q = square * 0.0022692361 - 0.0083228936
    q = q * square + 0.0217623860
    q = q * square - 0.0539584421
    q = q * square + 0.1333329976
    q = q * square - 0.3333333433
    magnitude = tl.abs(x)
    tail = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.6, x + x * square * q, tl.where(x < 0, -tail, tail))


@triton.jit
def _rows(tile, rows, BLOCK_M: tl.constexpr):
    """Row numbers ``[BLOCK_M]`` in int64, and which of them exist."""
    row = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, row < rows


@triton.jit
def _columns(start, classes, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr):
    """Column numbers and which of them exist, ``[1, BLOCK_N]``; whole vectors do or do not."""
    column = start + tl.arange(0, BLOCK_N)[None, :]
    return column, tl.max_constancy(column < classes, (1, VECTOR))


@triton.jit
def _target(target, row, row_exists, classes, ignore_index):
    """The target, whether the row counts, and whether its target is a class."""
    t = tl.load(target + row, mask=row_exists, other=0)
    kept = row_exists & (t != ignore_index)
    valid = kept & (t >= 0) & (t < classes)
    return t, kept, valid


@kernel
def forward_kernel(
    logits,
    target,
    weight,
    weight_sum,
    loss,
    row_weight,
    maximum,
    log_sum,
    logits_inner,
    logits_outer_stride,
    logits_stride,
    rows,
    classes,
    ignore_index,
    smoothing,
    softcap,
    z_loss,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    EVERY_LSE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Row losses, weights and statistics; tiles ``[BLOCK_M, BLOCK_N]``."""
    row, row_exists = _rows(tl.program_id(0), rows, BLOCK_M)
    t, kept, valid = _target(target, row, row_exists, classes, ignore_index)
    start = row_offsets(row, logits_inner, logits_outer_stride, logits_stride)
    read = row_exists if EVERY_LSE else valid
    at_target = tl.load(logits + start + t, mask=valid, other=0.0).to(tl.float32)
    if CAPPED:
        at_target = _tanh(at_target / softcap) * softcap
    # Smoothing sums distances from here, not logits: these may be far from 0 and near each other.
    pivot = tl.where(at_target - at_target == 0, at_target, 0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    distances = tl.zeros([BLOCK_M], tl.float32)
    for begin in tl.range(0, classes, BLOCK_N, num_stages=NUM_STAGES):
        column, column_exists = _columns(begin, classes, VECTOR, BLOCK_N)
        mask = read[:, None] & column_exists
        pointers = aligned(logits, start, column, VECTOR)
        z = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        if CAPPED:
            z = _tanh(z / softcap) * softcap
        highest = tl.maximum(top, tl.max(tl.where(mask, z, float("-inf")), 1))
        # exp(-inf - -inf) would be NaN, where a row has begun with -inf.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        total *= tl.exp(top - base)
        total += tl.sum(tl.where(mask, tl.exp(z - base[:, None]), 0.0), 1)
        top = highest
        if SMOOTHED:
            distance = z - pivot[:, None]
            if weight is not None:
                zero = tl.zeros([1], tl.int64)
                distance *= tl.load(
                    aligned(weight, zero, column, VECTOR), mask=column_exists, other=0.0
                ).to(tl.float32)
            distances += tl.sum(tl.where(mask, distance, 0.0), 1)

    log_total = tl.log(total)
    tl.store(maximum + row, tl.where(read, top, 0.0), mask=row_exists)
    tl.store(log_sum + row, tl.where(read, log_total, 0.0), mask=row_exists)
    own = tl.where(kept, 1.0, 0.0)
    if weight is not None:
        own = tl.load(weight + t, mask=valid, other=0.0).to(tl.float32)
    value = own * (1.0 - smoothing) * ((top - at_target) + log_total)
    if SMOOTHED:
        all_weights = classes.to(tl.float32)
        if weight is not None:
            all_weights = tl.load(weight_sum)
        from_pivot = (top - pivot) + log_total
        value += smoothing / classes.to(tl.float32) * (all_weights * from_pivot - distances)
    if Z_LOSS:
        lse = top + log_total
        value += own * z_loss * lse * lse
    value = tl.where(kept, tl.where(valid, value, float("nan")), 0.0)
    tl.store(loss + row, rounded(value, loss.dtype.element_ty), mask=row_exists)
    if row_weight is not None:
        tl.store(row_weight + row, own, mask=row_exists)


@kernel
def reduce_kernel(
    row_loss, row_weight, loss, denominator, rows, BLOCK: tl.constexpr, NUM_STAGES: tl.constexpr
):
    """The sum of the row losses, or their mean; one program, so that the order is fixed."""
    total = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    lane = tl.arange(0, BLOCK)
    for begin in tl.range(0, rows, BLOCK, num_stages=NUM_STAGES):
        row = tl.full([BLOCK], begin, tl.int64) + lane
        total += tl.load(row_loss + row, mask=row < rows, other=0.0)
        if row_weight is not None:
            weights += tl.load(row_weight + row, mask=row < rows, other=0.0)
    value = tl.sum(total, 0)
    if row_weight is not None:
        divisor = tl.sum(weights, 0)
        tl.store(denominator, divisor)
        value = tl.where(divisor == 0.0, float("nan"), value / divisor)
    tl.store(loss, rounded(value, loss.dtype.element_ty))


@kernel
def backward_kernel(
    logits,
    grad_loss,
    grad_lse,
    target,
    weight,
    weight_sum,
    maximum,
    log_sum,
    denominator,
    grad_logits,
    logits_inner,
    logits_outer_stride,
    logits_stride,
    grad_loss_stride,
    rows,
    classes,
    blocks,
    ignore_index,
    smoothing,
    softcap,
    z_loss,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile ``[BLOCK_M, BLOCK_N]`` of the gradient; neighbours in the grid lie in one row."""
    program = tl.program_id(0)
    row, row_exists = _rows(program // blocks, rows, BLOCK_M)
    t, kept, valid = _target(target, row, row_exists, classes, ignore_index)
    grad = tl.load(grad_loss + row * grad_loss_stride, mask=row_exists, other=0.0).to(tl.float32)
    if denominator is not None:
        grad /= tl.load(denominator)
    grad = tl.where(kept, tl.where(valid, grad, float("nan")), 0.0)
    own = grad
    if weight is not None:
        own *= tl.load(weight + t, mask=valid, other=0.0).to(tl.float32)
    top = tl.load(maximum + row, mask=row_exists, other=0.0)
    log_total = tl.load(log_sum + row, mask=row_exists, other=0.0)
    at_target = own * (1.0 - smoothing)
    softmax = at_target
    smooth = tl.zeros_like(grad)
    if SMOOTHED:
        smooth = grad * smoothing / classes.to(tl.float32)
        if weight is None:
            softmax += smooth * classes.to(tl.float32)
        else:
            softmax += smooth * tl.load(weight_sum)
    if Z_LOSS:
        softmax += own * 2.0 * z_loss * (top + log_total)
    read = valid
    if grad_lse is not None:
        softmax += tl.load(grad_lse + row, mask=row_exists, other=0.0).to(tl.float32)
        read = row_exists

    column, column_exists = _columns(program % blocks * BLOCK_N, classes, VECTOR, BLOCK_N)
    start = row_offsets(row, logits_inner, logits_outer_stride, logits_stride)
    mask = read[:, None] & column_exists
    z = tl.load(aligned(logits, start, column, VECTOR), mask=mask, other=0.0).to(tl.float32)
    slope = tl.full([1, 1], 1.0, tl.float32)
    if CAPPED:
        bounded = _tanh(z / softcap)
        z = bounded * softcap
        slope = 1.0 - bounded * bounded
    gradient = tl.exp((z - top[:, None]) - log_total[:, None]) * softmax[:, None]
    if SMOOTHED:
        if weight is None:
            gradient -= smooth[:, None]
        else:
            zero = tl.zeros([1], tl.int64)
            w = tl.load(aligned(weight, zero, column, VECTOR), mask=column_exists, other=0.0)
            gradient -= smooth[:, None] * w.to(tl.float32)
    gradient = tl.where(column == t[:, None], gradient - at_target[:, None], gradient) * slope
    # What was not read: rows that are ignored, or whose target is no class (then grad is NaN).
    gradient = tl.where(read[:, None], gradient, grad[:, None])
    tl.store(
        aligned(grad_logits, row * classes, column, VECTOR),
        rounded(gradient, grad_logits.dtype.element_ty),
        mask=row_exists[:, None] & column_exists,
    )


@kernel
def sample_kernel(
    logits,
    seed,
    tokens,
    logits_inner,
    logits_outer_stride,
    logits_stride,
    rows,
    classes,
    first_row,
    inverse_temperature,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """The class with the largest logit / temperature - log(E); every lane keeps its own best."""
    row, row_exists = _rows(tl.program_id(0), rows, BLOCK_M)
    first, second = row_key(tl.load(seed), row + first_row)
    start = row_offsets(row, logits_inner, logits_outer_stride, logits_stride)
    best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    where = tl.full([BLOCK_M, BLOCK_N], 0x7FFFFFFF, tl.int32)
    for begin in tl.range(0, classes, BLOCK_N, num_stages=NUM_STAGES):
        column, column_exists = _columns(begin, classes, VECTOR, BLOCK_N)
        mask = row_exists[:, None] & column_exists
        pointers = aligned(logits, start, column, VECTOR)
        x = tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32)
        bits = random_bits(first[:, None], second[:, None], column)
        # E = -log(1 - u): a series for small u, whose digits decide; else 1 - u from the bits.
        u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
        rest = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
        series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * (0.25 + u * 0.2))))
        exponential = tl.where(u < 0.04, series, -tl.log(rest))
        score = x * inverse_temperature - tl.log(exponential)
        better = score > best  # the first of equals; never of -Inf or NaN
        best = tl.where(better, score, best)
        where = tl.where(better, column, where)
    top = tl.max(best, 1)
    token = tl.min(tl.where(best == top[:, None], where, 0x7FFFFFFF), 1)
    token = tl.where(top == float("-inf"), -1, token)
    tl.store(tokens + row, token.to(tl.int64), mask=row_exists)


# --- launchers -----------------------------------------------------------------------------------


def _weight_sum(weight: Tensor | None, smoothing: float) -> Tensor | None:
    return None if weight is None or not smoothing else weight.sum(dtype=torch.float32)


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    denominator: Tensor,
    classes: int,
    ignore_index: int,
    reduction: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
    every_lse: bool,
) -> None:
    """Fills ``loss``, ``maximum``, ``log_sum`` and, of a mean, ``denominator``.

    Args:
        logits: contiguous, or a view ``[outer, inner, classes]`` of contiguous rows.
        target: int64, contiguous, one for each row.
        weight: contiguous ``[classes]``, or None.
        reduction: 0 none, 1 mean, 2 sum.
        softcap: 0 for none.
        every_lse: fill the statistics of ignored rows too.
    """
    rows = target.numel()
    strides = row_strides(logits, classes)
    launch = forward_launch(classes, logits.element_size())
    row_loss = loss if reduction == 0 else torch.empty_like(maximum)
    row_weight = torch.empty_like(maximum) if reduction == 1 else None
    with on_device(logits):
        if rows:
            forward_kernel[(ceil_div(rows, launch.block_m),)](
                logits,
                target,
                weight,
                _weight_sum(weight, smoothing),
                row_loss,
                row_weight,
                maximum,
                log_sum,
                *strides,
                rows,
                classes,
                ignore_index,
                smoothing,
                softcap,
                z_loss,
                CAPPED=softcap > 0,
                SMOOTHED=smoothing > 0,
                Z_LOSS=z_loss != 0,
                EVERY_LSE=every_lse,
                VECTOR=vector_width(classes, (strides,), logits, weight),
                BLOCK_M=launch.block_m,
                BLOCK_N=launch.block_n,
                NUM_STAGES=launch.num_stages,
                num_warps=launch.num_warps,
            )
        if reduction:
            # 4 rows a thread and two tiles ahead; 16384 rows are four steps of about a microsecond.
            reduce_kernel[(1,)](
                row_loss,
                row_weight,
                loss,
                denominator,
                rows,
                BLOCK=4096,
                NUM_STAGES=3,
                num_warps=32,
            )


def backward(
    logits: Tensor,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    maximum: Tensor,
    log_sum: Tensor,
    denominator: Tensor,
    grad_logits: Tensor,
    classes: int,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    z_loss: float,
) -> None:
    """Fills ``grad_logits``; arguments as :func:`forward`.

    Args:
        grad_loss: contiguous, one for each row, or one for all.
        grad_lse: contiguous, one for each row, or None.
        denominator: empty where the loss was no mean.
    """
    rows = target.numel()
    strides = row_strides(logits, classes)
    launch = backward_launch(classes)
    blocks = ceil_div(classes, launch.block_n)
    with on_device(logits):
        backward_kernel[(ceil_div(rows, launch.block_m) * blocks,)](
            logits,
            grad_loss,
            grad_lse,
            target,
            weight,
            _weight_sum(weight, smoothing),
            maximum,
            log_sum,
            denominator if denominator.numel() else None,
            grad_logits,
            *strides,
            0 if grad_loss.numel() == 1 else 1,
            rows,
            classes,
            blocks,
            ignore_index,
            smoothing,
            softcap,
            z_loss,
            CAPPED=softcap > 0,
            SMOOTHED=smoothing > 0,
            Z_LOSS=z_loss != 0,
            VECTOR=vector_width(classes, (strides,), logits, weight, grad_logits),
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            num_warps=launch.num_warps,
        )


def sample(
    logits: Tensor, seed: Tensor, tokens: Tensor, classes: int, first_row: int, temperature: float
) -> None:
    """Fills ``tokens``.

    Args:
        logits: contiguous, or a view ``[outer, inner, classes]`` of contiguous rows.
        seed: ``int64 [1]`` on the device.
        tokens: int64, contiguous, one for each row.
        first_row: the number of row 0 for the generator.
    """
    rows = tokens.numel()
    strides = row_strides(logits, classes)
    # As the forward, with half its tile: a lane has its best score and class beside the logit.
    block_n = min(2048, max(8, next_power_of_2(classes)))
    block_m = max(1, 256 // block_n)
    with on_device(logits):
        sample_kernel[(ceil_div(rows, block_m),)](
            logits,
            seed,
            tokens,
            *strides,
            rows,
            classes,
            first_row,
            1.0 / temperature,
            VECTOR=vector_width(classes, (strides,), logits),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            NUM_STAGES=3 if classes > block_n else 1,
            num_warps=max(1, block_m * block_n // 256),
        )
