"""The layer_norm ops: schemas, fakes, candidates, autograd.

One forward and one backward op serve the whole family: LayerNorm and RMSNorm, plain and with a
residual (AddNorm)::

    x      = residual + dropout(input)        (x = input without a residual)
    output = (x - mean) * rstd * weight + bias

Outputs are allocated here, in one place for the fakes and every kernel; a *launcher* (Triton, CUDA or
C++, all with one signature) fills them. An output that a call does not have is an empty tensor. The
public functions are in ``fastseq/functional/layer_norm.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Candidate, cpu_rejects, cuda_rejects, triton_rejects
from ..random import keep_mask, keep_scale, threshold
from ..reference import layer_norm as reference
from ..reference.layer_norm import compute_dtype
from ..rows import as_rows, flat
from ._op import define_op, differentiable_gradients

Launcher = Callable[..., None]
Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]


# --- forward -------------------------------------------------------------------------------------

_FORWARD = """_layer_norm_fwd(
    Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed,
    SymInt row_length, float eps, bool rms, float dropout_p,
    ScalarType output_dtype, ScalarType residual_dtype
) -> (Tensor output, Tensor new_residual, Tensor mean, Tensor rstd)"""


def _forward_outputs(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    row_length: int,
    eps: float,
    rms: bool,
    dropout_p: float,
    output_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> Tensors4:
    """Uninitialised outputs; statistics are ``[rows]``, and RMSNorm has no mean."""
    rows = input.numel() // row_length
    stats = compute_dtype(input.dtype)
    return (
        torch.empty(input.shape, dtype=output_dtype, device=input.device),
        torch.empty(
            0 if residual is None else input.shape, dtype=residual_dtype, device=input.device
        ),
        torch.empty(0 if rms else rows, dtype=stats, device=input.device),
        torch.empty(rows, dtype=stats, device=input.device),
    )


def _forward_by(launch: Launcher) -> Callable[..., Tensors4]:
    def forward(
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        row_length: int,
        eps: float,
        rms: bool,
        dropout_p: float,
        *dtypes: torch.dtype,
    ) -> Tensors4:
        outputs = _forward_outputs(
            input, residual, weight, bias, seed, row_length, eps, rms, dropout_p, *dtypes
        )
        if input.numel():
            launch(
                as_rows(input, row_length),
                None if residual is None else as_rows(residual, row_length),
                flat(weight),
                flat(bias),
                seed,
                *outputs,
                row_length,
                eps,
                rms,
                threshold(dropout_p),
                keep_scale(dropout_p),
            )
        return outputs

    return forward


def _forward_by_torch(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    row_length: int,
    eps: float,
    rms: bool,
    dropout_p: float,
    output_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> Tensors4:
    stats = compute_dtype(input.dtype)
    x = input if residual is None else (residual + input).to(residual_dtype)
    rows = x.reshape(-1, row_length).to(output_dtype)
    parameters = [None if p is None else flat(p).to(output_dtype) for p in (weight, bias)]
    if rms:
        output, rstd = torch.ops.aten._fused_rms_norm(rows, [row_length], parameters[0], eps)
        mean = rstd[:0]
    else:
        output, mean, rstd = torch.native_layer_norm(rows, [row_length], *parameters, eps)
    new_residual = x.new_empty(0, dtype=residual_dtype) if residual is None else x.contiguous()
    return (
        output.view(input.shape),
        new_residual,
        mean.to(stats).view(-1),
        rstd.to(stats).view(-1),
    )


def _forward_by_reference(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    row_length: int,
    eps: float,
    rms: bool,
    dropout_p: float,
    output_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> Tensors4:
    rows, shape = input.reshape(-1, row_length), (row_length,)
    weight, bias = flat(weight), flat(bias)
    if residual is None:
        x, new_residual = rows, input.new_empty(0, dtype=residual_dtype)
        output = reference.layer_norm(
            rows, shape, weight, bias, eps, rms=rms, output_dtype=output_dtype
        )
    else:
        output, x = reference.add_layer_norm(
            rows,
            residual.reshape(-1, row_length),
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
        new_residual = x.view(input.shape)
    mean, rstd = reference.statistics(x, shape, eps, rms)
    return output.view(input.shape), new_residual, (mean[:0] if rms else mean)[:, 0], rstd[:, 0]


# --- backward ------------------------------------------------------------------------------------

_BACKWARD = """_layer_norm_bwd(
    Tensor grad_output, Tensor? grad_new_residual, Tensor x, Tensor? weight, Tensor? bias,
    Tensor mean, Tensor rstd, Tensor? seed,
    SymInt row_length, float dropout_p, ScalarType input_dtype, bool[4] wanted
) -> (Tensor grad_x, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"""


def _backward_outputs(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    row_length: int,
    dropout_p: float,
    input_dtype: torch.dtype,
    wanted: Sequence[bool],
) -> Tensors4:
    """Uninitialised gradients: of x, of the input where that differs, of weight and bias."""

    def like(tensor: Tensor | None, want: bool, dtype: torch.dtype | None = None) -> Tensor:
        if tensor is None or not want:
            return torch.empty(0, dtype=dtype or x.dtype, device=x.device)
        return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=x.device)

    return (
        like(x, wanted[0]),
        like(x, wanted[1], input_dtype),
        like(weight, wanted[2]),
        like(bias, wanted[3]),
    )


def _backward_by(launch: Launcher) -> Callable[..., Tensors4]:
    def backward(
        grad_output: Tensor,
        grad_new_residual: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        seed: Tensor | None,
        row_length: int,
        dropout_p: float,
        input_dtype: torch.dtype,
        wanted: Sequence[bool],
    ) -> Tensors4:
        outputs = _backward_outputs(
            grad_output,
            grad_new_residual,
            x,
            weight,
            bias,
            mean,
            rstd,
            seed,
            row_length,
            dropout_p,
            input_dtype,
            wanted,
        )
        if x.numel():
            launch(
                as_rows(grad_output, row_length),
                None if grad_new_residual is None else as_rows(grad_new_residual, row_length),
                as_rows(x, row_length),
                flat(weight),
                mean,
                rstd,
                seed,
                *outputs,
                row_length,
                threshold(dropout_p),
                keep_scale(dropout_p),
            )
        else:
            for grad in outputs[2:]:
                grad.zero_()
        return outputs

    return backward


def _backward_by_torch(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    row_length: int,
    dropout_p: float,
    input_dtype: torch.dtype,
    wanted: Sequence[bool],
) -> Tensors4:
    dtype = grad_output.dtype
    low_precision_stats = x.device.type == "cpu" and (weight is None or weight.dtype == dtype)
    stats = dtype if low_precision_stats else mean.dtype
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_output.reshape(-1, row_length),
        x.reshape(-1, row_length).to(dtype),
        [row_length],
        mean.view(-1, 1).to(stats),
        rstd.view(-1, 1).to(stats),
        flat(weight),
        flat(bias),
        [True, weight is not None and wanted[2], bias is not None and wanted[3]],
    )
    return _finish_backward(
        grad_x, grad_weight, grad_bias, grad_new_residual, x, weight, bias, None, wanted, input_dtype
    )


def _backward_by_reference(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    row_length: int,
    dropout_p: float,
    input_dtype: torch.dtype,
    wanted: Sequence[bool],
) -> Tensors4:
    rms = not mean.numel()
    grads = reference.layer_norm_backward(
        grad_output.reshape(-1, row_length),
        x.reshape(-1, row_length),
        flat(weight),
        torch.zeros_like(rstd)[:, None] if rms else mean[:, None],
        rstd[:, None],
        (row_length,),
        rms=rms,
    )
    kept = None
    if seed is not None:
        kept = keep_mask(seed, (rstd.numel(), row_length), dropout_p) * keep_scale(dropout_p)
    return _finish_backward(
        *grads, grad_new_residual, x, weight, bias, kept, wanted, input_dtype
    )


def _finish_backward(
    grad_x: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_new_residual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    wanted: Sequence[bool],
    input_dtype: torch.dtype,
) -> Tensors4:
    """Adds the residual's gradient, applies the dropout mask, and brings all to the fake's layout."""
    if grad_new_residual is not None:
        grad_x = grad_x + grad_new_residual.reshape(grad_x.shape)
    grad_input = grad_x if kept is None else grad_x * kept

    def declared(grad: Tensor | None, tensor: Tensor | None, want: bool, dtype: Any) -> Tensor:
        if grad is None or tensor is None or not want:
            return x.new_empty(0, dtype=dtype)
        return grad.to(dtype).reshape(tensor.shape).clone(memory_format=torch.contiguous_format)

    return (
        declared(grad_x, x, wanted[0], x.dtype),
        declared(grad_input, x, wanted[1], input_dtype),
        declared(grad_weight, weight, wanted[2], x.dtype if weight is None else weight.dtype),
        declared(grad_bias, bias, wanted[3], x.dtype if bias is None else bias.dtype),
    )


# --- launchers and candidates --------------------------------------------------------------------


def _triton_forward(*args: Any) -> None:
    from ..kernels import layer_norm  # here, not above: without Triton installed the rest works

    layer_norm.forward(*args)


def _triton_backward(*args: Any) -> None:
    from ..kernels import layer_norm

    layer_norm.backward(*args)


def _extension_forward(*args: Any) -> None:
    torch.ops.fastseq_C.layer_norm_forward(*args)


def _extension_backward(*args: Any) -> None:
    torch.ops.fastseq_C.layer_norm_backward(*args)


def _rejects_forward(
    device_rejects: Callable[[Tensor], str | None], fp64: bool
) -> Callable[..., str | None]:
    def rejects(input: Tensor, *rest: Any) -> str | None:
        if input.dtype == torch.float64 and not fp64:
            return "no fp64 kernel"
        return device_rejects(input)

    return rejects


def _rejects_backward(
    device_rejects: Callable[[Tensor], str | None], fp64: bool
) -> Callable[..., str | None]:
    forward = _rejects_forward(device_rejects, fp64)

    def rejects(grad_output: Tensor, grad_new_residual: Any, x: Tensor, *rest: Any) -> str | None:
        return forward(x)

    return rejects


def _torch_rejects_forward(
    input: Tensor, residual: Any, weight: Any, bias: Any, seed: Tensor | None, *rest: Any
) -> str | None:
    return None if seed is None else "torch's dropout draws another mask"


def _torch_rejects_backward(*args: Any) -> str | None:
    mean, seed = args[5], args[7]
    if seed is not None:
        return "torch's dropout draws another mask"
    return None if mean.numel() else "torch has no op for the backward of rms_norm"


def _never(*args: Any) -> None:
    return None


forward_op = define_op(
    _FORWARD,
    _forward_outputs,
    (
        Candidate("triton", _forward_by(_triton_forward), _rejects_forward(triton_rejects, False)),
        Candidate("cuda", _forward_by(_extension_forward), _rejects_forward(cuda_rejects, False)),
        Candidate("cpu", _forward_by(_extension_forward), _rejects_forward(cpu_rejects, True)),
        Candidate("torch", _forward_by_torch, _torch_rejects_forward),
        Candidate("reference", _forward_by_reference, _never),
    ),
)

backward_op = define_op(
    _BACKWARD,
    _backward_outputs,
    (
        Candidate("triton", _backward_by(_triton_backward), _rejects_backward(triton_rejects, False)),
        Candidate("cuda", _backward_by(_extension_backward), _rejects_backward(cuda_rejects, False)),
        Candidate("cpu", _backward_by(_extension_backward), _rejects_backward(cpu_rejects, True)),
        Candidate("torch", _backward_by_torch, _torch_rejects_backward),
        Candidate("reference", _backward_by_reference, _never),
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
            grad_x, grad_weight, grad_bias = differentiable_gradients(
                lambda *inputs: reference.layer_norm(
                    inputs[0],
                    ctx.normalized_shape,
                    *inputs[1:],
                    ctx.eps,
                    rms=ctx.rms,
                    output_dtype=grad_output.dtype,
                ),
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
