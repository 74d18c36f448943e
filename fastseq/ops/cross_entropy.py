"""The cross_entropy ops: schemas, fakes, candidates, autograd.

They take logits ``[*, classes]`` of any strides and class indices ``[*]``::

    lse  = maximum + log_sum = log(sum(exp(z))),  z = logits, or softcap * tanh(logits / softcap)
    loss = (1 - smoothing) * (lse - z[target]) + smoothing * mean(lse - z) + z_loss * lse^2

with class weights as in ``fastseq/reference/cross_entropy.py``. lse is saved in two parts, since
their rounded sum would cost ``exp(z - lse)`` digits where logits are large. The public function is
in ``fastseq/functional/cross_entropy.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import Candidate
from ..reference import cross_entropy as reference
from ..reference.layer_norm import compute_dtype
from ..rows import as_rows, flat
from ._op import define_op, differentiable_gradients, extension_op, function_backward

_extension_forward = extension_op("cross_entropy_forward")
_extension_backward = extension_op("cross_entropy_backward")
Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]

#: torch's numbers of the reductions, and their names by number.
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
NAMES = tuple(REDUCTIONS)

# --- forward -------------------------------------------------------------------------------------

_FORWARD = """_cross_entropy_fwd(
    Tensor logits, Tensor target, Tensor? weight, int ignore_index, int reduction,
    float label_smoothing, float softcap, float z_loss, bool every_lse, ScalarType loss_dtype
) -> (Tensor loss, Tensor maximum, Tensor log_sum, Tensor denominator)"""


class Forward(NamedTuple):
    """The arguments of the forward op.

    ``softcap`` is 0 where there is none; ``every_lse`` asks for the statistics of ignored rows too.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    reduction: int
    label_smoothing: float
    softcap: float
    z_loss: float
    every_lse: bool
    loss_dtype: torch.dtype


def _forward_outputs(a: Forward) -> Tensors4:
    """Uninitialised outputs, the fake's too; statistics are ``[rows]``."""
    rows, stats = a.target.numel(), compute_dtype(a.logits.dtype)
    empty = a.logits.new_empty
    return (
        empty(a.target.shape if a.reduction == 0 else (), dtype=a.loss_dtype),
        empty(rows, dtype=stats),
        empty(rows, dtype=stats),
        empty(() if a.reduction == 1 else 0, dtype=stats),
    )


def _forward_by_triton(a: Forward) -> Tensors4:
    from ..kernels import cross_entropy  # here, not above: without Triton the rest still works

    outputs = _forward_outputs(a)
    cross_entropy.forward(
        as_rows(a.logits, a.logits.shape[-1]),
        a.target.contiguous(),
        flat(a.weight),
        *outputs,
        a.logits.shape[-1],
        a.ignore_index,
        a.reduction,
        a.label_smoothing,
        a.softcap,
        a.z_loss,
        a.every_lse,
    )
    return outputs


def _forward_by_extension(a: Forward) -> Tensors4:
    loss, maximum, log_sum, denominator, bad = _extension_forward(
        as_rows(a.logits, a.logits.shape[-1]),
        a.target.contiguous(),
        flat(a.weight),
        a.ignore_index,
        a.reduction,
        a.label_smoothing,
        a.softcap,
        a.z_loss,
        a.every_lse,
        a.loss_dtype,
    )
    if bad >= 0:
        raise _out_of_range(a, bad)
    if a.reduction == 0 and a.target.dim() != 1:
        loss = loss.view(a.target.shape)
    return loss, maximum, log_sum, denominator


def _out_of_range(a: Forward, row: int) -> IndexError:
    return IndexError(
        f"cross_entropy: target must be in [0, {a.logits.shape[-1]}) or ignore_index "
        f"{a.ignore_index}, got {int(a.target.reshape(-1)[row])} at position {row}"
    )


def _check_targets(a: Forward) -> None:
    """For candidates of torch's operations, on the CPU; a GPU would have to wait for the answer."""
    if not a.target.is_cpu:
        return
    classes = a.logits.shape[-1]
    bad = ((a.target < 0) | (a.target >= classes)) & (a.target != a.ignore_index)
    if bool(bad.any()):
        raise _out_of_range(a, int(bad.reshape(-1).nonzero()[0]))


def _forward_by_torch(a: Forward) -> Tensors4:
    logits, target = _for_torch(a.logits, a.target)
    loss = F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, a.loss_dtype)),
        target,
        None if a.weight is None else a.weight.to(torch.promote_types(logits.dtype, a.loss_dtype)),
        ignore_index=a.ignore_index,
        reduction=NAMES[a.reduction],
        label_smoothing=a.label_smoothing,
    )
    return _declared_outputs(a, loss, a.logits.reshape(-1, a.logits.shape[-1]))


def _for_torch(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with their classes in dimension 1, as they lie in memory; the target beside them."""
    if logits.dim() <= 2:
        return logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    return logits.movedim(-1, 1), target


def _forward_by_reference(a: Forward) -> Tensors4:
    _check_targets(a)
    rows = a.logits.reshape(-1, a.logits.shape[-1])
    loss, _ = reference.cross_entropy(
        rows,
        a.target.reshape(-1),
        a.weight,
        ignore_index=a.ignore_index,
        reduction=NAMES[a.reduction],
        label_smoothing=a.label_smoothing,
        softcap=a.softcap,
        z_loss=a.z_loss,
        output_dtype=a.loss_dtype,
    )
    return _declared_outputs(
        a, loss, reference.softcapped(rows.to(compute_dtype(rows.dtype)), a.softcap)
    )


def _declared_outputs(a: Forward, loss: Tensor, z: Tensor) -> Tensors4:
    """The loss with the statistics that the other candidates have."""
    stats = compute_dtype(a.logits.dtype)
    if z.shape[0]:
        maximum = z.amax(-1).to(stats)
        log_sum = torch.logsumexp(z.to(stats) - maximum[:, None], -1)
        # Of a row of -Inf alone the maximum says it all.
        log_sum = torch.where(maximum == -torch.inf, maximum, log_sum)
    else:
        maximum, log_sum = (z.new_empty(0, dtype=stats) for _ in range(2))
    denominator = maximum.new_empty(0)
    if a.reduction == 1:
        kept = (a.target != a.ignore_index).reshape(-1)
        index = torch.where(kept, a.target.reshape(-1), 0)
        ones = maximum.new_ones(a.logits.shape[-1])
        weights = ones if a.weight is None else a.weight.to(stats)
        denominator = torch.where(kept, weights[index], 0.0).sum()
    return (
        loss.to(a.loss_dtype).reshape(a.target.shape if a.reduction == 0 else ()),
        maximum,
        log_sum,
        denominator,
    )


# --- backward ------------------------------------------------------------------------------------

_BACKWARD = """_cross_entropy_bwd(
    Tensor logits, Tensor grad_loss, Tensor? grad_lse, Tensor target, Tensor? weight,
    Tensor maximum, Tensor log_sum, Tensor denominator,
    int ignore_index, float label_smoothing, float softcap, float z_loss
) -> Tensor grad_logits"""


class Backward(NamedTuple):
    """The arguments of the backward op.

    ``grad_loss`` is ``[]`` of a reduced loss; ``denominator`` is empty where it was no mean.
    """

    logits: Tensor
    grad_loss: Tensor
    grad_lse: Tensor | None
    target: Tensor
    weight: Tensor | None
    maximum: Tensor
    log_sum: Tensor
    denominator: Tensor
    ignore_index: int
    label_smoothing: float
    softcap: float
    z_loss: float


def _backward_output(a: Backward) -> Tensor:
    return a.logits.new_empty(a.logits.shape)


def _backward_by_triton(a: Backward) -> Tensor:
    from ..kernels import cross_entropy

    grad_logits = _backward_output(a)
    if grad_logits.numel():
        cross_entropy.backward(
            as_rows(a.logits, a.logits.shape[-1]),
            a.grad_loss.contiguous(),
            flat(a.grad_lse),
            a.target.contiguous(),
            flat(a.weight),
            a.maximum,
            a.log_sum,
            a.denominator,
            grad_logits,
            a.logits.shape[-1],
            a.ignore_index,
            a.label_smoothing,
            a.softcap,
            a.z_loss,
        )
    return grad_logits


def _backward_by_extension(a: Backward) -> Tensor:
    grad_logits: Tensor = _extension_backward(
        a.grad_loss.contiguous(),
        flat(a.grad_lse),
        as_rows(a.logits, a.logits.shape[-1]),
        a.target.contiguous(),
        flat(a.weight),
        a.maximum,
        a.log_sum,
        a.denominator,
        a.ignore_index,
        a.label_smoothing,
        a.softcap,
        a.z_loss,
    )
    return grad_logits if grad_logits.shape == a.logits.shape else grad_logits.view(a.logits.shape)


def _backward_by_torch(a: Backward) -> Tensor:
    logits, target = _for_torch(a.logits, a.target)
    classes = logits.shape[1]
    log_p = torch.log_softmax(logits, 1)
    kept = target != a.ignore_index
    index = torch.where(kept, target, 0)
    reduced = a.grad_loss.numel() == 1
    grad = a.grad_loss.to(a.maximum.dtype).reshape(() if reduced else target.shape)
    grad = torch.where(kept, grad / a.denominator if a.denominator.numel() else grad, 0.0)
    weights = a.maximum.new_ones(classes) if a.weight is None else a.weight.to(a.maximum.dtype)
    grad_log_p = torch.zeros_like(log_p)
    if a.label_smoothing:
        by_class = weights.view(-1, *(1,) * (logits.dim() - 2))
        grad_log_p -= grad.unsqueeze(1) * by_class * (a.label_smoothing / classes)
    at_target = (grad * weights[index] * (a.label_smoothing - 1.0)).to(log_p.dtype)
    grad_log_p.scatter_add_(1, index.unsqueeze(1), at_target.unsqueeze(1))
    grad_logits = torch._log_softmax_backward_data(grad_log_p, log_p, 1, logits.dtype)
    if a.logits.dim() > 2:
        grad_logits = grad_logits.movedim(1, -1)
    return grad_logits.reshape(a.logits.shape).contiguous()


def _backward_by_reference(a: Backward) -> Tensor:
    reduced = a.grad_loss.numel() == 1
    grad = reference.cross_entropy_backward(
        a.grad_loss.reshape(()) if reduced else a.grad_loss.reshape(-1),
        None if a.grad_lse is None else a.grad_lse.reshape(-1),
        a.logits.reshape(-1, a.logits.shape[-1]),
        a.target.reshape(-1),
        a.weight,
        a.denominator if a.denominator.numel() else None,
        ignore_index=a.ignore_index,
        label_smoothing=a.label_smoothing,
        softcap=a.softcap,
        z_loss=a.z_loss,
    )
    return grad.to(a.logits.dtype).view(a.logits.shape)


# --- candidates ----------------------------------------------------------------------------------


def _fp64_rejects(a: Forward | Backward) -> str | None:
    return "no fp64 kernel" if a.logits.dtype == torch.float64 else None


def _torch_rejects(a: Forward | Backward) -> str | None:
    if a.softcap or a.z_loss:
        return "torch has no softcap and no z_loss"
    if isinstance(a, Backward) and a.grad_lse is not None:
        return "torch's cross_entropy has no lse to differentiate"
    return None


forward_op = define_op(
    _FORWARD,
    Forward,
    _forward_outputs,
    (
        Candidate("cpu", _forward_by_extension),
        Candidate("triton", _forward_by_triton, _fp64_rejects),
        Candidate("torch", _forward_by_torch, _torch_rejects),
        Candidate("reference", _forward_by_reference),
    ),
)

backward_op = define_op(
    _BACKWARD,
    Backward,
    _backward_output,
    (
        Candidate("cpu", _backward_by_extension),
        Candidate("triton", _backward_by_triton, _fp64_rejects),
        Candidate("torch", _backward_by_torch, _torch_rejects),
        Candidate("reference", _backward_by_reference),
    ),
)


# --- autograd ------------------------------------------------------------------------------------


class CrossEntropyFunction(torch.autograd.Function):
    """Saves the logits and two statistics a row; returns the loss, or ``(loss, lse)``."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: int,
        label_smoothing: float,
        softcap: float,
        z_loss: float,
        return_lse: bool,
        loss_dtype: torch.dtype,
    ) -> Tensor | tuple[Tensor, Tensor]:
        loss, maximum, log_sum, denominator = forward_op(
            logits,
            target,
            weight,
            ignore_index,
            reduction,
            label_smoothing,
            softcap,
            z_loss,
            return_lse,
            loss_dtype,
        )
        ctx.save_for_backward(logits, target, weight, maximum, log_sum, denominator)
        ctx.ignore_index, ctx.reduction, ctx.label_smoothing = (
            ignore_index,
            reduction,
            label_smoothing,
        )
        ctx.softcap, ctx.z_loss = softcap, z_loss
        ctx.set_materialize_grads(False)
        return (loss, (maximum + log_sum).view(target.shape)) if return_lse else loss

    @staticmethod
    @function_backward
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None = None
    ) -> tuple[Any, ...]:
        logits, target, weight, maximum, log_sum, denominator = ctx.saved_tensors
        if grad_loss is None:
            if grad_lse is None:
                return (None,) * 10
            grad_loss = torch.zeros_like(target if ctx.reduction == 0 else maximum[:0].sum()).to(
                maximum.dtype
            )

        # With create_graph the gradient must be differentiable itself: the reference is.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():

            def projected(logits: Tensor) -> Tensor:
                loss, lse = reference.cross_entropy(
                    logits,
                    target,
                    weight,
                    ignore_index=ctx.ignore_index,
                    reduction=NAMES[ctx.reduction],
                    label_smoothing=ctx.label_smoothing,
                    softcap=ctx.softcap,
                    z_loss=ctx.z_loss,
                    output_dtype=maximum.dtype,
                )
                total = (loss * grad_loss).sum()
                return total if grad_lse is None else total + (lse * grad_lse).sum()

            (grad_logits,) = differentiable_gradients(
                projected, (logits,), (True,), torch.ones_like(denominator.sum())
            )
        else:
            grad_logits = backward_op(
                logits,
                grad_loss,
                grad_lse,
                target,
                weight,
                maximum,
                log_sum,
                denominator,
                ctx.ignore_index,
                ctx.label_smoothing,
                ctx.softcap,
                ctx.z_loss,
            )
        return (grad_logits, *(None,) * 9)
