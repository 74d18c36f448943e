"""The additive_attention ops: schemas, fakes, candidates, autograd.

``_additive_attention_fwd`` and ``_additive_attention_bwd`` compute, for every query::

    s = score_weight . tanh(query + key)        output = softmax(s) value

by blocks of queries: scores ``[batch, block, keys]`` by a kernel of this family, their softmax by
the softmax family's, and the product with the values by a library GEMM. A block's rows are whole,
so the backward computes the same scores and weights again, and nothing but the inputs is saved.
The public function is in ``fastseq/functional/additive_attention.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Candidate
from ..reference import additive_attention as reference
from ..reference import softmax as reference_softmax
from ..reference.layer_norm import compute_dtype
from ._op import define_op, differentiable_gradients, extension_op, function_backward
from .attention_blockwise import may_hide
from .softmax import masked_backward_op, masked_forward_op

_extension_scores = extension_op("additive_attention_scores")
_extension_gradients = extension_op("additive_attention_gradients")

Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]

_FORWARD = """_additive_attention_fwd(
    Tensor query, Tensor key, Tensor value, Tensor score_weight, Tensor? mask
) -> Tensor"""


class Forward(NamedTuple):
    """The arguments of the forward op; ``mask`` broadcasts to ``[batch, queries, keys]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    score_weight: Tensor
    mask: Tensor | None


_BACKWARD = """_additive_attention_bwd(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor score_weight, Tensor? mask
) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_score_weight)"""


class Backward(NamedTuple):
    """The arguments of the backward op."""

    grad_output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    score_weight: Tensor
    mask: Tensor | None


def _forward_output(a: Forward) -> Tensor:
    """The uninitialised output, the fake's too."""
    return a.query.new_empty(*a.query.shape[:2], a.value.shape[2])


def _backward_outputs(a: Backward) -> Tensors4:
    """Uninitialised gradients, the fake's too."""
    query, key, value, weight = (
        tensor.new_empty(tensor.shape) for tensor in (a.query, a.key, a.value, a.score_weight)
    )
    return query, key, value, weight


# --- by blocks of queries ------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """The steps of a block that are not a library's.

    Attributes:
        scores: of query, key and weight, in the compute dtype.
        gradients: of query, key and weight (which may keep a batch dimension) from the scores'.
        softmax: of scores and mask, in a dtype.
        softmax_backward: of the weights' gradient and the weights.
        elements: scores of one entry of the batch that a block may have.
    """

    scores: Callable[[Tensor, Tensor, Tensor], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    softmax: Callable[[Tensor, Tensor | None, torch.dtype], Tensor]
    softmax_backward: Callable[[Tensor, Tensor], Tensor]
    elements: Callable[[Forward | Backward], int]


def _blocks(a: Forward | Backward, kernels: Kernels) -> Iterator[tuple[slice, Tensor | None]]:
    """The queries by blocks of as many rows as lengths and kernels say, each with its mask."""
    queries, keys = a.query.shape[1], a.key.shape[1]
    rows = max(8, kernels.elements(a) // keys)
    for first in range(0, queries, rows):
        block = slice(first, min(first + rows, queries))
        shared = a.mask is None or a.mask.shape[1] == 1
        yield block, a.mask if shared else a.mask[:, block]  # type: ignore[index]


def _inputs(a: Forward | Backward) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """Keys and values without what no query takes, the weight in the compute dtype, and the dtype
    of the products: on a GPU the values', whose tensor cores sum up in fp32; else the compute's."""
    compute = compute_dtype(a.query.dtype)
    dtype = a.value.dtype if a.value.is_cuda else compute
    weight = a.score_weight.to(compute).contiguous()
    value = reference.without_unused(a.value, a.mask).to(dtype)
    return _rows_contiguous(reference.without_unused(a.key, a.mask)), value, weight, dtype


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _forward_by(kernels: Kernels) -> Callable[[Forward], Tensor]:
    def forward(a: Forward) -> Tensor:
        output = _forward_output(a)
        if not (a.query.numel() and a.key.numel()):
            # Without a hidden dimension all scores are 0.
            return output.copy_(reference.additive_attention(*a)) if output.numel() else output
        key, value, weight, dtype = _inputs(a)
        query, careful = _rows_contiguous(a.query), a.mask is not None and may_hide(value)
        for block, mask in _blocks(a, kernels):
            weights = kernels.softmax(kernels.scores(query[:, block], key, weight), mask, dtype)
            output[:, block] = reference.product(weights, value, mask if careful else None)
        return output

    return forward


def _backward_by(kernels: Kernels) -> Callable[[Backward], Tensors4]:
    def backward(a: Backward) -> Tensors4:
        outputs = _backward_outputs(a)
        if not (a.query.numel() and a.key.numel()):
            grads = reference.additive_attention_backward(*a)
        else:
            grads = by_blocks(a, outputs[0])
        for output, grad in zip(outputs, grads, strict=True):
            if output is not grad:
                output.copy_(grad)
        return outputs

    def by_blocks(a: Backward, grad_query: Tensor) -> Tensors4:
        key, value, weight, dtype = _inputs(a)
        query, compute = _rows_contiguous(a.query), compute_dtype(a.query.dtype)
        careful = a.mask is not None and may_hide(a.grad_output)
        grad_key = grad_value = grad_weight = None
        for block, mask in _blocks(a, kernels):
            weights = kernels.softmax(kernels.scores(query[:, block], key, weight), mask, dtype)
            grad = a.grad_output[:, block].to(dtype)
            grad_scores = kernels.softmax_backward((grad @ value.mT).to(compute), weights)
            of_query, of_key, of_weight = kernels.gradients(
                grad_scores, query[:, block], key, weight
            )
            grad_query[:, block] = of_query
            taken = mask.expand(weights.shape).mT if careful and mask is not None else None
            of_value = reference.product(weights.mT, grad, taken).to(compute)
            of_weight = of_weight.view(-1, of_weight.shape[-1]).sum(0)
            if grad_key is None or grad_value is None or grad_weight is None:
                grad_key, grad_value, grad_weight = of_key, of_value, of_weight
            else:
                grad_key += of_key
                grad_value += of_value
                grad_weight += of_weight
        assert grad_key is not None, "there is a block at least"
        assert grad_value is not None
        assert grad_weight is not None
        return grad_query, grad_key, grad_value, grad_weight

    return backward


def _triton_scores(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    from ..kernels import additive_attention  # here, not above: without Triton the rest still works

    scores: Tensor = additive_attention.scores(query, key, weight)
    return scores


def _triton_gradients(
    grad_scores: Tensor, query: Tensor, key: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import additive_attention

    grads: tuple[Tensor, Tensor, Tensor] = additive_attention.gradients(
        grad_scores, query, key, weight
    )
    return grads


def _fused_softmax(scores: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    weights: Tensor = masked_forward_op(scores, mask, 1.0, None, dtype)
    return weights


def _fused_softmax_backward(grad_weights: Tensor, weights: Tensor) -> Tensor:
    grad_scores: Tensor = masked_backward_op(grad_weights, weights, 1.0, torch.float32)
    return grad_scores


def _torch_softmax(scores: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    return reference_softmax.masked_softmax(scores, mask, output_dtype=dtype)


def _torch_softmax_backward(grad_weights: Tensor, weights: Tensor) -> Tensor:
    return reference_softmax.softmax_backward(grad_weights, weights, -1, masked=True)


def _torch_scores(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    return reference.scores(query.to(weight.dtype), key.to(weight.dtype), weight)


def _torch_gradients(
    grad_scores: Tensor, query: Tensor, key: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    query, key = query.to(weight.dtype), key.to(weight.dtype)
    return reference.scores_backward(grad_scores, query, key, weight)


# A block of scores should stay in the cache (1 MB in fp32 with its softmax), and have rows enough
# that the powers of the keys, taken once a block, do not count.
_CPU = Kernels(
    _extension_scores,
    _extension_gradients,
    _fused_softmax,
    _fused_softmax_backward,
    lambda a: 1 << 17,
)
# Of a GPU a block fills every SM with several programs, in 16 MB.
_TRITON = Kernels(
    _triton_scores,
    _triton_gradients,
    _fused_softmax,
    _fused_softmax_backward,
    lambda a: 1 << 22,
)
# Here a block has a hidden dimension: so many elements of [batch, rows, keys, hidden].
_TORCH = Kernels(
    _torch_scores,
    _torch_gradients,
    _torch_softmax,
    _torch_softmax_backward,
    lambda a: (1 << 21) // (a.query.shape[0] * a.query.shape[2]),
)


def _forward_by_reference(a: Forward) -> Tensor:
    return reference.additive_attention(*a).contiguous()


def _backward_by_reference(a: Backward) -> Tensors4:
    outputs = _backward_outputs(a)
    for output, grad in zip(outputs, reference.additive_attention_backward(*a), strict=True):
        output.copy_(grad)
    return outputs


# --- candidates ----------------------------------------------------------------------------------


def _fp64_rejects(a: Forward | Backward) -> str | None:
    return "no fp64 kernel" if a.query.dtype == torch.float64 else None


forward_op = define_op(
    _FORWARD,
    Forward,
    _forward_output,
    (
        Candidate("cpu", _forward_by(_CPU), _fp64_rejects),
        Candidate("triton", _forward_by(_TRITON), _fp64_rejects),
        Candidate("torch", _forward_by(_TORCH)),
        Candidate("reference", _forward_by_reference),
    ),
)

backward_op = define_op(
    _BACKWARD,
    Backward,
    _backward_outputs,
    (
        Candidate("cpu", _backward_by(_CPU), _fp64_rejects),
        Candidate("triton", _backward_by(_TRITON), _fp64_rejects),
        Candidate("torch", _backward_by(_TORCH)),
        Candidate("reference", _backward_by_reference),
    ),
)


# --- autograd ------------------------------------------------------------------------------------


class AdditiveAttentionFunction(torch.autograd.Function):
    """Saves the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_weight: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, score_weight, mask)
        output: Tensor = forward_op(query, key, value, score_weight, mask)
        return output

    @staticmethod
    @function_backward
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        *inputs, mask = ctx.saved_tensors
        wanted: Sequence[bool] = ctx.needs_input_grad[:4]
        # With create_graph the gradient must be differentiable itself: the reference is.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = differentiable_gradients(
                partial(reference.additive_attention, mask=mask),
                tuple(inputs),
                tuple(wanted),
                grad_output,
            )
        else:
            grads = backward_op(grad_output, *inputs, mask)
        return (*(g if want else None for g, want in zip(grads, wanted, strict=True)), None)
