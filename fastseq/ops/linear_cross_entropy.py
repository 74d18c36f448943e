"""The linear_cross_entropy ops: logits made, used and dropped by chunks of tokens.

Hidden states ``[tokens, features]`` times a vocabulary matrix ``[classes, features]`` are as many
logits as nothing else in a language model. Here a chunk of tokens has its logits made (by a GEMM),
its losses and their gradient taken (by the cross_entropy ops), and both gradients of the GEMM added
up before the next chunk comes. For a reduced loss that happens in forward, where the logits are: a
gradient that comes back is a single number, by which the backward multiplies. For ``reduction =
"none"`` it is a number a token, and the backward makes the logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import Candidate
from ..reference import cross_entropy as reference
from ..reference.layer_norm import compute_dtype
from . import cross_entropy as rows
from ._op import define_op, differentiable_gradients, function_backward

Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]

#: A chunk's logits, and once more their gradient, may take so much memory. Larger chunks gained a
#: CPU's GEMMs under 5 % at 512 features and 32000 classes.
CHUNK_BYTES = 48 << 20

_OPTIONS = """Tensor? weight, int ignore_index, int reduction, float label_smoothing,
    float softcap, float z_loss"""

_FORWARD = f"""_linear_cross_entropy_fwd(
    Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, {_OPTIONS},
    bool[3] wanted, ScalarType loss_dtype
) -> (Tensor loss, Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)"""

_BACKWARD = f"""_linear_cross_entropy_bwd(
    Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, {_OPTIONS},
    Tensor grad_loss, Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias,
    bool[3] wanted
) -> (Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)"""


class Forward(NamedTuple):
    """The arguments of the forward op: ``input [tokens, features]``, ``target [tokens]``.

    ``wanted`` says which of the gradients of input, linear_weight and linear_bias to compute, as if
    that of the loss were 1. A loss that is not reduced has none here.
    """

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    reduction: int
    label_smoothing: float
    softcap: float
    z_loss: float
    wanted: Sequence[bool]
    loss_dtype: torch.dtype


class Backward(NamedTuple):
    """The arguments of the backward op, with the gradients that forward has computed."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    reduction: int
    label_smoothing: float
    softcap: float
    z_loss: float
    grad_loss: Tensor
    grad_input: Tensor
    grad_linear_weight: Tensor
    grad_linear_bias: Tensor
    wanted: Sequence[bool]


def _gradients_like(
    a: Forward | Backward, wanted: Sequence[bool], *, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients; with ``sums`` those over all tokens are in the compute dtype.

    So they are kept between the chunks and until backward: rounded once, after scaling.
    """

    def like(tensor: Tensor | None, want: bool, wide: bool) -> Tensor:
        dtype = compute_dtype(a.input.dtype) if wide else a.input.dtype
        if tensor is None or not want:
            return a.input.new_empty(0, dtype=dtype)
        return tensor.new_empty(tensor.shape, dtype=dtype)

    return (
        like(a.input, wanted[0], False),
        like(a.linear_weight, wanted[1], sums),
        like(a.linear_bias, wanted[2], sums),
    )


def _forward_outputs(a: Forward) -> Tensors4:
    loss = a.input.new_empty(() if a.reduction else a.target.shape, dtype=a.loss_dtype)
    wanted = [want and a.reduction != 0 for want in a.wanted]
    return loss, *_gradients_like(a, wanted, sums=True)


def _backward_outputs(a: Backward) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like(a, a.wanted, sums=False)


# --- chunks --------------------------------------------------------------------------------------


def chunk_rows(classes: int, element_size: int) -> int:
    """How many tokens' logits fit in :data:`CHUNK_BYTES`; in half of it in 16 bits, where the sums
    of gradients in fp32 take their part of what memory there is."""
    budget = CHUNK_BYTES if element_size > 2 else CHUNK_BYTES // 2
    return max(1, budget // max(1, classes * element_size))


def _by_chunks(
    a: Forward | Backward, grad_loss: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Losses of all tokens, and the wanted gradients.

    Args:
        grad_loss: of every token's loss, or ``[]``, one for all.
    """
    compute = compute_dtype(a.input.dtype)
    losses = a.input.new_empty(a.target.shape, dtype=compute)
    grad_input, grad_weight, grad_bias = _gradients_like(a, wanted, sums=True)
    grad_weight.zero_()
    grad_bias.zero_()
    step = chunk_rows(a.linear_weight.shape[0], a.input.element_size())
    for begin in range(0, a.target.numel(), step):
        part = slice(begin, begin + step)
        input, target = a.input[part], a.target[part]
        logits = F.linear(input, a.linear_weight, a.linear_bias)
        losses[part], maximum, log_sum, none = rows.forward_op(
            logits,
            target,
            a.weight,
            a.ignore_index,
            0,
            a.label_smoothing,
            a.softcap,
            a.z_loss,
            False,
            compute,
        )
        if not any(wanted):
            continue
        grad_logits = rows.backward_op(
            logits,
            grad_loss[part] if grad_loss.dim() else grad_loss,
            None,
            target,
            a.weight,
            maximum,
            log_sum,
            none,
            a.ignore_index,
            a.label_smoothing,
            a.softcap,
            a.z_loss,
        )
        del logits
        if wanted[0]:
            torch.mm(grad_logits, a.linear_weight, out=grad_input[part])
        if wanted[1] and grad_weight.dtype == grad_logits.dtype:
            grad_weight.addmm_(grad_logits.t(), input)
        elif wanted[1]:
            grad_weight += grad_logits.t() @ input
        if wanted[2]:
            grad_bias += grad_logits.sum(0, dtype=compute)
        del grad_logits
    return losses, (grad_input, grad_weight, grad_bias)


def _denominator(a: Forward) -> Tensor:
    """What a mean divides by: the weights of the targets that are not ignored."""
    kept = a.target != a.ignore_index
    if a.weight is None:
        return kept.sum(dtype=compute_dtype(a.input.dtype))
    index = torch.where(kept, a.target, 0).clamp(0, a.weight.shape[0] - 1)
    return torch.where(kept, a.weight.to(compute_dtype(a.input.dtype))[index], 0.0).sum()


def _forward_by_chunks(a: Forward) -> Tensors4:
    one = a.input.new_ones((), dtype=compute_dtype(a.input.dtype))
    scale = one / _denominator(a) if a.reduction == 1 else one
    wanted = [want and a.reduction != 0 for want in a.wanted]
    losses, grads = _by_chunks(a, scale, wanted)
    loss = losses.sum() / _denominator(a) if a.reduction == 1 else losses
    loss = losses.sum() if a.reduction == 2 else loss
    return loss.to(a.loss_dtype), *grads


def _backward_by_chunks(a: Backward) -> tuple[Tensor, Tensor, Tensor]:
    saved = (a.grad_input, a.grad_linear_weight, a.grad_linear_bias)
    if a.reduction == 0:
        _, saved = _by_chunks(a, a.grad_loss.contiguous(), a.wanted)
    scale = 1.0 if a.reduction == 0 else a.grad_loss
    outputs = _backward_outputs(a)
    for output, grad in zip(outputs, saved, strict=True):
        torch.mul(grad, scale, out=output)
    return outputs


def plain(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    *arguments: Any,
    **options: Any,
) -> Tensor:
    """The specification: all logits at once."""
    logits = F.linear(input, linear_weight, linear_bias)
    return reference.cross_entropy(logits, *arguments, **options)[0]


# --- candidates ----------------------------------------------------------------------------------


def _fp64_rejects(a: Forward | Backward) -> str | None:
    return "no fp64 kernel" if a.input.dtype == torch.float64 else None


def _torch_rejects(a: Forward | Backward) -> str | None:
    return "torch has no softcap and no z_loss" if a.softcap or a.z_loss else None


# The loop is the same for all: the backend is that of the cross_entropy ops within.
forward_op = define_op(
    _FORWARD,
    Forward,
    _forward_outputs,
    (
        Candidate("cpu", _forward_by_chunks),
        Candidate("triton", _forward_by_chunks, _fp64_rejects),
        Candidate("torch", _forward_by_chunks, _torch_rejects),
        Candidate("reference", _forward_by_chunks),
    ),
)

backward_op = define_op(
    _BACKWARD,
    Backward,
    _backward_outputs,
    (
        Candidate("cpu", _backward_by_chunks),
        Candidate("triton", _backward_by_chunks, _fp64_rejects),
        Candidate("torch", _backward_by_chunks, _torch_rejects),
        Candidate("reference", _backward_by_chunks),
    ),
)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Saves the arguments and, of a reduced loss, the gradients it will scale."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: int,
        label_smoothing: float,
        softcap: float,
        z_loss: float,
        wanted: tuple[bool, bool, bool],
        loss_dtype: torch.dtype,
    ) -> Tensor:
        options = (ignore_index, reduction, label_smoothing, softcap, z_loss)
        loss, *grads = forward_op(
            input, linear_weight, linear_bias, target, weight, *options, wanted, loss_dtype
        )
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, *grads)
        ctx.options, ctx.wanted = options, wanted
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @function_backward
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        input, linear_weight, linear_bias, target, weight, *grads = ctx.saved_tensors
        ignore_index, reduction, label_smoothing, softcap, z_loss = ctx.options
        # With create_graph the gradient must be differentiable itself: all logits at once are.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found: Sequence[Tensor | None] = differentiable_gradients(
                lambda input, linear_weight, linear_bias: plain(
                    input,
                    linear_weight,
                    linear_bias,
                    target,
                    weight,
                    ignore_index=ignore_index,
                    reduction=rows.NAMES[reduction],
                    label_smoothing=label_smoothing,
                    softcap=softcap,
                    z_loss=z_loss,
                    output_dtype=grad_loss.dtype,
                ),
                (input, linear_weight, linear_bias),
                ctx.wanted,
                grad_loss,
            )
        else:
            found = backward_op(
                input,
                linear_weight,
                linear_bias,
                target,
                weight,
                *ctx.options,
                grad_loss,
                *grads,
                ctx.wanted,
            )
        kept = [grad if want else None for grad, want in zip(found, ctx.wanted, strict=True)]
        return (*kept, *(None,) * 9)
