"""layer_norm, rms_norm and their AddNorm forms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import current_backend, note
from ..ops.layer_norm import LayerNormFunction, forward_op
from ..random import draw_seed
from ..reference import layer_norm as reference
from ._dispatch import FLOATING, autocast_to_fp32, is_foreign, is_transformed, records_gradient


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Layer normalization over the trailing dimensions, as :func:`torch.nn.functional.layer_norm`.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot \gamma + \beta

    Args:
        input: ``[*, *normalized_shape]``; fp32, fp64, fp16 or bf16; any strides.
        normalized_shape: the trailing dimensions that make up a row.
        weight: :math:`\gamma`, of shape ``normalized_shape``, or None; any floating dtype.
        bias: :math:`\beta`, likewise.
        eps: added to the (biased) variance.

    Returns:
        A contiguous tensor of the input's shape and dtype (fp32 under CUDA autocast). Statistics
        and arithmetic are fp32, or fp64 for fp64 input.

    Raises:
        RuntimeError: ``normalized_shape`` does not match the input, or a parameter that shape.
        NotImplementedError: the input is not floating point.

    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016, eq. 3-4.
    """
    if is_foreign(input, weight, bias):
        note("layer_norm", "torch", "a tensor subclass, layout or trace that torch must handle")
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return _norm("layer_norm", input, normalized_shape, weight, bias, eps, rms=False)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    r"""Root-mean-square normalization, as :func:`torch.nn.functional.rms_norm`.

    .. math:: y = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot \gamma

    Args:
        input: ``[*, *normalized_shape]``; fp32, fp64, fp16 or bf16; any strides.
        normalized_shape: the trailing dimensions that make up a row.
        weight: :math:`\gamma`, of shape ``normalized_shape``, or None; any floating dtype.
        eps: added to the mean square; None means the machine epsilon of the arithmetic, fp32's
            1.19e-7 (fp64's for fp64 input), as torch.

    Returns:
        A contiguous tensor of the input's shape and dtype (fp32 under CUDA autocast).

    Raises:
        RuntimeError, NotImplementedError: as :func:`layer_norm`.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4.
    """
    if is_foreign(input, weight):
        note("rms_norm", "torch", "a tensor subclass, layout or trace that torch must handle")
        return F.rms_norm(input, normalized_shape, weight, eps)
    return _norm("rms_norm", input, normalized_shape, weight, None, eps, rms=True)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    residual_in_fp32: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""AddNorm in one pass: dropout, residual add and layer norm, both results returned.

    .. math:: r = \mathrm{residual} + \mathrm{dropout}(x), \qquad y = \mathrm{LayerNorm}(r)

    Equal to ``r = residual + F.dropout(input, dropout_p, training)`` and then
    ``F.layer_norm(r, ...)``, without writing and reading ``r`` in between. The dropout mask is a
    function of a seed drawn from torch's generator and the position alone; it is not stored.

    Args:
        input: the branch, ``[*, *normalized_shape]``.
        residual: the stream it is added to: the input's shape, device and dtype, or fp32.
        normalized_shape, weight, bias, eps: as :func:`layer_norm`.
        dropout_p: probability of zeroing an element of ``input``; the others are scaled by
            ``1 / (1 - dropout_p)``.
        training: without it nothing is dropped.
        residual_in_fp32: return (and normalize) the residual in fp32 whatever the input's dtype; so
            it is too where the residual that comes in is fp32.

    Returns:
        ``(output, new_residual)``, both differentiable. ``output`` has the input's dtype (fp32
        under CUDA autocast).

    Raises:
        ValueError: ``dropout_p`` outside [0, 1].
        RuntimeError: the residual's shape, device or dtype does not fit; as :func:`layer_norm`.
    """
    return _add_norm(
        "add_layer_norm",
        input,
        residual,
        normalized_shape,
        weight,
        bias,
        eps,
        dropout_p=dropout_p,
        training=training,
        residual_in_fp32=residual_in_fp32,
        rms=False,
    )


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    residual_in_fp32: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""AddNorm with :func:`rms_norm`; arguments, results and errors as :func:`add_layer_norm`.

    .. math:: r = \mathrm{residual} + \mathrm{dropout}(x), \qquad y = \mathrm{RMSNorm}(r)
    """
    return _add_norm(
        "add_rms_norm",
        input,
        residual,
        normalized_shape,
        weight,
        None,
        eps,
        dropout_p=dropout_p,
        training=training,
        residual_in_fp32=residual_in_fp32,
        rms=True,
    )


def _norm(
    name: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    *,
    rms: bool,
) -> Tensor:
    shape = _validated_shape(name, input, normalized_shape, weight, bias)
    if eps is None:
        eps = _default_eps(input.dtype)
    output_dtype = torch.float32 if autocast_to_fp32(input) else input.dtype
    row_length = math.prod(shape)
    records = records_gradient(input, weight, bias)
    if not rms and _torch_is_quicker(records, input, weight, bias):
        note(name, "torch", "so small that the call costs more than the kernel saves")
        return torch.layer_norm(input, shape, weight, bias, eps)
    if row_length == 0 or is_transformed():
        note(name, "reference", "rows of length 0, torch.func or forward-mode AD")
        return reference.layer_norm(
            input, shape, weight, bias, eps, rms=rms, output_dtype=output_dtype
        )
    if records:
        output: Tensor = LayerNormFunction.apply(  # type: ignore[no-untyped-call]
            input,
            None,
            weight,
            bias,
            None,
            shape,
            row_length,
            eps,
            rms,
            0.0,
            output_dtype,
            input.dtype,
        )
        return output
    return forward_op(  # type: ignore[no-any-return]
        input, None, weight, bias, None, row_length, eps, rms, 0.0, output_dtype, input.dtype
    )[0]


def _torch_is_quicker(records: bool, input: Tensor, *others: Tensor | None) -> bool:
    """Whether torch's LayerNorm, C++ throughout, is done before ours has come through Python.

    Measured on one core of an AVX-512 EPYC in fp32: ours is ahead from 50 thousand elements on
    forward and from 150 thousand on with the backward; torch takes twice as long in 16 bits. With
    more threads there is less to save in the same time.
    """
    if not input.is_cpu or current_backend() != "auto" or torch.compiler.is_compiling():
        return False
    limit = (150_000 if records else 50_000) * torch.get_num_threads()
    if input.numel() >= (limit if input.element_size() >= 4 else limit // 4):
        return False
    # torch takes fewer mixtures of dtypes than we do.
    return all(other is None or other.dtype == input.dtype for other in others)


def _add_norm(
    name: str,
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    *,
    dropout_p: float,
    training: bool,
    residual_in_fp32: bool,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name}: dropout_p must be between 0 and 1, got {dropout_p}")
    shape = _validated_shape(name, input, normalized_shape, weight, bias)
    _validate_residual(name, input, residual)
    if eps is None:
        eps = _default_eps(input.dtype)
    dropout_p = dropout_p if training else 0.0
    if is_foreign(input, residual, weight, bias):
        note(name, "torch", "a tensor subclass, layout or trace that torch must handle")
        return _add_norm_by_torch(
            input, residual, shape, weight, bias, eps, dropout_p, residual_in_fp32, rms
        )
    records = records_gradient(input, residual, weight, bias)
    plain = not rms and dropout_p == 0.0 and not residual_in_fp32
    if plain and _torch_is_quicker(records, input, residual, weight, bias):
        note(name, "torch", "so small that the call costs more than the kernel saves")
        return _add_norm_by_torch(
            input, residual, shape, weight, bias, eps, dropout_p, residual_in_fp32, rms
        )
    output_dtype = torch.float32 if autocast_to_fp32(input) else input.dtype
    wide = residual_in_fp32 and input.dtype != torch.float64
    residual_dtype = torch.float32 if wide else residual.dtype
    seed = draw_seed(input.device) if dropout_p > 0.0 else None
    row_length = math.prod(shape)
    if row_length == 0 or is_transformed():
        note(name, "reference", "rows of length 0, torch.func or forward-mode AD")
        return reference.add_layer_norm(
            input,
            residual,
            shape,
            weight,
            bias,
            eps,
            rms=rms,
            dropout_p=dropout_p,
            seed=seed,
            output_dtype=output_dtype,
            residual_dtype=residual_dtype,
        )
    if records:
        outputs: tuple[Tensor, Tensor] = LayerNormFunction.apply(  # type: ignore[no-untyped-call]
            input,
            residual,
            weight,
            bias,
            seed,
            shape,
            row_length,
            eps,
            rms,
            dropout_p,
            output_dtype,
            residual_dtype,
        )
        return outputs
    output, new_residual, _, _ = forward_op(
        input,
        residual,
        weight,
        bias,
        seed,
        row_length,
        eps,
        rms,
        dropout_p,
        output_dtype,
        residual_dtype,
    )
    return output, new_residual


def _add_norm_by_torch(
    input: Tensor,
    residual: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    residual_in_fp32: bool,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    if residual_in_fp32 and residual.dtype != torch.float64:
        residual = residual.float()
    new_residual = residual + (F.dropout(input, dropout_p) if dropout_p else input)
    if rms:
        output = F.rms_norm(new_residual, list(shape), weight, eps)
    else:
        output = F.layer_norm(new_residual, list(shape), weight, bias, eps)
    return output.to(input.dtype), new_residual


def _default_eps(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _validated_shape(
    name: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[int, ...]:
    """``normalized_shape`` as a tuple, after checking that all arguments fit each other."""
    if isinstance(normalized_shape, int):
        raise TypeError(
            f"{name}: normalized_shape must be a sequence of ints, got the int {normalized_shape}"
        )
    shape = tuple(normalized_shape)
    if not shape:
        raise RuntimeError(f"{name}: normalized_shape must have at least one dimension, got ()")
    if input.shape[-len(shape) :] != shape:
        expected = ", ".join(["*", *map(str, shape)])
        raise RuntimeError(
            f"{name}: normalized_shape={list(shape)} wants an input of shape [{expected}], "
            f"got {list(input.shape)}"
        )
    if input.dtype not in FLOATING:
        raise NotImplementedError(
            f"{name}: input must be fp32, fp64, fp16 or bf16, got {input.dtype}"
        )
    if weight is not None:
        _validate_parameter(name, "weight", weight, shape, input.device)
    if bias is not None:
        _validate_parameter(name, "bias", bias, shape, input.device)
    return shape


def _validate_parameter(
    name: str, role: str, parameter: Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    if parameter.shape != shape:
        raise RuntimeError(
            f"{name}: {role} must have the shape of normalized_shape, {list(shape)}, "
            f"got {list(parameter.shape)}"
        )
    if parameter.device != device:
        raise RuntimeError(
            f"{name}: {role} must be on the input's device {device}, got {parameter.device}"
        )
    if parameter.dtype not in FLOATING:
        raise NotImplementedError(
            f"{name}: {role} must be fp32, fp64, fp16 or bf16, got {parameter.dtype}"
        )


def _validate_residual(name: str, input: Tensor, residual: Tensor) -> None:
    if residual.shape != input.shape:
        raise RuntimeError(
            f"{name}: residual must have the input's shape {list(input.shape)}, "
            f"got {list(residual.shape)}"
        )
    if residual.device != input.device:
        raise RuntimeError(
            f"{name}: residual must be on the input's device {input.device}, got {residual.device}"
        )
    if residual.dtype != input.dtype and not (
        residual.dtype == torch.float32 and input.dtype in (torch.float16, torch.bfloat16)
    ):
        raise RuntimeError(
            f"{name}: residual must have the input's dtype {input.dtype} or be a float32 stream "
            f"for 16-bit input, got {residual.dtype}"
        )
