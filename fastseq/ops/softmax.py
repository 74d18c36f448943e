"""The softmax ops: schemas, fakes, candidates, autograd.

``_softmax_fwd`` and ``_softmax_bwd`` serve softmax and log_softmax along any dimension,
``_masked_softmax_fwd`` and ``_masked_softmax_bwd`` the masked softmax along the last::

    softmax         y = exp(x - max) / sum(exp(x - max))
    masked_softmax  the same of scale * x + mask over what takes part; 0 elsewhere

Backward needs the output alone. The public functions are in ``fastseq/functional/softmax.py``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Candidate, current_backend
from ..reference import softmax as reference
from ..reference.layer_norm import compute_dtype
from ..rows import as_rows, fold
from ._op import define_op, extension_op, function_backward

_extension_forward = extension_op("softmax_forward")
_extension_backward = extension_op("softmax_backward")
_extension_masked_forward = extension_op("masked_softmax_forward")


def _extents(tensor: Tensor, dim: int) -> tuple[int, int]:
    """The length of ``dim`` and how many elements lie behind it (1: its elements lie in a row)."""
    shape = tensor.shape
    return (shape[dim] if shape else 1), math.prod(shape[dim + 1 :])


def _rows(tensor: Tensor, length: int, inner: int) -> Tensor:
    """Rows of ``length`` elements, or where ``dim`` is not the last, of the ``inner`` behind it."""
    return as_rows(tensor, length if inner == 1 else inner)


# --- softmax and log_softmax ---------------------------------------------------------------------

_FORWARD = "_softmax_fwd(Tensor input, int dim, bool log, ScalarType output_dtype) -> Tensor"


class Forward(NamedTuple):
    """The arguments of the forward op; ``dim`` is not negative."""

    input: Tensor
    dim: int
    log: bool
    output_dtype: torch.dtype


def _forward_output(a: Forward) -> Tensor:
    """The uninitialised output, the fake's too."""
    return a.input.new_empty(a.input.shape, dtype=a.output_dtype)


def _forward_by_triton(a: Forward) -> Tensor:
    from ..kernels import softmax  # here, not above: without Triton the rest still works

    output = _forward_output(a)
    if output.numel():
        length, inner = _extents(a.input, a.dim)
        softmax.forward(_rows(a.input, length, inner), output, length, inner, a.log)
    return output


def _forward_by_extension(a: Forward) -> Tensor:
    if not a.input.numel():
        return _forward_output(a)
    length, inner = _extents(a.input, a.dim)
    rows = _rows(a.input, length, inner)
    output: Tensor = _extension_forward(rows, length, inner, a.log, a.output_dtype)
    return output if rows is a.input else output.view(a.input.shape)


def _forward_by_torch(a: Forward) -> Tensor:
    function = torch.ops.aten._log_softmax if a.log else torch.ops.aten._softmax
    output: Tensor = function(a.input.to(a.output_dtype), a.dim, False)
    return output


def _forward_by_reference(a: Forward) -> Tensor:
    return reference.softmax(a.input, a.dim, log=a.log, output_dtype=a.output_dtype).contiguous()


_BACKWARD = """_softmax_bwd(
    Tensor grad_output, Tensor output, int dim, bool log, ScalarType input_dtype
) -> Tensor"""


class Backward(NamedTuple):
    """The arguments of the backward op."""

    grad_output: Tensor
    output: Tensor
    dim: int
    log: bool
    input_dtype: torch.dtype


def _backward_output(a: Backward | MaskedBackward) -> Tensor:
    """The uninitialised gradient, the fake's too."""
    return a.output.new_empty(a.output.shape, dtype=a.input_dtype)


def _backward_by_triton(a: Backward) -> Tensor:
    from ..kernels import softmax

    grad_input = _backward_output(a)
    if grad_input.numel():
        length, inner = _extents(a.output, a.dim)
        softmax.backward(
            _rows(a.grad_output, length, inner),
            _rows(a.output, length, inner),
            grad_input,
            length,
            inner,
            a.log,
        )
    return grad_input


def _backward_by_extension(a: Backward) -> Tensor:
    if not a.output.numel():
        return _backward_output(a)
    length, inner = _extents(a.output, a.dim)
    grad_input: Tensor = _extension_backward(
        _rows(a.grad_output, length, inner),
        _rows(a.output, length, inner),
        length,
        inner,
        a.log,
        False,
        1.0,
        a.input_dtype,
    )
    return grad_input.view(a.output.shape)


def _backward_by_torch(a: Backward) -> Tensor:
    if a.log:
        function = torch.ops.aten._log_softmax_backward_data
    else:
        function = torch.ops.aten._softmax_backward_data
    dtype = a.output.dtype
    grad_input: Tensor = function(a.grad_output.to(dtype), a.output, a.dim, dtype)
    return grad_input.to(a.input_dtype)


def _backward_by_reference(a: Backward) -> Tensor:
    grad_input = reference.softmax_backward(a.grad_output, a.output, a.dim, log=a.log)
    return grad_input.to(a.input_dtype).contiguous()


# --- masked_softmax ------------------------------------------------------------------------------

_MASKED_FORWARD = """_masked_softmax_fwd(
    Tensor input, Tensor? mask, float scale, SymInt? causal_offset, ScalarType output_dtype
) -> Tensor"""


class MaskedForward(NamedTuple):
    """The arguments of the masked forward op, along the last dimension.

    ``mask`` broadcasts to the input; ``causal_offset``: row i of the last two dimensions sees the
    columns up to ``i + causal_offset``; None: all.
    """

    input: Tensor
    mask: Tensor | None
    scale: float
    causal_offset: int | None
    output_dtype: torch.dtype


def _masked_forward_output(a: MaskedForward) -> Tensor:
    return a.input.new_empty(a.input.shape, dtype=a.output_dtype)


def _mask_rows(a: MaskedForward) -> Tensor | None:
    """The mask as a view ``[*, *, *, length]`` whose leading dimensions are the rows of the input.

    Broadcast dimensions have stride 0. Leading dimensions fold together where their strides allow;
    should more than three be left, which takes an input of five dimensions, the mask is expanded.
    """
    if a.mask is None:
        return None
    mask = a.mask
    dtype = compute_dtype(a.input.dtype)
    if mask.dtype != torch.bool and torch.promote_types(mask.dtype, dtype) != dtype:
        mask = mask.to(dtype)  # an fp64 mask beside fp32 scores
    elif dtype == torch.float64 and mask.dtype not in (torch.bool, dtype):
        mask = mask.to(dtype)
    if mask.dim() and mask.shape[-1] > 1 and mask.stride(-1) not in (0, 1):
        mask = mask.contiguous()
    mask = mask.expand(a.input.shape)
    length = a.input.shape[-1]
    leading = fold(mask.shape[:-1], mask.stride()[:-1])
    if len(leading) > 3:
        mask = mask.contiguous()
        leading = [(mask.numel() // length, length)]
    leading = [(1, 0)] * (3 - len(leading)) + leading
    sizes, strides = zip(*leading, (length, mask.stride(-1)), strict=True)
    return mask.as_strided(sizes, strides)


def _masked_forward_by_triton(a: MaskedForward) -> Tensor:
    from ..kernels import softmax

    output = _masked_forward_output(a)
    if output.numel():
        softmax.masked_forward(
            as_rows(a.input, a.input.shape[-1]),
            _mask_rows(a),
            output,
            a.scale,
            0 if a.causal_offset is None else a.input.shape[-2],
            a.causal_offset or 0,
        )
    return output


def _masked_forward_by_extension(a: MaskedForward) -> Tensor:
    if not a.input.numel():
        return _masked_forward_output(a)
    length = a.input.shape[-1]
    output: Tensor = _extension_masked_forward(
        as_rows(a.input, length),
        _mask_rows(a),
        length,
        a.scale,
        0 if a.causal_offset is None else a.input.shape[-2],
        a.causal_offset or 0,
        a.output_dtype,
    )
    return output.view(a.input.shape)


def _masked_forward_by_torch(a: MaskedForward) -> Tensor:
    """Torch's own operations, in fp32 for 16-bit input so that the scaling is not rounded."""
    scores = a.input.to(compute_dtype(a.input.dtype)) * a.scale
    if a.mask is not None and a.mask.dtype == torch.bool:
        scores = scores.masked_fill(~a.mask, -math.inf)
    elif a.mask is not None:
        scores = (scores + a.mask).masked_fill(a.mask == -math.inf, -math.inf).to(scores.dtype)
    if a.causal_offset is not None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~seen.tril(a.causal_offset), -math.inf)
    output: Tensor = torch.ops.aten._safe_softmax(scores, -1)
    return output.to(a.output_dtype).contiguous()


def _masked_forward_by_reference(a: MaskedForward) -> Tensor:
    return reference.masked_softmax(
        a.input,
        a.mask,
        scale=a.scale,
        causal_offset=a.causal_offset,
        output_dtype=a.output_dtype,
    ).contiguous()


_MASKED_BACKWARD = """_masked_softmax_bwd(
    Tensor grad_output, Tensor output, float scale, ScalarType input_dtype
) -> Tensor"""


class MaskedBackward(NamedTuple):
    """The arguments of the masked backward op: where the output is 0, so is the gradient."""

    grad_output: Tensor
    output: Tensor
    scale: float
    input_dtype: torch.dtype


def _masked_backward_by_triton(a: MaskedBackward) -> Tensor:
    from ..kernels import softmax

    grad_input = _backward_output(a)
    if grad_input.numel():
        length = a.output.shape[-1]
        softmax.backward(
            as_rows(a.grad_output, length),
            as_rows(a.output, length),
            grad_input,
            length,
            1,
            False,
            masked=True,
            scale=a.scale,
        )
    return grad_input


def _masked_backward_by_extension(a: MaskedBackward) -> Tensor:
    if not a.output.numel():
        return _backward_output(a)
    length = a.output.shape[-1]
    grad_input: Tensor = _extension_backward(
        as_rows(a.grad_output, length),
        as_rows(a.output, length),
        length,
        1,
        False,
        True,
        a.scale,
        a.input_dtype,
    )
    return grad_input.view(a.output.shape)


def _masked_backward_by_reference(a: MaskedBackward) -> Tensor:
    grad_input = reference.softmax_backward(a.grad_output, a.output, -1, masked=True, scale=a.scale)
    return grad_input.to(a.input_dtype).contiguous()


# --- candidates ----------------------------------------------------------------------------------


def _fp64_rejects(a: Forward | MaskedForward) -> str | None:
    return "no fp64 kernel" if a.input.dtype == torch.float64 else None


def _fp64_backward_rejects(a: Backward | MaskedBackward) -> str | None:
    return "no fp64 kernel" if a.output.dtype == torch.float64 else None


def _cpu_rejects(a: Forward) -> str | None:
    """Measured on one core of an AVX-512 EPYC: in fp32 0.9 of torch's speed on rows of 64, 1.1
    to 1.2 on rows of 256."""
    if current_backend() != "auto" or a.input.dtype != torch.float32:
        return None
    length, inner = _extents(a.input, a.dim)
    return "torch is as fast on so short rows" if inner == 1 and length < 256 else None


def _cpu_backward_rejects(a: Backward) -> str | None:
    """Measured likewise: 0.7 to 1.0 of torch on rows below 4096 and 0.5 to 1.1 below 256 columns;
    1.3 on rows of 4096 in fp32, 1.5 to 2.7 on 256 columns and more."""
    if current_backend() != "auto":
        return None
    length, inner = _extents(a.output, a.dim)
    if inner == 1:
        return "torch is as fast on rows below 4096" if length < 4096 else None
    return "torch is as fast on fewer than 256 columns" if inner < 256 else None


forward_op = define_op(
    _FORWARD,
    Forward,
    _forward_output,
    (
        Candidate("cpu", _forward_by_extension, _cpu_rejects),
        Candidate("triton", _forward_by_triton, _fp64_rejects),
        Candidate("torch", _forward_by_torch),
        Candidate("reference", _forward_by_reference),
    ),
)

backward_op = define_op(
    _BACKWARD,
    Backward,
    _backward_output,
    (
        Candidate("cpu", _backward_by_extension, _cpu_backward_rejects),
        Candidate("triton", _backward_by_triton, _fp64_backward_rejects),
        Candidate("torch", _backward_by_torch),
        Candidate("reference", _backward_by_reference),
    ),
)

masked_forward_op = define_op(
    _MASKED_FORWARD,
    MaskedForward,
    _masked_forward_output,
    (
        Candidate("cpu", _masked_forward_by_extension),
        Candidate("triton", _masked_forward_by_triton, _fp64_rejects),
        Candidate("torch", _masked_forward_by_torch),
        Candidate("reference", _masked_forward_by_reference),
    ),
)

masked_backward_op = define_op(
    _MASKED_BACKWARD,
    MaskedBackward,
    _backward_output,
    (
        Candidate("cpu", _masked_backward_by_extension),
        Candidate("triton", _masked_backward_by_triton, _fp64_backward_rejects),
        Candidate("reference", _masked_backward_by_reference),
    ),
)


# --- autograd ------------------------------------------------------------------------------------


def _must_be_differentiable() -> bool:
    """Whether the gradient is to be differentiated itself (create_graph): the reference can be.

    It is a function of the saved output, which autograd knows as this node's result, so that a
    second derivative finds its way to the input from there.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class SoftmaxFunction(torch.autograd.Function):
    """Saves the output."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int, log: bool, output_dtype: torch.dtype) -> Tensor:
        output: Tensor = forward_op(input, dim, log, output_dtype)
        ctx.save_for_backward(output)
        ctx.dim, ctx.log, ctx.input_dtype = dim, log, input.dtype
        return output

    @staticmethod
    @function_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        (output,) = ctx.saved_tensors
        if _must_be_differentiable():
            grad = reference.softmax_backward(grad_output, output, ctx.dim, log=ctx.log)
            return grad.to(ctx.input_dtype), None, None, None
        grad = backward_op(grad_output, output, ctx.dim, ctx.log, ctx.input_dtype)
        return grad, None, None, None


class MaskedSoftmaxFunction(torch.autograd.Function):
    """Saves the output, and of an additive mask that requires a gradient the shape."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        mask: Tensor | None,
        scale: float,
        causal_offset: int | None,
        output_dtype: torch.dtype,
    ) -> Tensor:
        output: Tensor = masked_forward_op(input, mask, scale, causal_offset, output_dtype)
        ctx.save_for_backward(output)
        ctx.scale, ctx.input_dtype = scale, input.dtype
        if mask is not None:
            ctx.mask_shape, ctx.mask_dtype = mask.shape, mask.dtype
        return output

    @staticmethod
    @function_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        (output,) = ctx.saved_tensors
        need_input, need_mask = ctx.needs_input_grad[:2]
        # The mask is added to the scores: its gradient is theirs, and the input's is scale times
        # it.
        scale, dtype = ctx.scale, ctx.input_dtype
        if need_mask:
            scale, dtype = 1.0, compute_dtype(ctx.input_dtype)
        if _must_be_differentiable():
            grad = reference.softmax_backward(grad_output, output, -1, masked=True, scale=scale)
            grad = grad.to(dtype)
        else:
            grad = masked_backward_op(grad_output, output, scale, dtype)
        grad_mask = None
        if need_mask:
            grad_mask = grad.sum_to_size(ctx.mask_shape).to(ctx.mask_dtype)
            grad = (grad * ctx.scale).to(ctx.input_dtype)
        return grad if need_input else None, grad_mask, None, None, None
