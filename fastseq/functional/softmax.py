"""softmax, log_softmax and masked_softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import current_backend, note
from ..ops.softmax import MaskedSoftmaxFunction, SoftmaxFunction, forward_op, masked_forward_op
from ..reference import softmax as reference
from ._dispatch import FLOATING, autocast_to_fp32, is_foreign, is_transformed, records_gradient

ALIGNMENTS = ("top_left", "bottom_right")


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Softmax along one dimension, as :func:`torch.nn.functional.softmax`.

    .. math:: y_i = \frac{\exp(x_i - \max_j x_j)}{\sum_k \exp(x_k - \max_j x_j)}

    Args:
        input: any shape and strides; fp32, fp64, fp16 or bf16, or anything that ``dtype`` makes so.
        dim: the dimension that sums up to 1. Without it torch's deprecated choice is taken, and its
            warning given.
        dtype: of the result. The input is not converted first, but as it is read: nothing is
            rounded that torch would not round.

    Returns:
        A contiguous tensor of the input's shape, in ``dtype`` or the input's (fp32 under CUDA
        autocast). Arithmetic is fp32, or fp64 where input or result is fp64. A row with a NaN or
        +Inf, or of -Inf alone, is NaN.

    Raises:
        IndexError: ``dim`` is out of range.
        NotImplementedError: input or ``dtype`` is not floating point.

    Source: Bridle, "Probabilistic Interpretation of Feedforward Classification Network Outputs",
    1990.
    """
    if is_foreign(input):
        note("softmax", "torch", "a tensor subclass, layout or trace that torch must handle")
        return F.softmax(input, dim, _stacklevel + 1, dtype)
    if dim is None:
        dim = F._get_softmax_dim("softmax", input.dim(), _stacklevel)  # type: ignore[attr-defined]
    return _softmax("softmax", input, dim, dtype, log=False)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The logarithm of the softmax, as :func:`torch.nn.functional.log_softmax`.

    .. math:: y_i = x_i - \max_j x_j - \log \sum_k \exp(x_k - \max_j x_j)

    Arguments, result and errors as :func:`softmax`.
    """
    if is_foreign(input):
        note("log_softmax", "torch", "a tensor subclass, layout or trace that torch must handle")
        return F.log_softmax(input, dim, _stacklevel + 1, dtype)
    if dim is None:
        dim = F._get_softmax_dim("log_softmax", input.dim(), _stacklevel)  # type: ignore[attr-defined]
    return _softmax("log_softmax", input, dim, dtype, log=True)


def _softmax(name: str, input: Tensor, dim: int, dtype: torch.dtype | None, *, log: bool) -> Tensor:
    function = torch.log_softmax if log else torch.softmax
    output_dtype = dtype or (torch.float32 if autocast_to_fp32(input) else input.dtype)
    if output_dtype not in FLOATING:
        if not input.numel() or output_dtype.is_complex or output_dtype.is_floating_point:
            return function(input, dim, dtype=dtype)  # empty, or torch's own refusal
        role = "input" if dtype is None else "dtype"
        raise NotImplementedError(
            f"{name}: {role} must be fp32, fp64, fp16 or bf16, got {output_dtype}"
        )
    if type(dim) is not int and not isinstance(dim, torch.SymInt):
        return function(input, dim, dtype=dtype)
    dim = _wrapped(name, dim, input.dim())
    records = records_gradient(input)
    if _torch_is_quicker(input, records):
        note(name, "torch", "so small that the call costs more than the kernel saves")
        return function(input, dim, dtype=output_dtype)
    wide = torch.float64 in (input.dtype, output_dtype) and input.dtype != output_dtype
    if wide or input.dtype not in FLOATING:
        input = input.to(output_dtype)
    if is_transformed():
        note(name, "reference", "torch.func or forward-mode AD")
        return reference.softmax(input, dim, log=log, output_dtype=output_dtype)
    if records:
        output: Tensor = SoftmaxFunction.apply(input, dim, log, output_dtype)  # type: ignore[no-untyped-call]
        return output
    return forward_op(input, dim, log, output_dtype)  # type: ignore[no-any-return]


def _wrapped(name: str, dim: int, dims: int) -> int:
    """``dim`` from 0 on."""
    least, most = -max(dims, 1), max(dims, 1) - 1
    if not least <= dim <= most:
        raise IndexError(
            f"{name}: dim is out of range (expected to be in range of [{least}, {most}], "
            f"but got {dim})"
        )
    return dim % max(dims, 1)


def _torch_is_quicker(input: Tensor, records: bool) -> bool:
    """Whether torch's softmax, C++ throughout, is done before ours has come through Python.

    Measured on one core of an AVX-512 EPYC in fp32 and bf16: both are even at 16 to 32 thousand
    elements on forward, at 65 thousand where a gradient is recorded.
    """
    if not input.is_cpu or current_backend() != "auto" or torch.compiler.is_compiling():
        return False
    return input.numel() < (65_000 if records else 20_000)


def masked_softmax(
    input: Tensor,
    mask: Tensor | None = None,
    dim: int = -1,
    *,
    scale: float = 1.0,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
) -> Tensor:
    r"""Scale, mask and softmax in one pass: attention's scores to its weights.

    .. math:: y = \mathrm{softmax}(s \cdot x + m)

    over what takes part: where a boolean mask is True, where an additive one is not -Inf, and what
    ``is_causal`` leaves. What takes no part is 0, and so is a row of which nothing is left (where
    softmax would be NaN); their gradients are 0. Nothing of what takes no part reaches the result
    or a gradient, NaN and Inf included.

    Args:
        input: :math:`x`, any shape and strides; fp32, fp64, fp16 or bf16.
        mask: :math:`m`, boolean or floating; broadcast to the input's shape, without a copy.
        dim: the dimension that sums up to 1; any but the last is moved there for the kernel.
        scale: :math:`s`.
        is_causal: row i of the last two dimensions ``[rows, columns]`` takes its first ``i + 1``
            columns, or with ``causal_alignment="bottom_right"`` its first ``i + 1 + columns -
            rows``:
            the last row takes all.
        causal_alignment: ``"top_left"``, as in torch's scaled_dot_product_attention, or
            ``"bottom_right"``.

    Returns:
        A tensor of the input's shape and dtype (fp32 under CUDA autocast), contiguous where ``dim``
        is the last. Arithmetic is fp32, or fp64 for fp64 input.

    Raises:
        IndexError: ``dim`` is out of range.
        NotImplementedError: the input is not floating point.
        RuntimeError: the mask is neither boolean nor floating, does not broadcast to the input, or
            is on another device.
        ValueError: ``is_causal`` with fewer than two dimensions or along another than the last, or
            an unknown alignment.

    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1.
    """
    dim = _validated_masked(input, mask, dim, is_causal, causal_alignment)
    if input.dim() == 0:
        whole = masked_softmax(input.reshape(1), mask, scale=scale)
        return whole.reshape(())
    if dim != input.dim() - 1:
        if mask is not None:
            mask = mask[(None,) * (input.dim() - mask.dim())].movedim(dim, -1)
        return masked_softmax(input.movedim(dim, -1), mask, scale=scale).movedim(-1, dim)
    causal_offset = None
    if is_causal:
        rows, columns = input.shape[-2:]
        causal_offset = columns - rows if causal_alignment == "bottom_right" else 0
    output_dtype = torch.float32 if autocast_to_fp32(input) else input.dtype
    if is_foreign(input, mask) or is_transformed():
        note("masked_softmax", "reference", "a tensor subclass, a trace, torch.func or forward AD")
        return reference.masked_softmax(
            input, mask, scale=scale, causal_offset=causal_offset, output_dtype=output_dtype
        )
    if records_gradient(input, mask):
        output: Tensor = MaskedSoftmaxFunction.apply(  # type: ignore[no-untyped-call]
            input, mask, scale, causal_offset, output_dtype
        )
        return output
    return masked_forward_op(input, mask, scale, causal_offset, output_dtype)  # type: ignore[no-any-return]


def _validated_masked(
    input: Tensor, mask: Tensor | None, dim: int, is_causal: bool, causal_alignment: str
) -> int:
    """``dim`` from 0 on, after checking that all arguments fit each other."""
    name = "masked_softmax"
    if input.dtype not in FLOATING:
        raise NotImplementedError(
            f"{name}: input must be fp32, fp64, fp16 or bf16, got {input.dtype}"
        )
    dim = _wrapped(name, dim, input.dim())
    if causal_alignment not in ALIGNMENTS:
        raise ValueError(
            f"{name}: causal_alignment must be one of {', '.join(ALIGNMENTS)}, "
            f"got {causal_alignment!r}"
        )
    if is_causal and (input.dim() < 2 or dim != input.dim() - 1):
        raise ValueError(
            f"{name}: is_causal wants an input [..., rows, columns] and the last dim, "
            f"got dim {dim} of {list(input.shape)}"
        )
    if mask is None:
        return dim
    if mask.dtype != torch.bool and mask.dtype not in FLOATING:
        raise RuntimeError(f"{name}: mask must be boolean or floating point, got {mask.dtype}")
    if mask.device != input.device:
        raise RuntimeError(
            f"{name}: mask must be on the input's device {input.device}, got {mask.device}"
        )
    wanted, given = input.shape, mask.shape
    trailing = wanted[len(wanted) - len(given) :] if len(given) <= len(wanted) else ()
    if len(given) > len(wanted) or any(
        size not in (1, full) for size, full in zip(given, trailing, strict=True)
    ):
        raise RuntimeError(
            f"{name}: mask of shape {list(given)} does not broadcast to the input's {list(wanted)}"
        )
    return dim
