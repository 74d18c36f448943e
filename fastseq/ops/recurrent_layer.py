"""A recurrent layer in one direction: the products around the recurrent ops, and autograd.

One node of the graph for all of it, the layer norm of the input's gates included: of a small layer
a node costs as much as its arithmetic. For the same reason the products of small layers are kernels
of our own, one call for all gradients; elsewhere they are the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _extension
from ..backends import current_backend
from ..reference import recurrent as reference
from ..reference.layer_norm import layer_norm as reference_layer_norm
from ..reference.recurrent import Options, Parameters
from . import layer_norm
from ._op import _is_plain, extension_op, function_backward
from .recurrent import backward_op, forward_op

_extension_input_gates = extension_op("recurrent_input_gates")
_extension_gradients = extension_op("recurrent_gradients")
Results = tuple[Tensor, Tensor, Tensor, Tensor]


class Layer(NamedTuple):
    """The tensors of a call: ``x [T, B, I]`` contiguous, states, parameters, what goes with them.

    Attributes:
        x: the input.
        weight_ih: ``[G H, I]``.
        bias_ih, bias_hh: ``[G H]`` each, or None.
        h0, c0: ``[B, P]`` and ``[B, H]``, contiguous.
        weight_hh, weight_hr, norm_hh, norm_c, bias_c: see ``Parameters`` of the reference.
        norm_ih: the gain ``[G H]`` of the norm over the input's gates, to which the biases are
            added that belong to them; given where norm_hh is.
        lengths, seed, keep: see ``sequence`` of the reference.
    """

    x: Tensor
    h0: Tensor
    c0: Tensor | None
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    norm_hh: Tensor | None
    norm_c: Tensor | None
    bias_c: Tensor | None
    norm_ih: Tensor | None
    lengths: Tensor | None
    seed: Tensor | None
    keep: Tensor | None


#: So many of them can be differentiated, and these are the others' gradients.
_INPUTS = 12
_NOT_INPUTS = (None,) * (len(Layer._fields) - _INPUTS)


def forward_layer(layer: Layer, options: Options, save: bool) -> tuple[Tensor, ...]:
    """What the forward op makes; ``save`` asks for what the backward needs, and for the cells."""
    gates_x = _normalized_gates(layer, options, _taken(layer))[0]
    return _recurrence(gates_x, layer, options, save)


def _recurrence(gates_x: Tensor, layer: Layer, options: Options, save: bool) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = forward_op(
        gates_x,
        layer.h0,
        layer.c0,
        *_parameters(layer, options.kind),
        *layer[_INPUTS:],
        *options[:5],
        save,
    )
    return made


def _parameters(layer: Layer, kind: str) -> Parameters:
    """Those of the recurrence. Only of a GRU does bias_hh belong to it."""
    bias_hh = layer.bias_hh if kind == "gru" else None
    return Parameters(layer.weight_hh, bias_hh, *layer[7:11])


def _normalized_gates(layer: Layer, options: Options, taken: Tensor | None) -> tuple[Tensor, ...]:
    """The input's gates, and with layer norm what its backward needs: product, mean and rstd.

    Args:
        taken: see :func:`_taken`; the product that comes back has these rows alone.
    """
    x, biases = layer.x, _input_biases(layer, options.kind)
    if taken is not None:
        x = x.flatten(0, 1).index_select(0, taken)
    kept: tuple[Tensor, ...] = ()
    if layer.norm_ih is None:
        gates = _product(x, layer.weight_ih, *biases)
    else:
        product = _product(x, layer.weight_ih)
        width, dtype = product.shape[-1], product.dtype
        gates, _, *statistics = layer_norm.forward_op(
            *(product, None, layer.norm_ih, _sum(*biases), None, width),
            *(options.eps, False, 0.0, dtype, dtype),
        )
        kept = (product, *statistics)
    if taken is not None:
        gates = _spread(gates, taken, layer.x, gates.new_empty)
    return (gates, *kept)


def _input_gates(layer: Layer, kind: str) -> Tensor:
    """Of all steps at once, with the biases that belong to them."""
    return _product(layer.x, layer.weight_ih, *_input_biases(layer, kind))


#: Steps are picked out where rows take less than this part of all, and the product of all of them
#: has so many multiplications.
_MOST_TAKEN, _LEAST_PICKED = 0.9, 1 << 23


def _taken(layer: Layer) -> Tensor | None:
    """Where ``lengths`` leave out many of the steps: those that are taken, as indices into
    ``T * B``. Then the products around the recurrence are of these alone."""
    x, lengths = layer.x, layer.lengths
    if lengths is None or not x.is_cpu or not _is_plain(x) or not _is_plain(lengths):
        return None
    if current_backend() not in ("auto", "cpu"):
        return None
    if x.numel() * layer.weight_ih.shape[0] < _LEAST_PICKED:
        return None
    mask = torch.arange(x.shape[0], device=x.device)[:, None] < lengths
    taken = mask.flatten().nonzero().squeeze(1)
    return taken if taken.numel() <= _MOST_TAKEN * mask.numel() else None


def _spread(rows: Tensor, taken: Tensor, x: Tensor, empty: Callable[..., Tensor]) -> Tensor:
    """The rows where they belong among all steps of x; ``empty`` makes what lies between them."""
    steps, batch = x.shape[:2]
    whole = empty(steps * batch, rows.shape[1])
    return whole.index_copy_(0, taken, rows).view(steps, batch, -1)


def _input_biases(layer: Layer, kind: str) -> tuple[Tensor | None, Tensor | None]:
    return layer.bias_ih, None if kind == "gru" else layer.bias_hh


def _product(
    x: Tensor, weight_ih: Tensor, bias_ih: Tensor | None = None, bias_hh: Tensor | None = None
) -> Tensor:
    if _is_small(x, weight_ih, packs=True):
        gates: Tensor = _extension_input_gates(x, weight_ih, bias_ih, bias_hh)
        return gates
    return F.linear(x, weight_ih, _sum(bias_ih, bias_hh))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


#: Multiplications of a product up to which ours is the one that is called, divided among up to 16
#: threads. Measured on one core of an AVX-512 EPYC against MKL: at 2 to 134 million 0.63 to 1.03 of
#: its time for all gradients, and a call for five; at 268 million 1.2. By AVX2 up to 8
#: million; none without vectors that multiply and add at once: the library has the machine's.
_SMALL = {None: 0, "generic": 0, "avx2": 1 << 23}.get(_extension.cpu_instruction_set(), 1 << 27)
#: The input's gates of fewer rows do not pay for packing the weight, but where all of it is quick.
_ROWS, _QUICK = 64, 1 << 20


def _is_small(x: Tensor, weight_ih: Tensor, *, packs: bool = False) -> bool:
    """Whether the products around the recurrence are those of ``csrc/cpu/recurrent_small.h``.

    Args:
        packs: asked for the one that packs the weight.
    """
    if not (_is_plain(x) and _is_plain(weight_ih)):  # a compiler would make a graph for every size
        return False
    width = weight_ih.shape[0]
    work = x.numel() * width
    return (
        x.dtype is torch.float32
        and x.is_cpu
        and x.dim() == 3
        and work * min(16, torch.get_num_threads()) < _SMALL
        and (not packs or work < _QUICK or x.shape[0] * x.shape[1] >= _ROWS)
        and x.is_contiguous()
        and weight_ih.is_contiguous()
        and current_backend() in ("auto", "cpu")
    )


def layer_by_reference(layer: Layer, options: Options) -> Results:
    """Output, h_n, c_n, cells by functions that can be transformed and differentiated."""
    kind, norm_ih = options.kind, layer.norm_ih
    bias = _sum(*_input_biases(layer, kind))
    x = F.linear(layer.x, layer.weight_ih, bias if norm_ih is None else None)
    if norm_ih is not None:
        x = reference_layer_norm(x, x.shape[-1:], norm_ih, bias, options.eps)
    parameters = _parameters(layer, kind)
    made = reference.sequence(
        x, layer.h0, layer.c0, parameters, layer.lengths, layer.seed, layer.keep, options
    )
    return made[:4]


class RecurrentFunction(torch.autograd.Function):
    """Saves the activated gates and the cells; one product a weight gives its gradient. With layer
    norm also what was normalized first."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Results:
        layer, options = Layer(*arguments[:-1]), arguments[-1]
        ctx.taken = _taken(layer)
        gates_x, *normalized = _normalized_gates(layer, options, ctx.taken)
        output, h_n, c_n, cells, *saved = _recurrence(gates_x, layer, options, True)
        ctx.save_for_backward(*layer, output, cells, *saved, *normalized)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return output, h_n, c_n, cells

    @staticmethod
    @function_backward
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, options, needs = ctx.saved_tensors, ctx.options, ctx.needs_input_grad
        layer, made, normalized = Layer(*saved[:15]), Made(*saved[15:20]), saved[20:]
        if all(grad is None for grad in grads):
            return (None,) * len(needs)
        # With create_graph the gradient must be differentiable itself: the reference is.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return (*differentiable(layer, options, needs, grads), None)
        if layer.c0 is None:
            grads = (*grads[:2], None, None)
        found = backward_op(
            made.gates,
            *grads,
            made.output,
            made.cells,
            made.normalized,
            made.statistics,
            layer.h0,
            layer.c0,
            layer.weight_hh,
            *layer[7:11],
            *layer[_INPUTS:],
            *options[:4],
            *options[5:],
        )
        return (*layer_gradients(found, layer, made, options, needs, ctx.taken, normalized), None)


class Made(NamedTuple):
    """What the forward left; see ``States`` of the reference."""

    output: Tensor
    cells: Tensor
    gates: Tensor
    normalized: Tensor
    statistics: Tensor


def layer_gradients(
    found: Sequence[Tensor],
    layer: Layer,
    made: Made,
    options: Options,
    needs: Sequence[bool],
    taken: Tensor | None = None,
    normalized: Sequence[Tensor] = (),
) -> tuple[Tensor | None, ...]:
    """Of all a layer's tensors, from what the backward op found.

    Args:
        taken: see :func:`_taken`.
        normalized: what the norm of the input's gates keeps; nothing without layer norm.
    """
    gates_x, gates_h, h0, c0, projected, rows = found
    if taken is not None:
        gates_x, gates_h = (
            grad.flatten(0, 1).index_select(0, taken) if grad.numel() else grad
            for grad in (gates_x, gates_h)
        )
    norms: tuple[Tensor | None, ...] = (None,) * 4
    if normalized:
        gates_x, norm_ih, bias = _through_input_norm(gates_x, layer, normalized, options, needs)
        norms = (*_grad_norms(rows, layer, needs), norm_ih)
    elif options.kind != "gru":
        gates_h = gates_x
    x, weight_ih, weight_hh, bias_ih, bias_hh = _gradients(
        gates_x, gates_h, rows, layer, made.output, options, needs, taken
    )
    if normalized:
        bias_ih = bias if needs[5] else None
        bias_hh = bias if needs[6] and options.kind != "gru" else bias_hh
    return (
        x,
        h0 if needs[1] else None,
        c0 if needs[2] else None,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        _grad_weight_hr(projected, made, layer, options) if needs[7] else None,
        *norms,
        *_NOT_INPUTS,
    )


def _through_input_norm(
    grad: Tensor,
    layer: Layer,
    normalized: Sequence[Tensor],
    options: Options,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of the product that was normalized, of the gain, and of what was added after it."""
    assert layer.norm_ih is not None
    product, mean, rstd = normalized
    biases = _input_biases(layer, options.kind)
    bias = biases[1] if biases[0] is None else biases[0]  # of their sum this has shape and dtype
    wanted = (True, False, needs[11], needs[5] or needs[6])
    through, _, gain, grad_bias = layer_norm.backward_op(
        *(grad, None, product, layer.norm_ih, bias, mean, rstd, None),
        *(product.shape[-1], 0.0, product.dtype, wanted),
    )
    return through, gain if needs[11] else None, grad_bias


def _gradients(
    gates_x: Tensor,
    gates_h: Tensor,
    rows: Tensor,
    layer: Layer,
    output: Tensor,
    options: Options,
    needs: Sequence[bool],
    taken: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Of x, weight_ih, weight_hh, bias_ih and bias_hh, from those of the gates.

    A bias that is added to the input's gates has the gradient of the other one.

    Args:
        taken: see :func:`_taken`; gates_x and gates_h have these rows alone.
    """
    x, weight_ih, reverse = layer.x, layer.weight_ih, options.reverse
    # With layer norm biases come after the products.
    shared, norm = options.kind != "gru", layer.norm_hh is not None
    bias_ih, bias_hh = not norm and (needs[5] or (shared and needs[6])), needs[6] and not shared
    # Where a row's first step is not that of all, or h is masked, its operand is written down.
    irregular = layer.keep is not None or (layer.lengths is not None and reverse)
    made: list[Tensor] | tuple[Tensor, ...]
    if taken is None and not irregular and _is_small(x, weight_ih):
        wanted = needs[0] + 2 * needs[3] + 4 * needs[4] + 8 * bias_ih + 16 * (bias_hh > norm)
        made = _extension_gradients(
            gates_x, gates_h, x, weight_ih, output, layer.h0, reverse, wanted
        )
    else:
        flat, made = gates_x.flatten(0, -2), [gates_x] * 5
        if needs[0]:
            made[0] = gates_x @ weight_ih
            if taken is not None:
                made[0] = _spread(made[0], taken, x, x.new_zeros)
        if needs[3]:
            made[1] = flat.t() @ _rows(x, taken)
        if needs[4]:
            made[2] = _grad_weight_hh(gates_h, layer, output, irregular, reverse, taken)
        if bias_ih:
            made[3] = flat.sum(0)
        if bias_hh and not norm:
            made[4] = gates_h.flatten(0, -2).sum(0)
    if bias_hh and norm:
        width = gates_x.shape[-1]
        made = [*made[:4], rows[:, width : 2 * width].sum(0).to(gates_x.dtype)]
    return (
        made[0] if needs[0] else None,
        made[1] if needs[3] else None,
        made[2] if needs[4] else None,
        made[3] if bias_ih and needs[5] else None,
        made[3 if shared else 4] if (bias_ih or bias_hh) and needs[6] else None,
    )


def _rows(steps: Tensor, taken: Tensor | None) -> Tensor:
    """``[T, B, n]`` as rows: all, or those that are taken."""
    rows = steps.flatten(0, 1)
    return rows if taken is None else rows.index_select(0, taken)


def _grad_weight_hh(
    grad_gates: Tensor,
    layer: Layer,
    output: Tensor,
    irregular: bool,
    reverse: bool,
    taken: Tensor | None,
) -> Tensor:
    """The sum over steps of ``grad_gates[t]^T h[t - 1]``, of all steps but the first at once,
    which starts from ``h0``."""
    flat, batch = grad_gates.flatten(0, -2), len(layer.h0)
    if irregular:
        before = reference.hidden_before(output, layer.h0, layer.lengths, reverse, layer.keep)
        return flat.t() @ _rows(before, taken)
    states, start = output.flatten(0, 1), layer.h0
    if taken is not None:  # in the order of steps: those of the first step come first
        begun = int((taken[:batch] < batch).sum())
        first, later = flat[:begun], flat[begun:]
        start = start.index_select(0, taken[:begun])
        before = states.index_select(0, taken[begun:] - batch)
    elif reverse:
        first, later, before = flat[-batch:], flat[:-batch], states[batch:]
    else:
        first, later, before = flat[:batch], flat[batch:], states[:-batch]
    if not len(later):
        return first.t() @ start
    return (later.t() @ before).addmm_(first.t(), start)


def _grad_weight_hr(projected: Tensor, made: Made, layer: Layer, options: Options) -> Tensor:
    """As of any linear layer, from its input ``o tanh(c)``, which is computed again."""
    compute = made.cells.dtype
    i, f, g, o = made.gates.to(compute).chunk(4, -1)
    cells = made.cells
    if options.zoneout_c:
        assert layer.c0 is not None
        start = (layer.c0, layer.lengths, options.reverse, None)
        cells = f * reference.hidden_before(made.cells, *start) + i * g
    if layer.norm_c is not None:
        cells = (cells - made.statistics[..., 1:2]) * made.statistics[..., 2:] * layer.norm_c
        cells = cells if layer.bias_c is None else cells + layer.bias_c
    unprojected = (o * cells.tanh()).to(projected.dtype)
    return projected.flatten(0, 1).t() @ unprojected.flatten(0, 1)


def _grad_norms(rows: Tensor, layer: Layer, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Of norm_hh, norm_c and bias_c: parts of one sum."""
    width = layer.weight_hh.shape[0]
    hidden = rows.shape[1] // 2 - width
    sums = rows.sum(0).to(layer.x.dtype).split([width, width, hidden, hidden])
    return tuple(
        part if parameter is not None and want else None
        for part, parameter, want in zip(
            (sums[0], *sums[2:]), layer[8:11], needs[8:11], strict=True
        )
    )


def differentiable(
    layer: Layer, options: Options, needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of a layer's tensors that can be differentiated again: the reference's."""
    if all(grad is None for grad in grads):
        return (None,) * len(layer)
    viewed: list[Any] = [None if t is None else t.view_as(t) for t in layer]
    aliases = Layer(*viewed)
    results = layer_by_reference(aliases, options)
    # Of a single step the cells do not depend on all parameters.
    pairs = [
        (o, g)
        for o, g in zip(results, grads, strict=True)
        if g is not None and o.numel() and o.requires_grad
    ]
    inputs = list(zip(aliases[:_INPUTS], needs, strict=False))
    if not pairs:
        return (None,) * len(layer)
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            [alias for alias, want in inputs if want and alias is not None],
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    made = [next(found) if want and alias is not None else None for alias, want in inputs]
    return (*made, *_NOT_INPUTS)
