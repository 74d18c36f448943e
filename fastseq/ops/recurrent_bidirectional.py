"""Both directions of a layer in one op: on a GPU one launch runs them side by side.

The directions of a bidirectional layer do not depend on each other, and a persistent CUDA kernel
leaves most of a GPU idle: a launch with blocks for either takes as long as one direction alone, as
long as both fit. Every other backend runs one after the other, by what ``recurrent.py`` has for
one. What persistent kernels do not take (layer norm, zoneout, projections) does not come here, nor
does truncation, which is of one direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.recurrent import Options
from . import recurrent as alone
from ._op import define_op, extension_op, function_backward
from .recurrent_layer import Layer, Made, _input_gates, differentiable, layer_gradients

_extension_forward = extension_op("recurrent_bidirectional_forward")
_extension_backward = extension_op("recurrent_bidirectional_backward")
Tensors = tuple[Tensor, ...]
Pair = tuple[Tensor | None, Tensor | None]

# --- forward -------------------------------------------------------------------------------------

_FORWARD = """_recurrent_bidirectional_fwd(
    Tensor gates_x, Tensor gates_x_reverse, Tensor h0, Tensor h0_reverse,
    Tensor? c0, Tensor? c0_reverse, Tensor weight_hh, Tensor weight_hh_reverse,
    Tensor? bias_hh, Tensor? bias_hh_reverse, Tensor? keep, Tensor? keep_reverse,
    Tensor? lengths, str kind, bool save
) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor gates, Tensor output_reverse,
    Tensor h_n_reverse, Tensor c_n_reverse, Tensor cells_reverse, Tensor gates_reverse)"""
_FORWARD_RESULTS = 5  # of a direction


class Forward(NamedTuple):
    """The arguments of the forward op: those of ``recurrent.Forward``, of each direction."""

    gates_x: Tensor
    gates_x_reverse: Tensor
    h0: Tensor
    h0_reverse: Tensor
    c0: Tensor | None
    c0_reverse: Tensor | None
    weight_hh: Tensor
    weight_hh_reverse: Tensor
    bias_hh: Tensor | None
    bias_hh_reverse: Tensor | None
    keep: Tensor | None
    keep_reverse: Tensor | None
    lengths: Tensor | None
    kind: str
    save: bool

    def direction(self, d: int) -> alone.Forward:
        """Those of one direction."""
        own: Any = self[d:12:2]
        gates_x, h0, c0, weight_hh, bias_hh, keep = own
        return alone.Forward(
            *(gates_x, h0, c0, weight_hh, bias_hh, None, None, None, None),
            *(self.lengths, None, keep, self.kind, d == 1, 0.0, 0.0, 0.0, self.save),
        )


def _each(run: Callable[[Any], Sequence[Tensor]], count: int) -> Callable[[Any], Tensors]:
    """Runs each direction by itself, and keeps its first ``count`` results."""
    return lambda a: (*run(a.direction(0))[:count], *run(a.direction(1))[:count])


def _list(pair: Pair, like: Tensor) -> list[Tensor]:
    """As the extension takes it: nothing, or both, an empty tensor for one that is not there."""
    if pair[0] is None and pair[1] is None:
        return []
    return [like.new_empty(0) if tensor is None else tensor for tensor in pair]


def _forward_by_extension(a: Forward) -> Tensors:
    gates_x = [alone._steps(a.gates_x), alone._steps(a.gates_x_reverse)]
    pairs = [_list(a[i : i + 2], a.h0) for i in (2, 4, 6, 8, 10)]  # type: ignore[arg-type]
    kind = alone.KINDS[a.kind]
    return tuple(
        _extension_forward(gates_x, *pairs, a.lengths, kind, a.save, alone._tf32(a.direction(0)))
    )


# --- backward ------------------------------------------------------------------------------------

_BACKWARD = """_recurrent_bidirectional_bwd(
    Tensor gates, Tensor gates_reverse, Tensor? grad_output, Tensor? grad_output_reverse,
    Tensor? grad_h_n, Tensor? grad_h_n_reverse, Tensor? grad_c_n, Tensor? grad_c_n_reverse,
    Tensor? grad_cells, Tensor? grad_cells_reverse, Tensor output, Tensor output_reverse,
    Tensor cells, Tensor cells_reverse, Tensor h0, Tensor h0_reverse,
    Tensor? c0, Tensor? c0_reverse, Tensor weight_hh, Tensor weight_hh_reverse,
    Tensor? keep, Tensor? keep_reverse, Tensor? lengths, str kind, float grad_clip
) -> (Tensor gates_x, Tensor gates_h, Tensor h0, Tensor c0, Tensor gates_x_reverse,
    Tensor gates_h_reverse, Tensor h0_reverse, Tensor c0_reverse)"""
_BACKWARD_RESULTS = 4


class Backward(NamedTuple):
    """The arguments of the backward op: those of ``recurrent.Backward``, of each direction."""

    gates: Tensor
    gates_reverse: Tensor
    grad_output: Tensor | None
    grad_output_reverse: Tensor | None
    grad_h_n: Tensor | None
    grad_h_n_reverse: Tensor | None
    grad_c_n: Tensor | None
    grad_c_n_reverse: Tensor | None
    grad_cells: Tensor | None
    grad_cells_reverse: Tensor | None
    output: Tensor
    output_reverse: Tensor
    cells: Tensor
    cells_reverse: Tensor
    h0: Tensor
    h0_reverse: Tensor
    c0: Tensor | None
    c0_reverse: Tensor | None
    weight_hh: Tensor
    weight_hh_reverse: Tensor
    keep: Tensor | None
    keep_reverse: Tensor | None
    lengths: Tensor | None
    kind: str
    grad_clip: float

    def direction(self, d: int) -> alone.Backward:
        """Those of one direction."""
        own: Any = self[d:22:2]
        gates, *grads, output, cells, h0, c0, weight_hh, keep = own
        nothing = self.h0.new_empty(0)
        fields: Any = (
            *(gates, *grads, output, cells, nothing, nothing, h0, c0, weight_hh),
            *(None, None, None, None, self.lengths, None, keep, self.kind, d == 1),
            *(0.0, 0.0, 0, self.grad_clip),
        )
        return alone.Backward(*fields)


def _backward_by_extension(a: Backward) -> Tensors:
    pairs: list[Any] = [a[i : i + 2] for i in range(0, 22, 2)]
    for i in (1, 4):  # [T, B, n]
        pairs[i] = [alone._steps(tensor) for tensor in pairs[i]]
    for i in (2, 3):
        pairs[i] = [None if tensor is None else tensor.contiguous() for tensor in pairs[i]]
    lists = [_list(pair, a.h0) for pair in pairs]
    numbers = (alone.KINDS[a.kind], a.grad_clip, alone._tf32(a.direction(0)))
    return tuple(_extension_backward(*lists, a.lengths, *numbers))


# --- candidates ----------------------------------------------------------------------------------


def _cuda_rejects(a: Forward | Backward) -> str | None:
    return alone._cuda_rejects(a.direction(0), directions=2)


def _triton_rejects(a: Forward | Backward) -> str | None:
    return alone._triton_rejects(a.direction(0))


forward_op = define_op(
    _FORWARD,
    Forward,
    _each(alone.forward_outputs, _FORWARD_RESULTS),
    alone.candidates(
        _forward_by_extension,
        _each(alone._forward_by_triton, _FORWARD_RESULTS),
        _each(alone._forward_by_reference, _FORWARD_RESULTS),
        _cuda_rejects,
        _triton_rejects,
    ),
)

backward_op = define_op(
    _BACKWARD,
    Backward,
    _each(alone.backward_outputs, _BACKWARD_RESULTS),
    alone.candidates(
        _backward_by_extension,
        _each(alone._backward_by_triton, _BACKWARD_RESULTS),
        _each(alone._backward_by_reference, _BACKWARD_RESULTS),
        _cuda_rejects,
        _triton_rejects,
    ),
)


# --- autograd ------------------------------------------------------------------------------------


def forward_layers(layers: tuple[Layer, Layer], kind: str, save: bool) -> Tensors:
    """What the forward op makes of both directions."""
    gates = [_input_gates(layer, kind) for layer in layers]
    pairs = [(layers[0][i], layers[1][i]) for i in (1, 2, 4)]  # h0, c0, weight_hh
    biases = [layer.bias_hh if kind == "gru" else None for layer in layers]
    keep = (layers[0].keep, layers[1].keep)
    flat = [tensor for pair in (*pairs, biases, keep) for tensor in pair]
    made: Tensors = forward_op(*gates, *flat, layers[0].lengths, kind, save)
    return made


class RecurrentBidirectionalFunction(torch.autograd.Function):
    """``RecurrentFunction`` of both directions: the same is saved, of each."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensors:
        count = len(Layer._fields)
        layers = Layer(*arguments[:count]), Layer(*arguments[count:-1])
        output, h_n, c_n, cells, gates, *second = forward_layers(layers, arguments[-1].kind, True)
        kept = (output, cells, gates, second[0], second[3], second[4])
        ctx.save_for_backward(*layers[0], *layers[1], *kept)
        ctx.options = arguments[-1]
        ctx.set_materialize_grads(False)
        return (output, h_n, c_n, cells, *second[:4])

    @staticmethod
    @function_backward
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needs, count = ctx.saved_tensors, ctx.needs_input_grad, len(Layer._fields)
        if all(grad is None for grad in grads):
            return (None,) * len(needs)
        layers = Layer(*saved[:count]), Layer(*saved[count : 2 * count])
        wanted = needs[:count], needs[count:]
        options = [ctx.options._replace(reverse=reverse) for reverse in (False, True)]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            by_direction = grads[:4], grads[4:]
            given = zip(layers, options, wanted, by_direction, strict=True)
            made = [differentiable(*each) for each in given]
        else:
            made = _all_gradients(layers, saved[2 * count :], options, wanted, grads)
        return (*made[0], *made[1], None)


def _all_gradients(
    layers: tuple[Layer, Layer],
    left: Sequence[Tensor],
    options: list[Options],
    wanted: tuple[Sequence[bool], Sequence[bool]],
    grads: Sequence[Tensor | None],
) -> list[tuple[Tensor | None, ...]]:
    """Of all a layer's tensors, for each direction."""
    first, second = layers
    if first.c0 is None:  # what stands for c_n and cells is empty, and so is its gradient
        grads = (*grads[:2], None, None, *grads[4:6], None, None)
    by_result = (grad for pair in zip(grads[:4], grads[4:], strict=True) for grad in pair)
    found = backward_op(
        *(left[2], left[5], *by_result, left[0], left[3], left[1], left[4]),
        *(first.h0, second.h0, first.c0, second.c0, first.weight_hh, second.weight_hh),
        *(first.keep, second.keep, first.lengths, options[0].kind, options[0].grad_clip),
    )
    nothing = first.h0.new_empty(0)
    made: list[tuple[Tensor | None, ...]] = []
    for d, layer in enumerate(layers):
        output, cells, gates = left[3 * d : 3 * d + 3]
        of_layer = Made(output, cells, gates, nothing, nothing)
        gradients = (*found[4 * d :][:4], nothing, nothing)
        made.append(layer_gradients(gradients, layer, of_layer, options[d], wanted[d]))
    return made
