r"""What stands between the two products of a feed-forward block: bias, activation, dropout.

Forward, and backward with the gradient ``grad`` of the output::

    z           = hidden + bias
    output      = dropout(act(z))                       (SwiGLU: dropout(silu(z1) * z2))
    grad_hidden = dropout(grad) * act'(z)
    grad_bias   = sum over rows of grad_hidden

The backward writes the output again too, for the gradient of the second weight, so that forward
need not keep it. ReLU's reads the output in place of ``hidden``: what is 0 there was negative or
dropped. Both are bound by memory. Least traffic and time for 8192 rows of 4096 in bf16, at the
4.3 TB/s an H200 copies with::

    forward               read hidden, write output                             134 MB   31 us
    backward              read hidden and grad, write grad_hidden and output    268 MB   62 us
    backward of ReLU      read output and grad, write grad_hidden               201 MB   47 us

GELU's forward takes 26 instructions an element of bf16, its backward 32, ReLU's 9 and 10, SwiGLU's
18 and 30, and dropout 19 more. An H200 could issue 27 (132 SMs * 128 lanes * 1.7 GHz) in the time
that its memory takes for the forward's 4 bytes, and 53 for the backward's 8: with dropout GELU's
forward is bound by instructions, 53 us. The products around it take 98 at 700 TFLOPS, for rows of
1024.

A tile's columns are 256, one 16-byte access of a warp in bf16: few lanes idle at the end of rows
whose length is no power of two. There are no atomics: sums over rows go through partial rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    INTERPRETED,
    aligned,
    ceil_div,
    device_of,
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

_INTERPRETED = tl.constexpr(INTERPRETED)

# --- launch configurations -----------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut up. None of it depends on the number of rows.

    The figures come from the generated code (``tests/codegen``), not yet from a clock.
    """

    block_m: int
    block_n: int
    num_warps: int
    programs: int = 0  # of the backward on every SM


@cache
def forward_launch(size: int) -> Launch:
    """For outputs of rows of that size."""
    # 16 elements a thread: 4 KB a program of bf16 under way, and 8 programs or more on an SM.
    block_n = min(256, max(8, next_power_of_2(size)))
    return Launch(2048 // block_n, block_n, 4)


@cache
def backward_launch(size: int) -> Launch:
    """For gradients of rows of that size."""
    # 8 elements a thread of two tensors, with a sum each: again 4 KB a program of bf16, in 48 to 72
    # registers (fp32: 48 to 102, and twice the bytes), so that six fit an SM.
    block_n = min(256, max(8, next_power_of_2(size)))
    return Launch(1024 // block_n, block_n, 4, programs=6)


# --- kernels -------------------------------------------------------------------------------------


# The special unit's two functions. Triton's own would take care of subnormal numbers by four more
# operations each: an exponential below 2^-126 may be 0, and what is divided by is 1 at least.


@triton.jit
def _power_of_2(x):
    if _INTERPRETED:
        result = tl.exp2(x)
    else:
        result = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _reciprocal(x):
    if _INTERPRETED:
        result = 1.0 / x
    else:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _gelu(z):
    """``z`` times the normal distribution up to it, and the derivative.

    The tail is ``e^(-z^2/2) t q(t)`` with ``t = 1 / (1 + 0.265 |z|)`` and a minimax fit q, as in
    ``csrc/cpu/feed_forward.cpp``: the derivative needs that exponential anyhow.
    """
    power = _power_of_2(z * (z * -0.72134752))  # log2(e) / 2
    t = _reciprocal(1.0 + 0.265 * tl.abs(z))
    q = t * 0.0306630842 - 0.143483117
    q = q * t + 0.216316909
    q = q * t - 0.1146942
    q = q * t + 0.136829168
    q = q * t + 0.0607811064
    q = q * t + 0.102583572
    q = q * t + 0.105262861
    q = q * t + 0.105740614
    tail = power * t * q
    up_to = tl.where(z < 0.0, tail, 1.0 - tail)
    return z * up_to, up_to + z * power * 0.3989422804


@triton.jit
def _logistic(x):
    """``1 / (1 + e^-x)`` and its derivative, without the loss of digits in ``1 - s``."""
    power = _power_of_2(tl.abs(x) * -1.44269504)
    high = _reciprocal(1.0 + power)
    low = power * high
    return tl.where(x < 0.0, low, high), high * low


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    if ACTIVATION == "gelu":
        value, slope = _gelu(z)
    elif ACTIVATION == "gelu_tanh":
        square = z * z
        s, derivative = _logistic(z * (square * 0.0713548163 + 1.5957691216))
        value = z * s
        slope = s + z * derivative * (square * 0.214064449 + 1.5957691216)
    elif ACTIVATION == "relu":  # whose backward takes another way
        value, slope = tl.where(z < 0.0, 0.0, z), z
    else:
        s, derivative = _logistic(z)
        value, slope = z * s, s + z * derivative
    return value, slope


@triton.jit
def _load(pointer, row_start, column, mask, VECTOR: tl.constexpr):
    pointers = aligned(pointer, row_start, column, VECTOR)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, row_start, column, x, mask, VECTOR: tl.constexpr):
    pointers = aligned(pointer, row_start, column, VECTOR)
    tl.store(pointers, rounded(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _bias(bias, column, exists, VECTOR: tl.constexpr):
    """A part of the bias as a row ``[1, N]``."""
    return _load(bias, tl.zeros([1], tl.int64), column, exists, VECTOR)


@triton.jit
def _columns(tile, size, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's columns and which of them exist, ``[1, N]``; whole vectors do or do not."""
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return column, tl.max_constancy(column < size, (1, VECTOR))


@triton.jit
def _kept(seed, row, column, threshold):
    """Which elements dropout leaves; row is ``[M]``, column ``[1, N]``."""
    first, second = row_key(seed, row)
    return random_bits(first[:, None], second[:, None], column) >= threshold.to(tl.uint32)


@kernel
def feed_forward_forward_kernel(
    hidden, bias, seed, output,
    hidden_inner, hidden_outer_stride, hidden_stride,
    rows, size, threshold, scale,
    ACTIVATION: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile ``[BLOCK_M, BLOCK_N]`` of the output, which is contiguous; each tensor moves once.

    Programs side by side go through whole rows.
    """
    tiles = tl.cdiv(size, BLOCK_N)
    column, exists = _columns(tl.program_id(0) % tiles, size, VECTOR, BLOCK_N)
    row_tile = tl.program_id(0) // tiles
    row = tl.full([BLOCK_M], row_tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (row < rows)[:, None] & exists
    start = row_offsets(row, hidden_inner, hidden_outer_stride, hidden_stride)
    z = _load(hidden, start, column, mask, VECTOR)
    if bias is not None:
        z += _bias(bias, column, exists, VECTOR)
    value, _ = _activate(z, ACTIVATION)
    if ACTIVATION == "swiglu":
        up = _load(hidden, start, size + column, mask, VECTOR)
        if bias is not None:
            up += _bias(bias, size + column, exists, VECTOR)
        value *= up
    if seed is not None:
        value = tl.where(_kept(tl.load(seed), row, column, threshold), value * scale, 0.0)
    _store(output, row * size, column, value, mask, VECTOR)


@kernel
def feed_forward_backward_kernel(
    grad, hidden, bias, seed, grad_hidden, output, partials,
    grad_inner, grad_outer_stride, grad_stride,
    hidden_inner, hidden_outer_stride, hidden_stride,
    rows, size, length, threshold, scale,
    ACTIVATION: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Every so many-th tile of rows of one column tile, with the sums of its columns in registers.

    They stay as large as the tile until the end, so that in the loop threads exchange nothing; the
    program's partial row, ``length`` of fp32, is written once.
    """
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    if seed is not None:
        seed = tl.load(seed)
    column, exists = _columns(tl.program_id(0), size, VECTOR, BLOCK_N)
    if bias is not None:
        first_bias = _bias(bias, column, exists, VECTOR)
        if GATED:
            second_bias = _bias(bias, size + column, exists, VECTOR)
    first_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    second_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, BLOCK_M), tl.num_programs(1)):
        row = tl.full([BLOCK_M], tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & exists
        start = row_offsets(row, hidden_inner, hidden_outer_stride, hidden_stride)
        grad_start = row_offsets(row, grad_inner, grad_outer_stride, grad_stride)
        g = _load(grad, grad_start, column, mask, VECTOR)
        z = _load(hidden, start, column, mask, VECTOR)
        if ACTIVATION == "relu":
            first = tl.where(z == 0.0, 0.0, g * scale)
        else:
            if bias is not None:
                z += first_bias
            value, slope = _activate(z, ACTIVATION)
            if seed is not None:
                kept = _kept(seed, row, column, threshold)
                g = tl.where(kept, g * scale, 0.0)
            first = g * slope
            if GATED:
                up = _load(hidden, start, size + column, mask, VECTOR)
                if bias is not None:
                    up += second_bias
                first *= up
                second = g * value
                value *= up
                second_sum += tl.where(mask, second, 0.0)
                if grad_hidden is not None:
                    _store(grad_hidden, row * length, size + column, second, mask, VECTOR)
            if output is not None:
                if seed is not None:
                    value = tl.where(kept, value * scale, 0.0)
                _store(output, row * size, column, value, mask, VECTOR)
        first_sum += tl.where(mask, first, 0.0)
        if grad_hidden is not None:
            _store(grad_hidden, row * length, column, first, mask, VECTOR)
    if partials is not None:
        partial = tl.full([1], length, tl.int64) * tl.program_id(1)
        _store(partials, partial, column, tl.sum(first_sum, 0)[None, :], exists, VECTOR)
        if GATED:
            total = tl.sum(second_sum, 0)[None, :]
            _store(partials, partial, size + column, total, exists, VECTOR)


# --- launchers -----------------------------------------------------------------------------------


def forward(
    hidden: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    activation: str,
    threshold: int,
    scale: float,
) -> None:
    """Fills ``output``.

    Args:
        hidden: contiguous, or a view ``[outer, inner, length]`` of contiguous rows; for SwiGLU of
            twice the output's length.
        bias: contiguous, as long as a row of ``hidden``, or None.
        seed: ``int64 [1]`` on the device, or None: no dropout.
        output: contiguous, not empty.
        threshold, scale: an element is dropped where its random bits are below, and multiplied by
            ``scale`` elsewhere.
    """
    size = output.shape[-1]
    rows = output.numel() // size
    strides = row_strides(hidden, hidden.shape[-1])
    launch = forward_launch(size)
    grid = (ceil_div(size, launch.block_n) * ceil_div(rows, launch.block_m),)
    with on_device(hidden):
        feed_forward_forward_kernel[grid](
            hidden, bias, seed, output, *strides, rows, size, threshold, scale,
            ACTIVATION=activation, VECTOR=vector_width(size, (strides,), hidden, bias, output),
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, num_warps=launch.num_warps,
        )  # fmt: skip


def backward(
    grad: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    grad_hidden: Tensor,
    output: Tensor,
    grad_bias: Tensor,
    activation: str,
    threshold: int,
    scale: float,
) -> None:
    """Fills ``grad_hidden``, ``output`` and ``grad_bias``; an empty one is not written.

    Args:
        grad: as ``hidden``, of the output's length.
        the others: as :func:`forward`; for ReLU ``hidden`` is the output, and there is no bias.
    """
    size, length = grad.shape[-1], hidden.shape[-1]
    rows = grad.numel() // size
    strides = row_strides(grad, size), row_strides(hidden, length)
    launch = backward_launch(size)
    columns, tiles = ceil_div(size, launch.block_n), ceil_div(rows, launch.block_m)
    resident = device_of(grad).multiprocessors * launch.programs
    splits = min(tiles, max(1, resident // columns))
    partials = None
    if grad_bias.numel():
        partials = torch.empty(splits, length, dtype=torch.float32, device=grad.device)
    outputs = tuple(t if t.numel() else None for t in (grad_hidden, output))
    with on_device(grad):
        feed_forward_backward_kernel[(columns, splits)](
            grad, hidden, bias, seed, *outputs, partials, *strides[0], *strides[1],
            rows, size, length, threshold, scale,
            ACTIVATION=activation,
            VECTOR=vector_width(size, strides, grad, hidden, bias, *outputs),
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, num_warps=launch.num_warps,
        )  # fmt: skip
    if partials is not None:
        grad_bias.copy_(partials.sum(0))
