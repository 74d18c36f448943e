"""The layer_norm ops: schemas, fakes, candidates, autograd.

One forward and one backward op serve the whole family: LayerNorm and RMSNorm, plain and with a
residual (AddNorm)::

    x      = residual + dropout(input)        (x = input without a residual)
    output = (x - mean) * rstd * weight + bias

An output that a call does not have is an empty tensor. The public functions are in
``fastseq/functional/layer_norm.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Candidate
from ..random import keep_mask, keep_scale, threshold
from ..reference import layer_norm as reference
from ..reference.layer_norm import compute_dtype
from ..rows import as_rows, flat
from ._op import define_op, differentiable_gradients, extension_op, function_backward

_extension_forward = extension_op("layer_norm_forward")
_extension_backward = extension_op("layer_norm_backward")
Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]


def _1d(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.reshape(-1)


# --- forward -------------------------------------------------------------------------------------

_FORWARD = """_layer_norm_fwd(
    Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed,
    SymInt row_length, float eps, bool rms, float dropout_p,
    ScalarType output_dtype, ScalarType residual_dtype
) -> (Tensor output, Tensor new_residual, Tensor mean, Tensor rstd)"""


class Forward(NamedTuple):
    """The arguments of the forward op; shapes in ``functional/layer_norm.py``."""

    input: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    row_length: int
    eps: float
    rms: bool
    dropout_p: float
    output_dtype: torch.dtype
    residual_dtype: torch.dtype


def _forward_outputs(a: Forward) -> Tensors4:
    """Uninitialised outputs, the fake's too; statistics are ``[rows]``, and RMSNorm has no mean."""
    rows = a.input.numel() // a.row_length
    stats = compute_dtype(a.input.dtype)
    residual_shape = (0,) if a.residual is None else a.input.shape
    empty = a.input.new_empty
    return (
        empty(a.input.shape, dtype=a.output_dtype),
        empty(residual_shape, dtype=a.residual_dtype),
        empty(0 if a.rms else rows, dtype=stats),
        empty(rows, dtype=stats),
    )


def _forward_by_triton(a: Forward) -> Tensors4:
    from ..kernels import layer_norm  # here, not above: without Triton the rest still works

    outputs = _forward_outputs(a)
    if a.input.numel():
        layer_norm.forward(
            as_rows(a.input, a.row_length),
            None if a.residual is None else as_rows(a.residual, a.row_length),
            flat(a.weight),
            flat(a.bias),
            a.seed,
            *outputs,
            a.row_length,
            a.eps,
            a.rms,
            *_dropout(a),
        )
    return outputs


def _forward_by_extension(a: Forward) -> Tensors4:
    output, new_residual, mean, rstd = _extension_forward(
        as_rows(a.input, a.row_length),
        None if a.residual is None else as_rows(a.residual, a.row_length),
        flat(a.weight),
        flat(a.bias),
        a.seed,
        a.row_length,
        a.eps,
        a.rms,
        *_dropout(a),
        a.output_dtype,
        a.residual_dtype,
    )
    if output.shape != a.input.shape:  # a strided input went in as its rows
        output = output.view(a.input.shape)
        new_residual = new_residual if a.residual is None else new_residual.view(a.input.shape)
    return output, new_residual, mean, rstd


def _forward_by_torch(a: Forward) -> Tensors4:
    x = a.input if a.residual is None else (a.residual + a.input).to(a.residual_dtype)
    rows = x.reshape(-1, a.row_length).to(torch.promote_types(x.dtype, a.output_dtype))
    weight, bias, shape = _for_torch(a.weight, rows), _for_torch(a.bias, rows), [a.row_length]
    if a.rms:
        output, rstd = torch.ops.aten._fused_rms_norm(rows, shape, weight, a.eps)
        mean = rstd[:0]
    else:
        output, mean, rstd = torch.native_layer_norm(rows, shape, weight, bias, a.eps)
    new_residual = x.contiguous() if a.residual is not None else x.new_empty(0)
    stats = compute_dtype(a.input.dtype)
    return (
        output.view(a.input.shape).to(a.output_dtype),
        new_residual.to(a.residual_dtype),
        mean.to(stats).view(-1),
        rstd.to(stats).view(-1),
    )


def _for_torch(parameter: Tensor | None, rows: Tensor) -> Tensor | None:
    """A parameter in a dtype that torch's op takes beside these rows."""
    if parameter is None:
        return None
    mixed = rows.is_cpu and parameter.dtype == torch.float32 and rows.dtype != torch.float64
    return _1d(parameter if mixed else parameter.to(rows.dtype))


def _forward_by_reference(a: Forward) -> Tensors4:
    rows, shape = a.input.reshape(-1, a.row_length), (a.row_length,)
    weight, bias = _1d(a.weight), _1d(a.bias)
    if a.residual is None:
        x, new_residual = rows, a.input.new_empty(0, dtype=a.residual_dtype)
        output = reference.layer_norm(
            rows, shape, weight, bias, a.eps, rms=a.rms, output_dtype=a.output_dtype
        )
    else:
        output, x = reference.add_layer_norm(
            rows,
            a.residual.reshape(-1, a.row_length),
            shape,
            weight,
            bias,
            a.eps,
            rms=a.rms,
            dropout_p=a.dropout_p,
            seed=a.seed,
            output_dtype=a.output_dtype,
            residual_dtype=a.residual_dtype,
        )
        new_residual = x.view(a.input.shape)
    mean, rstd = reference.statistics(x, shape, a.eps, a.rms)
    mean = mean[:0] if a.rms else mean
    return output.view(a.input.shape), new_residual, mean[:, 0], rstd[:, 0]


# --- backward ------------------------------------------------------------------------------------

_BACKWARD = """_layer_norm_bwd(
    Tensor grad_output, Tensor? grad_new_residual, Tensor x, Tensor? weight, Tensor? bias,
    Tensor mean, Tensor rstd, Tensor? seed,
    SymInt row_length, float dropout_p, ScalarType input_dtype, bool[4] wanted
) -> (Tensor grad_x, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"""


class Backward(NamedTuple):
    """The arguments of the backward op; ``x`` is the input, or the new residual if there is one."""

    grad_output: Tensor
    grad_new_residual: Tensor | None
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    seed: Tensor | None
    row_length: int
    dropout_p: float
    input_dtype: torch.dtype
    wanted: Sequence[bool]


def _backward_outputs(a: Backward) -> Tensors4:
    """Uninitialised gradients: of x, of the input where that differs, of weight and bias."""

    def like(tensor: Tensor | None, want: bool, dtype: torch.dtype | None = None) -> Tensor:
        if tensor is None or not want:
            return a.x.new_empty(0, dtype=dtype)
        return tensor.new_empty(tensor.shape, dtype=dtype)

    return (
        like(a.x, a.wanted[0]),
        like(a.x, a.wanted[1], a.input_dtype),
        like(a.weight, a.wanted[2]),
        like(a.bias, a.wanted[3]),
    )


def _backward_by_triton(a: Backward) -> Tensors4:
    from ..kernels import layer_norm_backward

    outputs = _backward_outputs(a)
    if not a.x.numel():
        return _without_rows(outputs)
    stream = a.grad_new_residual
    layer_norm_backward.backward(
        as_rows(a.grad_output, a.row_length),
        None if stream is None else as_rows(stream, a.row_length),
        as_rows(a.x, a.row_length),
        flat(a.weight),
        a.mean,
        a.rstd,
        a.seed,
        *outputs,
        a.row_length,
        *_dropout(a),
    )
    return outputs


def _backward_by_extension(a: Backward) -> Tensors4:
    if not a.x.numel():
        return _without_rows(_backward_outputs(a))
    stream = a.grad_new_residual
    wanted = sum(bit for bit, want in zip((1, 2, 4, 8), a.wanted, strict=True) if want)
    outputs: Tensors4 = _extension_backward(
        as_rows(a.grad_output, a.row_length),
        None if stream is None else as_rows(stream, a.row_length),
        as_rows(a.x, a.row_length),
        flat(a.weight),
        flat(a.bias),
        a.mean,
        a.rstd,
        a.seed,
        a.row_length,
        *_dropout(a),
        a.input_dtype,
        wanted,
    )
    if a.x.is_contiguous():
        return outputs
    grad_x, grad_input, grad_weight, grad_bias = outputs
    return (
        grad_x.view(a.x.shape) if a.wanted[0] else grad_x,
        grad_input.view(a.x.shape) if a.wanted[1] else grad_input,
        grad_weight,
        grad_bias,
    )


def _without_rows(outputs: Tensors4) -> Tensors4:
    """Sums over no rows are zero."""
    for grad in outputs[2:]:
        grad.zero_()
    return outputs


def _backward_by_torch(a: Backward) -> Tensors4:
    dtype = torch.promote_types(a.x.dtype, a.grad_output.dtype)
    rows = a.x.reshape(-1, a.row_length).to(dtype)
    weight, bias = _for_torch(a.weight, rows), _for_torch(a.bias, rows)
    # On the CPU torch keeps the statistics in the dtype of input and weight where these agree.
    stats = dtype if rows.is_cpu and (weight is None or weight.dtype == dtype) else a.mean.dtype
    grads = torch.ops.aten.native_layer_norm_backward(
        a.grad_output.reshape(-1, a.row_length).to(dtype),
        rows,
        [a.row_length],
        a.mean.view(-1, 1).to(stats),
        a.rstd.view(-1, 1).to(stats),
        weight,
        bias,
        [True, weight is not None and a.wanted[2], bias is not None and a.wanted[3]],
    )
    return _declared_gradients(a, *grads)


def _backward_by_reference(a: Backward) -> Tensors4:
    rms = not a.mean.numel()
    grads = reference.layer_norm_backward(
        a.grad_output.reshape(-1, a.row_length),
        a.x.reshape(-1, a.row_length),
        _1d(a.weight),
        torch.zeros_like(a.rstd)[:, None] if rms else a.mean[:, None],
        a.rstd[:, None],
        (a.row_length,),
        rms=rms,
    )
    return _declared_gradients(a, *grads)


def _declared_gradients(
    a: Backward, grad_x: Tensor, grad_weight: Tensor | None, grad_bias: Tensor | None
) -> Tensors4:
    """Adds the residual's gradient, applies dropout, and brings all into the layout of the fake."""
    if a.grad_new_residual is not None:
        grad_x = grad_x + a.grad_new_residual.reshape(grad_x.shape)
    grad_input = grad_x
    if a.seed is not None:
        keep = keep_mask(a.seed, (a.rstd.numel(), a.row_length), a.dropout_p)
        grad_input = torch.where(keep, grad_x * keep_scale(a.dropout_p), 0.0)
    outputs = _backward_outputs(a)
    for output, grad in zip(outputs, (grad_x, grad_input, grad_weight, grad_bias), strict=True):
        if output.numel() and grad is not None:
            output.copy_(grad.reshape(output.shape))
    return outputs


def _dropout(a: Forward | Backward) -> tuple[int, float]:
    return (0, 1.0) if a.seed is None else (threshold(a.dropout_p), keep_scale(a.dropout_p))


# --- candidates ----------------------------------------------------------------------------------


def _triton_rejects(a: Forward | Backward) -> str | None:
    x = a.input if isinstance(a, Forward) else a.x
    return "no fp64 kernel" if x.dtype == torch.float64 else None


def _cuda_rejects(a: Forward | Backward) -> str | None:
    if any(p is not None and p.dtype == torch.float64 for p in (a.weight, a.bias)):
        return "no kernel for fp64 parameters"
    return _triton_rejects(a)


def _torch_rejects(a: Forward | Backward) -> str | None:
    if a.seed is not None:
        return "torch's dropout draws another mask"
    if isinstance(a, Backward) and not a.mean.numel():
        return "torch has no op for the backward of rms_norm"
    return None


forward_op = define_op(
    _FORWARD,
    Forward,
    _forward_outputs,
    (
        Candidate("cpu", _forward_by_extension),
        Candidate("triton", _forward_by_triton, _triton_rejects),
        Candidate("cuda", _forward_by_extension, _cuda_rejects),
        Candidate("torch", _forward_by_torch, _torch_rejects),
        Candidate("reference", _forward_by_reference),
    ),
)

backward_op = define_op(
    _BACKWARD,
    Backward,
    _backward_outputs,
    (
        Candidate("cpu", _backward_by_extension),
        Candidate("triton", _backward_by_triton, _triton_rejects),
        Candidate("cuda", _backward_by_extension, _cuda_rejects),
        Candidate("torch", _backward_by_torch, _torch_rejects),
        Candidate("reference", _backward_by_reference),
    ),
)


# --- autograd ------------------------------------------------------------------------------------


class LayerNormFunction(torch.autograd.Function):
    """Saves x and one or two statistics a row; with a residual, x is the second output itself."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        normalized_shape: tuple[int, ...],
        row_length: int,
        eps: float,
        rms: bool,
        dropout_p: float,
        output_dtype: torch.dtype,
        residual_dtype: torch.dtype,
    ) -> Tensor | tuple[Tensor, Tensor]:
        output, new_residual, mean, rstd = forward_op(
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
        x = input if residual is None else new_residual
        ctx.save_for_backward(x, weight, bias, mean, rstd, seed)
        ctx.normalized_shape, ctx.row_length, ctx.eps, ctx.rms = (
            normalized_shape,
            row_length,
            eps,
            rms,
        )
        ctx.dropout_p, ctx.input_dtype = dropout_p, input.dtype
        ctx.set_materialize_grads(False)
        return output if residual is None else (output, new_residual)

    @staticmethod
    @function_backward
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_new_residual: Tensor | None = None
    ) -> tuple[Any, ...]:
        x, weight, bias, mean, rstd, seed = ctx.saved_tensors
        if grad_output is None:
            if grad_new_residual is None:
                return (None,) * 12
            grad_output = torch.zeros_like(x, dtype=ctx.input_dtype)
        need_input, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]

        # With create_graph the gradient must be differentiable itself: the reference is.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            norm = partial(reference.layer_norm, rms=ctx.rms, output_dtype=grad_output.dtype)
            grad_x, grad_weight, grad_bias = differentiable_gradients(
                lambda x, weight, bias: norm(x, ctx.normalized_shape, weight, bias, ctx.eps),
                (x, weight, bias),
                (need_input or need_residual, need_weight, need_bias),
                grad_output,
            )
            if grad_x is not None and grad_new_residual is not None:
                grad_x = grad_x + grad_new_residual
            grad_input = grad_x
            if seed is not None and grad_x is not None:
                keep = reference.dropout_mask(
                    seed, tuple(x.shape), ctx.normalized_shape, ctx.dropout_p
                )
                grad_input = grad_x * keep * keep_scale(ctx.dropout_p)
            if grad_input is not None:
                grad_input = grad_input.to(ctx.input_dtype)
        else:
            # One tensor serves both gradients unless dropout or dtype tells them apart.
            separate = seed is not None or x.dtype != ctx.input_dtype
            wanted = (
                need_residual or (need_input and not separate),
                need_input and separate,
                need_weight,
                need_bias,
            )
            grad_x, grad_input, grad_weight, grad_bias = backward_op(
                grad_output,
                grad_new_residual,
                x,
                weight,
                bias,
                mean,
                rstd,
                seed,
                ctx.row_length,
                ctx.dropout_p,
                ctx.input_dtype,
                wanted,
            )
            if not separate:
                grad_input = grad_x
        return (
            grad_input if need_input else None,
            grad_x if need_residual else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            *(None,) * 8,
        )
