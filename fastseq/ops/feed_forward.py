"""The feed_forward ops: schemas, fakes, candidates, autograd.

The ops are what stands between the two products of the block; the products are a library's, called
by the Function around them. The public function is in ``fastseq/functional/feed_forward.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import Candidate
from ..random import keep_scale, threshold
from ..reference import feed_forward as reference
from ..reference.feed_forward import ACTIVATIONS
from ..rows import as_rows, flat
from ._op import define_op, differentiable_gradients, extension_op, function_backward

_extension_forward = extension_op("feed_forward_forward")
_extension_backward = extension_op("feed_forward_backward")
Tensors3 = tuple[Tensor, Tensor, Tensor]


# --- forward -------------------------------------------------------------------------------------

_FORWARD = """_feed_forward_fwd(
    Tensor hidden, Tensor? bias, Tensor? seed, str activation, float dropout_p
) -> Tensor"""


class Forward(NamedTuple):
    """``dropout(act(hidden + bias))``: ``[*, F]`` of ``hidden [*, F]``, for SwiGLU ``[*, 2F]``."""

    hidden: Tensor
    bias: Tensor | None
    seed: Tensor | None
    activation: str
    dropout_p: float


def _output(a: Forward | Backward) -> Tensor:
    """The uninitialised output, the fake's too."""
    *leading, length = a.hidden.shape
    return a.hidden.new_empty((*leading, length // 2 if a.activation == "swiglu" else length))


def _forward_by_extension(a: Forward) -> Tensor:
    if not a.hidden.numel():
        return _output(a)
    rows = as_rows(a.hidden, a.hidden.shape[-1])
    output: Tensor = _extension_forward(
        rows, flat(a.bias), a.seed, ACTIVATIONS.index(a.activation), *_dropout(a)
    )
    return output.view(*a.hidden.shape[:-1], output.shape[-1])


def _forward_by_triton(a: Forward) -> Tensor:
    from ..kernels import feed_forward  # here, not above: without Triton the rest still works

    output = _output(a)
    if output.numel():
        rows = as_rows(a.hidden, a.hidden.shape[-1])
        feed_forward.forward(rows, flat(a.bias), a.seed, output, a.activation, *_dropout(a))
    return output


def _forward_by_torch(a: Forward) -> Tensor:
    z = a.hidden if a.bias is None else a.hidden + a.bias
    if a.activation == "swiglu":
        gate, up = z.chunk(2, -1)
        return F.silu(gate) * up
    if a.activation == "relu":
        return torch.relu(z)
    if a.activation == "silu":
        return F.silu(z)
    return F.gelu(z, approximate=_approximate(a))


def _forward_by_reference(a: Forward) -> Tensor:
    return reference.activate(a.hidden, a.bias, a.activation, a.dropout_p, a.seed).contiguous()


# --- backward ------------------------------------------------------------------------------------

_BACKWARD = """_feed_forward_bwd(
    Tensor grad, Tensor hidden, Tensor? bias, Tensor? seed, str activation, float dropout_p,
    bool[3] wanted
) -> (Tensor grad_hidden, Tensor output, Tensor grad_bias)"""


class Backward(NamedTuple):
    """The gradient of the output to that of ``hidden``, the output again, and the bias's gradient.

    For ReLU ``hidden`` is the output, and there is neither bias nor seed: what is 0 was negative or
    dropped, and ``dropout_p`` tells the scale of the rest.
    """

    grad: Tensor
    hidden: Tensor
    bias: Tensor | None
    seed: Tensor | None
    activation: str
    dropout_p: float
    wanted: Sequence[bool]


def _backward_outputs(a: Backward) -> Tensors3:
    """Uninitialised; what is not wanted is empty, and so is the output of ReLU."""
    empty = a.hidden.new_empty
    grad_hidden, output, grad_bias = a.wanted
    return (
        empty(a.hidden.shape) if grad_hidden else empty(0),
        _output(a) if output else empty(0),
        empty(a.hidden.shape[-1]) if grad_bias else empty(0),
    )


def _backward_by_extension(a: Backward) -> Tensors3:
    if not a.hidden.numel():
        return _without_rows(_backward_outputs(a))
    wanted = sum(bit for bit, want in zip((1, 2, 4), a.wanted, strict=True) if want)
    grad_hidden, output, grad_bias = _extension_backward(
        as_rows(a.grad, a.grad.shape[-1]),
        as_rows(a.hidden, a.hidden.shape[-1]),
        flat(a.bias),
        a.seed,
        ACTIVATIONS.index(a.activation),
        *_dropout(a),
        wanted,
    )
    return (
        grad_hidden.view(a.hidden.shape) if a.wanted[0] else grad_hidden,
        output.view(a.grad.shape) if a.wanted[1] else output,
        grad_bias,
    )


def _backward_by_triton(a: Backward) -> Tensors3:
    from ..kernels import feed_forward

    outputs = _backward_outputs(a)
    if not a.hidden.numel():
        return _without_rows(outputs)
    feed_forward.backward(
        as_rows(a.grad, a.grad.shape[-1]),
        as_rows(a.hidden, a.hidden.shape[-1]),
        flat(a.bias),
        a.seed,
        *outputs,
        a.activation,
        *_dropout(a),
    )
    return outputs


def _without_rows(outputs: Tensors3) -> Tensors3:
    """A sum over no rows is zero."""
    outputs[2].zero_()
    return outputs


def _backward_by_torch(a: Backward) -> Tensors3:
    z = a.hidden if a.bias is None else a.hidden + a.bias
    output = None
    if a.activation == "relu":
        grad = a.grad * keep_scale(a.dropout_p) if a.dropout_p else a.grad
        grad_hidden = torch.ops.aten.threshold_backward(grad, z, 0.0)
    elif a.activation == "swiglu":
        gate, up = z.chunk(2, -1)
        value = F.silu(gate)
        grad_gate = torch.ops.aten.silu_backward(a.grad * up, gate)
        grad_hidden = torch.cat((grad_gate, a.grad * value), -1)
        output = value * up if a.wanted[1] else None
    elif a.activation == "silu":
        grad_hidden = torch.ops.aten.silu_backward(a.grad, z)
        output = F.silu(z) if a.wanted[1] else None
    else:
        approximate = _approximate(a)
        grad_hidden = torch.ops.aten.gelu_backward(a.grad, z, approximate=approximate)
        output = F.gelu(z, approximate=approximate) if a.wanted[1] else None
    return _declared(a, grad_hidden, output)


def _backward_by_reference(a: Backward) -> Tensors3:
    gradient = reference.activate_backward(
        a.grad, a.hidden, a.bias, a.activation, a.dropout_p, a.seed
    )
    return _declared(a, *gradient)


def _declared(a: Backward, grad_hidden: Tensor, output: Tensor | None) -> Tensors3:
    """Sums up the bias's gradient, and brings all into the layout of the fake."""
    results = [grad_hidden, output, None]
    if a.wanted[2]:
        results[2] = _rows(grad_hidden).sum(0)
    return tuple(  # type: ignore[return-value]
        result.to(a.hidden.dtype).contiguous()
        if want and result is not None
        else a.hidden.new_empty(0)
        for result, want in zip(results, a.wanted, strict=True)
    )


def _dropout(a: Forward | Backward) -> tuple[int, float]:
    return threshold(a.dropout_p), keep_scale(a.dropout_p)


def _approximate(a: Forward | Backward) -> str:
    return "tanh" if a.activation == "gelu_tanh" else "none"


# --- candidates ----------------------------------------------------------------------------------


def _kernel_rejects(a: Forward | Backward) -> str | None:
    return "no fp64 kernel" if a.hidden.dtype == torch.float64 else None


def _torch_rejects(a: Forward | Backward) -> str | None:
    return None if a.seed is None else "torch's dropout draws another mask"


forward_op = define_op(
    _FORWARD,
    Forward,
    _output,
    (
        Candidate("cpu", _forward_by_extension, _kernel_rejects),
        Candidate("triton", _forward_by_triton, _kernel_rejects),
        Candidate("torch", _forward_by_torch, _torch_rejects),
        Candidate("reference", _forward_by_reference),
    ),
)

backward_op = define_op(
    _BACKWARD,
    Backward,
    _backward_outputs,
    (
        Candidate("cpu", _backward_by_extension, _kernel_rejects),
        Candidate("triton", _backward_by_triton, _kernel_rejects),
        Candidate("torch", _backward_by_torch, _torch_rejects),
        Candidate("reference", _backward_by_reference),
    ),
)


# --- autograd ------------------------------------------------------------------------------------


def _product_adds_bias(input: Tensor) -> bool:
    """Whether the library's product adds the bias, and not the kernel behind it.

    In 16 bits it must: rounded without the bias, a sum near 0 has few right digits, if its sign is
    right; and these products add one for free. In fp32 the CPU's writes it all over the result
    first, a pass that the kernel saves.
    """
    return input.element_size() == 2


def first_half(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """What comes of the first product, and what goes into the second."""
    if _product_adds_bias(input):
        hidden, bias1 = F.linear(input, weight1, bias1), None
    else:
        hidden = F.linear(input, weight1)
    return hidden, forward_op(hidden, bias1, seed, activation, dropout_p)


class FeedForwardFunction(torch.autograd.Function):
    """Saves the input and what comes of the first product (of ReLU, what goes into the second).

    Torch keeps the latter too, and a mask where there is dropout: here both are made again by the
    kernel that takes the gradient through the activation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        seed: Tensor | None,
        activation: str,
        dropout_p: float,
    ) -> Tensor:
        hidden, between = first_half(input, weight1, bias1, seed, activation, dropout_p)
        kept = between if activation == "relu" else hidden
        ctx.save_for_backward(input, weight1, bias1, weight2, bias2, seed, kept)
        ctx.options = activation, dropout_p
        return F.linear(between, weight2, bias2)

    @staticmethod
    @function_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        *inputs, seed, kept = ctx.saved_tensors
        activation, dropout_p = ctx.options
        needs = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # With create_graph the gradient must be differentiable itself: the reference is.
            again = partial(
                reference.feed_forward, activation=activation, dropout_p=dropout_p, seed=seed
            )
            grads = differentiable_gradients(again, tuple(inputs), needs, grad_output)
        else:
            grads = _gradients(inputs, kept, seed, activation, dropout_p, needs, grad_output)
        return (*grads, None, None, None)


def _gradients(
    inputs: list[Tensor],
    kept: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    needs: Sequence[bool],
    grad_output: Tensor,
) -> tuple[Tensor | None, ...]:
    """Of input, weight1, bias1, weight2 and bias2, those that are needed."""
    input, weight1, bias1, weight2, _ = inputs
    need_input, need_weight1, need_bias1, need_weight2, need_bias2 = needs
    rows = _rows(grad_output)
    grads: list[Tensor | None] = [None] * 5
    if need_bias2:
        grads[4] = rows.sum(0)
    relu = activation == "relu"
    need_hidden = need_input or need_weight1
    bias = None if relu or _product_adds_bias(input) else bias1
    between = kept
    if need_hidden or need_bias1:
        grad_hidden, again, grad_bias = backward_op(
            grad_output @ weight2,
            kept,
            bias,
            None if relu else seed,
            activation,
            dropout_p,
            (need_hidden, need_weight2 and not relu, need_bias1),
        )
        between = kept if relu else again
        if need_input:
            grads[0] = grad_hidden @ weight1
        if need_weight1:
            grads[1] = _rows(grad_hidden).mT @ _rows(input)
        if need_bias1:
            grads[2] = grad_bias
    elif need_weight2 and not relu:
        between = forward_op(kept, bias, seed, activation, dropout_p)
    if need_weight2:
        grads[3] = rows.mT @ _rows(between)
    return tuple(grads)


def _rows(tensor: Tensor) -> Tensor:
    """``[*, n]`` as ``[rows, n]``, empty ones too."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
