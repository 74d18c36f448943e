"""What every kernel family shares: rows and strides, vector width, random bits, the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Triton's interpreter runs the kernels on CPU tensors (set before ``triton`` is imported).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)


# --- host ----------------------------------------------------------------------------------------


class Device(NamedTuple):
    """What launch configurations depend on, apart from the problem."""

    architecture: int  # 10 * major + minor of the compute capability
    multiprocessors: int


@cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


#: What kernels on CPU tensors are shaped for: those of the interpreter, which get few programs so
#: that each has several tiles to loop over.
CPU_DEVICE = Device(architecture=90, multiprocessors=1)


def device_of(tensor: Tensor) -> Device:
    """The device a kernel on ``tensor`` will run on; looked up once per device."""
    return _cuda_device(tensor.get_device()) if tensor.is_cuda else CPU_DEVICE


_SAME_DEVICE = nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes ``tensor``'s GPU the current one, where Triton launches; costs nothing where it is."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _SAME_DEVICE
    return torch.cuda.device(tensor.device)


def shared_memory_limit(architecture: int) -> int:
    """Bytes of shared memory one program may use.

    A100 has 163 KiB, H100 and B100 227; the consumer chips between and after them 99.
    """
    return {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(architecture, 99) * 1024


def ceil_div(value: int, divisor: int) -> int:
    """``value / divisor``, rounded up."""
    return -(-value // divisor)


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is not below ``value``."""
    return 1 << (value - 1).bit_length()


class RowStrides(NamedTuple):
    """Where row r begins: ``(r // inner) * outer_stride + (r % inner) * stride`` elements in.

    Where one stride serves, ``inner`` and ``outer_stride`` are None and the kernel divides nothing.
    """

    inner: int | None
    outer_stride: int | None
    stride: int


_ABSENT = RowStrides(None, None, 0)


def row_strides(tensor: Tensor | None, row_length: int) -> RowStrides:
    """The strides of a contiguous tensor, or of a view ``[outer, inner, row_length]``."""
    if tensor is None:
        return _ABSENT
    if tensor.is_contiguous():
        return RowStrides(None, None, row_length)
    outer, inner, _ = tensor.shape
    outer_stride, stride, _ = tensor.stride()
    if outer == 1 or outer_stride == inner * stride:
        return RowStrides(None, None, stride)
    if inner == 1:
        return RowStrides(None, None, outer_stride)
    return RowStrides(inner, outer_stride, stride)


def vector_width(row_length: int, strides: Iterable[RowStrides], *tensors: Tensor | None) -> int:
    """Consecutive elements that every access may take together: 8, 4, 2 or 1.

    It divides the row length and all strides, and every tensor begins on a multiple of that many
    elements or of 16 bytes, the widest access. Kernels promise it to the compiler by
    :func:`aligned` and compile once per width: Triton's own specialisation asks for multiples of 16
    *elements*, which a bf16 row of 760 is not though it can be read in vectors, and would compile
    each mixture of alignments anew.
    """
    bits = row_length | 8
    for inner, outer_stride, stride in strides:
        bits |= stride
        if inner is not None:
            bits |= outer_stride
    for tensor in tensors:
        if tensor is not None and (address := tensor.data_ptr()) & 15:
            bits |= (address & 15) // tensor.element_size()
    return bits & -bits


def kernel(function: Callable[..., None]) -> Any:
    """``triton.jit`` for what is launched: specialised on its arguments' types, never their values.

    Alignment is promised by a ``VECTOR`` instead (:func:`vector_width`). Compiled once for 1, 16
    and 17 rows, a kernel sums a row in the same order whatever the number of rows.
    """
    runtime = [
        name
        for name, parameter in signature(function).parameters.items()
        if "constexpr" not in str(parameter.annotation)
    ]
    return triton.jit(function, do_not_specialize=runtime, do_not_specialize_on_alignment=runtime)


# --- device --------------------------------------------------------------------------------------


@triton.jit
def row_offsets(row, inner, outer_stride, stride):
    """Element offsets of rows; ``row`` is int64, so that tensors may pass 2^31 elements."""
    if inner is None:
        offsets = row * stride
    else:
        offsets = row // inner * outer_stride + row % inner * stride
    return offsets


@triton.jit
def aligned(pointer, row_start, column, VECTOR: tl.constexpr):
    """Pointers to a tile ``[M, N]``, known to begin each vector on its own boundary.

    ``row_start`` is ``[M]`` in int64 and added first, ``column`` ``[1, N]`` in int32: so addresses
    within a row are 32-bit offsets from one pointer, which saves registers.
    """
    SIZE: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    BYTES: tl.constexpr = VECTOR * SIZE if VECTOR * SIZE < 16 else 16
    return tl.multiple_of(pointer + row_start[:, None] + column, (SIZE, BYTES))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x.to(dtype)`` for an fp32 ``x``, to the nearest even.

    The interpreter truncates to bf16; there the rounding is done by hand, so that what it computes
    may be judged as on a GPU.
    """
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, TF32: tl.constexpr = False):
    """``acc + a @ b`` in fp32. fp32 operands are multiplied as such, or with TF32 as TF32.

    The interpreter's own product of bf16 tiles is wrong, so there they are converted first.
    """
    if _INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif TF32:
        acc = tl.dot(a, b, acc, input_precision="tf32")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum_pair(a, b, axis: tl.constexpr):
    """``tl.sum`` of two tiles at once: one exchange between warps instead of two."""
    if _INTERPRETED:  # which runs a reduction by a function element by element
        sums = tl.sum(a, axis), tl.sum(b, axis)
    else:
        sums = tl.reduce((a, b), axis, _add_pairs)
    return sums


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def row_key(seed, row):
    """The two keys of a row; ``seed`` and ``row`` are int64. As in ``csrc/math/random.h``."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    first = _mix(_mix(low) ^ row.to(tl.uint32))
    second = _mix(_mix(first + high) ^ (row >> 32).to(tl.uint32))
    return first, second


@triton.jit
def random_bits(first, second, column):
    """32 random bits of each position, from the keys of its row: two multiplications an element."""
    x = column.to(tl.uint32) + first
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= second
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def dropout(x, seed, row, column, threshold, scale):
    """``x`` where it is kept, times ``scale``; 0 elsewhere.

    ``seed`` is the int64 itself, as loaded; row is ``[M]``, column ``[1, N]``.
    """
    first, second = row_key(seed, row)
    bits = random_bits(first[:, None], second[:, None], column)
    return tl.where(bits >= threshold.to(tl.uint32), x * scale, 0.0)
