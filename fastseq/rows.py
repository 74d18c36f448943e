"""Seeing a tensor of any strides as rows, without a copy where strides serve."""

from __future__ import annotations

from torch import Tensor


def as_rows(tensor: Tensor, row_length: int) -> Tensor:
    """The tensor as ``[outer, inner, row_length]`` rows that are contiguous each, sharing memory.

    A contiguous tensor is returned as it is (a launcher reads it as ``numel / row_length`` rows).
    Otherwise the trailing dimensions that make up a row must be contiguous and the leading ones
    must fold into two strides: sliced, transposed ``[T, B, H]`` and expanded (stride 0) inputs do.
    A gradient that is the same everywhere (``y.sum().backward()``) costs one row. What else comes
    is copied.
    """
    if tensor.is_contiguous():
        return tensor
    shape, strides = tensor.shape, tensor.stride()
    split = tensor.dim()
    length = 1
    while length < row_length:
        split -= 1
        length *= shape[split]
    while split > 0 and shape[split - 1] == 1:
        split -= 1

    leading = fold(shape[:split], strides[:split])
    if len(leading) > 2:
        return tensor.contiguous()
    trailing = fold(shape[split:], strides[split:])
    if trailing and (len(trailing) > 1 or trailing[0][1] != 1):
        if any(stride for _, stride in leading):
            return tensor.contiguous()
        row = tensor[(0,) * split].contiguous()
        return row.as_strided((1, tensor.numel() // row_length, row_length), (0, 0, 1))
    (outer, outer_stride), (inner, inner_stride) = [(1, 0)] * (2 - len(leading)) + leading
    return tensor.as_strided((outer, inner, row_length), (outer_stride, inner_stride, 1))


def fold(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """The dimensions as few (size, stride) pairs as they allow; dimensions of size 1 vanish."""
    folded: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if folded and folded[-1][1] == size * stride:
            folded[-1] = (folded[-1][0] * size, stride)
        else:
            folded.append((size, stride))
    return folded


def flat(parameter: Tensor | None) -> Tensor | None:
    """A weight or bias with its elements in one run; None stays None."""
    if parameter is None or parameter.is_contiguous():
        return parameter
    return parameter.contiguous()
