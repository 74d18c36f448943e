r"""Additive attention: scores of a block of queries, and gradients from theirs.

For query i, key j and channels h::

    s[i, j]          = sum over h of weight[h] * tanh(query[i, h] + key[j, h])
    grad_query[i, h] = weight[h] * sum over j of g[i, j] * (1 - tanh^2)        (g: grad_scores)
    grad_key[j, h]   = weight[h] * sum over i of g[i, j] * (1 - tanh^2)
    grad_weight[h]   = sum over i, j of g[i, j] * tanh

The softmax over the scores and the products with the values are kernels of other families and
library GEMMs: beside Lq * Lk * H hyperbolic tangents they hardly count. With E = e^2q e^2k::

    tanh(q + k) / 2 = 1/2 - 1 / (1 + E)

and the powers of queries and keys taken once (O(L) numbers, transposed so that a row of a tile is
consecutive), a tanh is a reciprocal and 3 other operations (6 for fp32, where the rounding of 1 + E
is made good): MUFU, with 16 results a clock and SM, is what is busy, and 8 instructions can be
issued meanwhile. An H200
takes 132 SMs * 16 * 1.7 GHz = 3.6e12 tanh a second at most: 0.07 ms for 4 x 512 x 512 x 256, where
writing and reading that tensor four times in bf16 takes 0.5 ms of its memory. Three times that with
the backward, which takes each reciprocal anew for scores, queries and keys, so that nothing needs
atomics. e^2(q + k) and its reciprocal fit a float up to |q|, |k| <= 21; an entry of the batch with
anything larger (``direct``) takes e to the power of every sum, at two to three times the price.

Every sum is one program's, in an order that depends on the lengths alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, ceil_div, kernel, next_power_of_2, on_device

_INTERPRETED = tl.constexpr(INTERPRETED)

#: e^2x = 2^(SCALE * x)
_SCALE = tl.constexpr(2.8853900817779268)
_LN_2_HIGH = tl.constexpr(0.693359375)  # of so few digits that its multiples are exact
_LN_2_LOW = tl.constexpr(-2.12194440e-4)
#: The largest number whose power, times another's, has a reciprocal that is not 0: e^4x < 2^126.
LIMIT = 21.0
#: Channels whose gradients a program sums up side by side, so that it loads grad_scores once.
CHANNELS = tl.constexpr(4)


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut up: tiles of queries by keys. Figures from the generated code."""

    block_m: int
    block_n: int
    num_warps: int


def scores_launch(queries: int, keys: int) -> Launch:
    """16 elements a thread, 110 registers: 16 warps an SM to keep its reciprocals busy."""
    block_m = min(32, max(16, next_power_of_2(queries)))
    return Launch(block_m, min(64, max(32, next_power_of_2(keys))), 4)


#: 8 elements a thread in each of 8 sums.
GRADIENTS_LAUNCH = Launch(32, 32, 4)


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _reciprocal(x):
    """``1 / x`` within an ulp, 0 where x is past 2^126."""
    if _INTERPRETED:
        result = 1.0 / x
    else:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _power(x):
    """e^2x within 2 ulps (2^(x * SCALE) could be off by 20), infinite or 0 where past a float."""
    n = tl.floor(x * _SCALE + 0.5)
    rest = (2.0 * x - n * _LN_2_HIGH) - n * _LN_2_LOW
    return tl.exp2(rest * (0.5 * _SCALE)) * tl.exp2(n)


@kernel
def powers_kernel(numbers, powers, count, BLOCK: tl.constexpr):
    """e^2x of every number."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(numbers + place, mask=place < count, other=0.0)
    tl.store(powers + place, _power(x), mask=place < count)


@triton.jit
def _half_tanh(row, column, DIRECT: tl.constexpr, FINE: tl.constexpr):
    """tanh / 2 ``[M, N]`` from numbers or their powers."""
    if DIRECT:
        # From 20 on tanh rounds to 1, and the correction below wants a finite power.
        x = row[:, None] + column[None, :]
        power = _power(tl.where(x > 20.0, 20.0, tl.where(x < -20.0, -20.0, x)))
    else:
        power = row[:, None] * column[None, :]
    if FINE and _INTERPRETED:
        # Which fuses no product with a sum: what the correction below amounts to.
        half = (0.5 - 1.0 / (1.0 + power.to(tl.float64))).to(tl.float32)
    else:
        r = _reciprocal(power + 1.0)
        half = 0.5 - r
        if FINE:
            half -= r * ((1.0 - r) - power * r)
    return half


@triton.jit
def _sum_scores(
    query, key, weight, row, column, queries, keys, hidden, DIRECT: tl.constexpr,
    FINE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The scores of a tile; query and key point to channel 0 of this entry of the batch."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for channel in range(0, hidden):
        q = tl.load(query + row, mask=row < queries, other=0.0)
        k = tl.load(key + column, mask=column < keys, other=0.0)
        total += _half_tanh(q, k, DIRECT, FINE) * (2.0 * tl.load(weight + channel))
        query += queries
        key += keys
    return total


@kernel
def scores_kernel(
    query_numbers, query_powers, key_numbers, key_powers, weight, direct, scores,
    queries, keys, hidden,
    FINE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile a program; numbers and powers are ``[batch, hidden, length]`` in fp32."""
    rows, columns = tl.cdiv(queries, BLOCK_M), tl.cdiv(keys, BLOCK_N)
    program = tl.program_id(0)
    entry = (program // (rows * columns)).to(tl.int64)
    row = program // columns % rows * BLOCK_M + tl.arange(0, BLOCK_M)
    column = program % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    query_start, key_start = entry * hidden * queries, entry * hidden * keys
    if tl.load(direct + entry) != 0:
        total = _sum_scores(
            query_numbers + query_start, key_numbers + key_start, weight, row, column,
            queries, keys, hidden, True, FINE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        total = _sum_scores(
            query_powers + query_start, key_powers + key_start, weight, row, column,
            queries, keys, hidden, False, FINE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    target = scores + (entry * queries + row.to(tl.int64))[:, None] * keys + column[None, :]
    tl.store(target, total, mask=(row < queries)[:, None] & (column < keys)[None, :])


@triton.jit
def _products(g, row, column, DIRECT: tl.constexpr, FINE: tl.constexpr):
    """What the tile's elements add to a quarter of a number's gradient, and half the weight's."""
    half = _half_tanh(row, column, DIRECT, FINE)
    if DIRECT:  # what takes no part may be NaN
        half = tl.where(g == 0.0, 0.0, half)
    return g * (0.25 - half * half), g * half


@triton.jit
def _sum_gradients(
    own, other, grad_scores, weight, grad_own, grad_weight, row, channel, own_count, other_count,
    hidden, DIRECT: tl.constexpr, TRANSPOSED: tl.constexpr, WEIGHT: tl.constexpr,
    FINE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile's rows against all columns, in CHANNELS channels from ``channel`` on."""
    # A channel past the last one is the last again, and not stored.
    c0, c1, c2, c3 = (
        channel,
        tl.minimum(channel + 1, hidden - 1),
        tl.minimum(channel + 2, hidden - 1),
        tl.minimum(channel + 3, hidden - 1),
    )
    there = row < own_count
    x0 = tl.load(own + c0 * own_count + row, mask=there, other=0.0)
    x1 = tl.load(own + c1 * own_count + row, mask=there, other=0.0)
    x2 = tl.load(own + c2 * own_count + row, mask=there, other=0.0)
    x3 = tl.load(own + c3 * own_count + row, mask=there, other=0.0)
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    s0, s1, s2, s3 = zero, zero, zero, zero
    w0, w1, w2, w3 = zero, zero, zero, zero
    for first in range(0, other_count, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        beside = column < other_count
        if TRANSPOSED:
            place = column.to(tl.int64)[None, :] * own_count + row[:, None]
        else:
            place = row.to(tl.int64)[:, None] * other_count + column[None, :]
        g = tl.load(grad_scores + place, mask=there[:, None] & beside[None, :], other=0.0)
        y0 = tl.load(other + c0 * other_count + column, mask=beside, other=0.0)
        y1 = tl.load(other + c1 * other_count + column, mask=beside, other=0.0)
        y2 = tl.load(other + c2 * other_count + column, mask=beside, other=0.0)
        y3 = tl.load(other + c3 * other_count + column, mask=beside, other=0.0)
        p0, t0 = _products(g, x0, y0, DIRECT, FINE)
        p1, t1 = _products(g, x1, y1, DIRECT, FINE)
        p2, t2 = _products(g, x2, y2, DIRECT, FINE)
        p3, t3 = _products(g, x3, y3, DIRECT, FINE)
        s0 += p0
        s1 += p1
        s2 += p2
        s3 += p3
        if WEIGHT:
            w0 += t0
            w1 += t1
            w2 += t2
            w3 += t3
    _finish(s0, w0, channel, row, there, weight, grad_own, grad_weight, own_count, hidden, WEIGHT)
    _finish(
        s1, w1, channel + 1, row, there, weight, grad_own, grad_weight, own_count, hidden, WEIGHT
    )
    _finish(
        s2, w2, channel + 2, row, there, weight, grad_own, grad_weight, own_count, hidden, WEIGHT
    )
    _finish(
        s3, w3, channel + 3, row, there, weight, grad_own, grad_weight, own_count, hidden, WEIGHT
    )


@triton.jit
def _finish(
    total, weight_total, channel, row, there, weight, grad_own, grad_weight, own_count, hidden,
    WEIGHT: tl.constexpr,
):  # fmt: skip
    """Sum up one channel and store it, if there is such a channel."""
    exists = channel < hidden
    factor = 4.0 * tl.load(weight + channel, mask=exists, other=0.0)
    tl.store(grad_own + channel * own_count + row, tl.sum(total, 1) * factor, mask=there & exists)
    if WEIGHT:
        tl.store(grad_weight + channel, 2.0 * tl.sum(tl.sum(weight_total, 1), 0), mask=exists)


@kernel
def gradients_kernel(
    own_numbers, own_powers, other_numbers, other_powers, grad_scores, weight, direct,
    grad_own, grad_weight, own_count, other_count, hidden,
    TRANSPOSED: tl.constexpr, WEIGHT: tl.constexpr, FINE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of queries (own) from all keys (other), or TRANSPOSED the other way round.

    With WEIGHT also the weight's, a partial sum ``[batch, tiles of rows, hidden]`` each program.
    """
    tiles, groups = tl.cdiv(own_count, BLOCK_M), tl.cdiv(hidden, CHANNELS)
    program = tl.program_id(0)
    entry = (program // (tiles * groups)).to(tl.int64)
    tile = program // groups % tiles
    channel = program % groups * CHANNELS
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    own_start, other_start = entry * hidden * own_count, entry * hidden * other_count
    grad_scores += entry * own_count * other_count
    grad_own += own_start
    if WEIGHT:
        grad_weight += (entry * tiles + tile) * hidden
    if tl.load(direct + entry) != 0:
        _sum_gradients(
            own_numbers + own_start, other_numbers + other_start, grad_scores, weight, grad_own,
            grad_weight, row, channel, own_count, other_count, hidden, True, TRANSPOSED, WEIGHT,
            FINE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _sum_gradients(
            own_powers + own_start, other_powers + other_start, grad_scores, weight, grad_own,
            grad_weight, row, channel, own_count, other_count, hidden, False, TRANSPOSED, WEIGHT,
            FINE, BLOCK_M, BLOCK_N,
        )  # fmt: skip


# --- launchers -----------------------------------------------------------------------------------


class Factors(NamedTuple):
    """Queries or keys as the kernels read them, ``[batch, hidden, length]`` in fp32."""

    numbers: Tensor
    powers: Tensor


def _prepare(query: Tensor, key: Tensor) -> tuple[Factors, Factors, Tensor]:
    """The factors of both, and which entries of the batch have numbers too large for powers."""
    factors = []
    sizes = []
    for tensor in (query, key):
        numbers = tensor.float().transpose(1, 2).contiguous()
        powers = torch.empty_like(numbers)
        with on_device(tensor):
            powers_kernel[(ceil_div(numbers.numel(), 1024),)](
                numbers, powers, numbers.numel(), BLOCK=1024, num_warps=4
            )
        factors.append(Factors(numbers, powers))
        sizes.append(numbers.abs().amax((1, 2)))
    direct = ~(torch.maximum(*sizes) <= LIMIT)  # so that NaN is too large
    return factors[0], factors[1], direct.to(torch.int32)


def scores(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    """The scores ``[batch, queries, keys]`` in fp32.

    Args:
        query, key: ``[batch, queries, hidden]``, ``[batch, keys, hidden]``, none of them empty.
        weight: ``[hidden]``, fp32 and contiguous.
    """
    (batch, queries, hidden), keys = query.shape, key.shape[1]
    mine, theirs, direct = _prepare(query, key)
    result = query.new_empty(batch, queries, keys, dtype=torch.float32)
    launch = scores_launch(queries, keys)
    tiles = ceil_div(queries, launch.block_m) * ceil_div(keys, launch.block_n)
    with on_device(query):
        scores_kernel[(batch * tiles,)](
            mine.numbers, mine.powers, theirs.numbers, theirs.powers, weight, direct, result,
            queries, keys, hidden, FINE=query.element_size() == 4,
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, num_warps=launch.num_warps,
        )  # fmt: skip
    return result


def gradients(
    grad_scores: Tensor, query: Tensor, key: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and weight (``[batch, hidden]``, to be summed), in fp32.

    Args:
        grad_scores: ``[batch, queries, keys]``, fp32 and contiguous.
        query, key, weight: as :func:`scores`.
    """
    mine, theirs, direct = _prepare(query, key)
    fine = query.element_size() == 4
    grad_query, grad_weight = sum_gradients(mine, theirs, grad_scores, weight, direct, False, fine)
    grad_key, _ = sum_gradients(theirs, mine, grad_scores, weight, direct, True, fine)
    return grad_query, grad_key, grad_weight


def sum_gradients(
    own: Factors,
    other: Factors,
    grad_scores: Tensor,
    weight: Tensor,
    direct: Tensor,
    transposed: bool,
    fine: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of queries and weight, or ``transposed`` of keys (and nothing)."""
    batch, hidden, count = own.numbers.shape
    launch = GRADIENTS_LAUNCH
    tiles = ceil_div(count, launch.block_m)
    grad = torch.empty_like(own.numbers)
    grad_weight = weight.new_empty(batch, 0 if transposed else tiles, hidden)
    with on_device(grad):
        gradients_kernel[(batch * tiles * ceil_div(hidden, int(CHANNELS)),)](
            *own, *other, grad_scores, weight, direct, grad, grad_weight,
            count, other.numbers.shape[2], hidden,
            TRANSPOSED=transposed, WEIGHT=not transposed, FINE=fine,
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, num_warps=launch.num_warps,
        )  # fmt: skip
    return grad.transpose(1, 2), grad_weight.sum(1)
