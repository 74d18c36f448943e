"""lstm, gru and rnn over whole sequences; their single steps are in ``recurrent_cell.py``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.utils.rnn import PackedSequence

from ..backends import current_backend, note
from ..ops.recurrent_bidirectional import RecurrentBidirectionalFunction, forward_layers
from ..ops.recurrent_layer import Layer, RecurrentFunction, forward_layer, layer_by_reference
from ..random import draw_seed, keep_mask, keep_scale
from ..reference.recurrent import GATES, Options
from ._dispatch import is_foreign, is_transformed, records_gradient, under_autocast
from ._recurrent_checks import check_call, check_tensors

Input = Tensor | PackedSequence
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Extras(NamedTuple):
    """What these functions have and torch's have not; by default nothing of it.

    Attributes:
        lengths: int64 ``[B]``: how many steps of each row there are. What is past them is not
            read; there the output is 0, and the final states are those of each row's last step.
        layer_norm: the gains of LayerNorm-LSTM and -GRU, flat, for each layer and direction: of
            the input's gates ``[G H]``, of the hidden gates ``[G H]`` and, for an LSTM, gain and
            bias of the cell ``[H]`` each.
        eps: of the layer norms.
        zoneout: the probability that a unit keeps its state for a step; for an LSTM also a pair,
            for h and for c (one number is that of both). Outside training the expectation.
        recurrent_dropout: the probability of zeroing an element of h before the recurrent product,
            one mask for all steps of a sequence; in training only.
        weight_dropout: the probability of zeroing a recurrent weight (DropConnect), in training.
        bptt: gradients do not flow back past every so many steps: those of a loop over chunks of
            the sequence that detaches its states in between.
        grad_clip: clamps the gradients of h and c that flow from a step to the one before.
        return_all_states: also return every h_t and c_t of every layer.
    """

    lengths: Tensor | None = None
    layer_norm: Sequence[Tensor] | None = None
    eps: float = 1e-5
    zoneout: float | tuple[float, float] = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    bptt: int | None = None
    grad_clip: float | None = None
    return_all_states: bool = False


_NO_EXTRAS = Extras()


class Shape(NamedTuple):
    """A stack's configuration, as torch's functions take it."""

    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    @property
    def directions(self) -> int:
        """2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1


def _with_extras(function: _Function) -> _Function:
    """Shows people and editors what ``**extras`` takes."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=Extras._field_defaults[name],
            annotation=annotation,
        )
        for name, annotation in Extras.__annotations__.items()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    return function


@_with_extras
def lstm(
    input: Input,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    **extras: Any,
) -> tuple[Any, ...]:
    r"""Long short-term memory over whole sequences, as ``torch.lstm``.

    .. math::
        i, f, o &= \sigma(W_i x_t + U_i h_{t-1} + b_i), \ldots \qquad
        g = \tanh(W_g x_t + U_g h_{t-1} + b_g) \\
        c_t &= f c_{t-1} + i g \qquad h_t = o \tanh(c_t) \quad (h_t = W_{hr}\, o \tanh(c_t))

    with layer norm the gates are those of :math:`\mathrm{LN}(W x_t) + \mathrm{LN}(U h_{t-1}) + b`,
    each norm over all gates of a row, and :math:`h_t = o \tanh(\mathrm{LN}(c_t))`.

    Args:
        input: ``[T, B, I]``, with ``batch_first`` ``[B, T, I]``, unbatched ``[T, I]``, or packed.
        hx: ``(h_0, c_0)``, ``[layers * directions, B, H]`` each (h: ``P`` with a projection), or
            None for zeros; without ``B`` for unbatched input.
        params: for each layer and direction ``weight_ih [4H, I]``, ``weight_hh [4H, H]``, with
            biases ``bias_ih`` and ``bias_hh [4H]``, with a projection ``weight_hr [P, H]``; rows
            in the order i, f, g, o.
        has_biases, num_layers, dropout, train, bidirectional, batch_first: as
            :class:`torch.nn.LSTM`; ``train`` switches every kind of dropout.
        extras: ``lengths, layer_norm, eps, zoneout, recurrent_dropout, weight_dropout, bptt,
            grad_clip, return_all_states``; see :class:`Extras`.

    Returns:
        ``(output, h_n, c_n)``, and with ``return_all_states`` a pair of all h ``[layers *
        directions, T, B, P]`` and all c ``[..., H]`` (batch first if that is asked for). All in
        the input's dtype; the cell state is kept in fp32 between steps.

    Raises:
        RuntimeError: shapes, devices or the number of params do not fit, or T is 0.
        ValueError: dtypes differ, or an option is out of range.

    Source: Hochreiter & Schmidhuber 1997; Sak et al. 2014 (projection); Ba et al. 2016, eq. 20-22;
    Krueger et al. 2017 (zoneout); Gal & Ghahramani 2016 (recurrent dropout); Merity et al. 2018
    (DropConnect). Random masks are functions of seeds drawn from torch's generator.
    """
    shape = Shape(has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return _recurrent("lstm", "lstm", input, hx, params, shape, Extras(**extras))


@_with_extras
def gru(
    input: Input,
    hx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    **extras: Any,
) -> tuple[Any, ...]:
    r"""Gated recurrent units over whole sequences, as ``torch.gru``.

    .. math::
        r, z &= \sigma(W x_t + b + U h_{t-1} + b') \\
        n &= \tanh(W_n x_t + b_n + r\,(U_n h_{t-1} + b'_n)) \\
        h_t &= (1 - z)\, n + z\, h_{t-1}

    with layer norm :math:`W x_t` and :math:`U h_{t-1}` are normalized over all gates of a row.
    Arguments, results and errors as :func:`lstm`, with one state: ``(output, h_n)`` and with
    ``return_all_states`` every h; gates in the order r, z, n.

    Source: Cho et al. 2014, with the reset gate after the product; Ba et al. 2016, eq. 23-25.
    """
    shape = Shape(has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return _recurrent("gru", "gru", input, hx, params, shape, Extras(**extras))


@_with_extras
def rnn(
    input: Input,
    hx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    nonlinearity: str = "tanh",
    **extras: Any,
) -> tuple[Any, ...]:
    r"""The Elman network over whole sequences, as ``torch.rnn_tanh`` and ``torch.rnn_relu``.

    .. math:: h_t = \tanh(W x_t + b + U h_{t-1} + b')

    or with ``relu`` in its place. Arguments, results and errors as :func:`gru`; no layer norm.

    Source: Elman, "Finding Structure in Time", 1990.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    shape = Shape(has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return _recurrent("rnn", nonlinearity, input, hx, params, shape, Extras(**extras))


def _recurrent(
    name: str,
    kind: str,
    input: Input,
    hx: Any,
    params: Sequence[Tensor],
    shape: Shape,
    extras: Extras,
) -> tuple[Any, ...]:
    """The order of decisions: foreign → validation → autocast → torch is quicker → ours."""
    packed = isinstance(input, PackedSequence)
    if packed and torch.compiler.is_compiling():
        # Shapes depend on the lengths' values. Of torch's own modules compilers make no graph, too.
        return _uncompiled(name, kind, input, hx, params, shape, extras)
    data: Tensor = input.data if packed else input  # type: ignore[assignment]
    states: list[Tensor] = [] if hx is None else list(hx) if kind == "lstm" else [hx]
    tensors = [data, *states, *params, *(extras.layer_norm or ())]
    plain = extras[3:] == _NO_EXTRAS[3:] and extras.lengths is None and extras.layer_norm is None
    if plain and is_foreign(*tensors):
        note(name, "torch", "a tensor subclass, layout or trace that torch must handle")
        return _by_torch(kind, input, states, params, shape)
    check_call(name, kind, input, states, params, shape, extras)
    if under_autocast(data) and data.dtype != torch.float64:
        if plain:
            note(name, "torch", "under autocast torch decides the dtypes")
            return _by_torch(kind, input, states, params, shape)
        low = torch.get_autocast_dtype(data.device.type)
        cast = [tensor.to(low) for tensor in tensors]
        data, states, params = cast[0], cast[1 : len(states) + 1], cast[len(states) + 1 :]
        if extras.layer_norm is not None:
            count = len(extras.layer_norm)
            params, norms = params[:-count], params[-count:]
            extras = extras._replace(layer_norm=norms)
        input = input._replace(data=data) if packed else data  # type: ignore[union-attr]
        with torch.autocast(data.device.type, enabled=False):
            return _stack(name, kind, input, states, params, shape, extras)
    check_tensors(name, tensors)
    if plain and (reason := _torch_is_quicker(kind, input, params, shape)):
        note(name, "torch", reason)
        return _by_torch(kind, input, states, params, shape)
    return _stack(name, kind, input, states, params, shape, extras)


#: The lazy form of torch.compiler.disable: that one imports the compiler for everybody.
_uncompiled = _disable_dynamo(_recurrent)


# --- torch's -------------------------------------------------------------------------------------


def _by_torch(
    kind: str, input: Input, states: list[Tensor], params: Sequence[Tensor], shape: Shape
) -> tuple[Any, ...]:
    """torch's function of this kind; its states in the order of the caller's batch."""
    function = getattr(torch, kind if kind in ("lstm", "gru") else f"rnn_{kind}")
    packed = isinstance(input, PackedSequence)
    data: Tensor = input.data if packed else input  # type: ignore[assignment]
    batch: int | None
    if packed:
        batch = int(input.batch_sizes[0])  # type: ignore[union-attr]
    elif data.dim() == 2:
        batch = None
    else:
        batch = data.shape[0 if shape.batch_first else 1]
    if not states:
        states = _zero_states(kind, data, batch, params, shape)
    # cuDNN refuses the backward of what ran outside training.
    train = shape.train
    if not train and data.is_cuda and records_gradient(data, *states, *params):
        shape, train = shape._replace(dropout=0.0), True
    options = [shape.has_biases, shape.num_layers, shape.dropout, train, shape.bidirectional]
    if not packed:
        unbatched = data.dim() == 2
        if unbatched:
            data = data.unsqueeze(0 if shape.batch_first else 1)
            states = [state.unsqueeze(1) for state in states]
        hx = states if kind == "lstm" else states[0]
        output, *final = function(data, hx, params, *options, shape.batch_first)
        if unbatched:
            output = output.squeeze(0 if shape.batch_first else 1)
            final = [state.squeeze(1) for state in final]
        return (output, *final)
    order, back = input.sorted_indices, input.unsorted_indices  # type: ignore[union-attr]
    states = [state if order is None else state.index_select(1, order) for state in states]
    hx = states if kind == "lstm" else states[0]
    output, *final = function(data, input.batch_sizes, hx, params, *options)  # type: ignore[union-attr]
    final = [state if back is None else state.index_select(1, back) for state in final]
    return (input._replace(data=output), *final)  # type: ignore[union-attr]


def _zero_states(
    kind: str, data: Tensor, batch: int | None, params: Sequence[Tensor], shape: Shape
) -> list[Tensor]:
    """States of zeros, without a batch dimension where ``batch`` is None."""
    layers = shape.num_layers * shape.directions
    hidden = params[0].shape[0] // GATES[kind]
    middle = () if batch is None else (batch,)
    h = data.new_zeros(layers, *middle, params[1].shape[1])
    return [h, data.new_zeros(layers, *middle, hidden)] if kind == "lstm" else [h]


def _torch_is_quicker(
    kind: str, input: Input, params: Sequence[Tensor], shape: Shape
) -> str | None:
    """Why torch's is the better one for a plain call, or None.

    Measured on one core of an AVX-512 EPYC. torch's LSTM runs on oneDNN, whose products are faster
    than those of the library around our loop: ours is at 0.85 to 1.0 of its speed (bf16: to 1.25),
    and ahead for a single row (1.0 to 1.5, most so with 64 units and with 1024; bf16: to 2.5),
    whose units our threads share. Everything else torch does step by step in its own functions,
    which ours beats from 4 steps on (RNN: 10; it does least a step), or from 16 rows on in all
    where the weights are large (0.5 to 0.7 with 512 units and 4 to 8 rows).
    """
    if current_backend() != "auto" or torch.compiler.is_compiling() or is_transformed():
        return None
    data: Tensor = input if isinstance(input, Tensor) else input.data
    if data.is_cuda:  # what to measure before this goes: docs/recurrent-kernels.md, last section
        return "cuDNN has it; ours have not been measured to be quicker on a GPU"
    if not data.is_cpu:
        return None
    if isinstance(input, PackedSequence):
        steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
        ragged = batch != int(input.batch_sizes[-1])
    elif data.dim() == 2:
        steps, batch, ragged = data.shape[0], 1, False
    else:
        ragged, time = False, 1 if shape.batch_first else 0
        steps, batch = data.shape[time], data.shape[1 - time]
    if steps < (4 if kind in ("lstm", "gru") else 10):
        return "few steps: the call costs more than the kernel saves"
    hidden = params[0].shape[0] // GATES[kind]
    if hidden >= 256 and steps * batch < 16:
        return "few steps of large weights: packing them costs more than the kernel saves"
    onednn = kind == "lstm" and not ragged and params[1].shape[1] == hidden and _onednn(data.dtype)
    if onednn and batch > 1:
        return "its LSTM runs on oneDNN, which is ahead of ours here"
    return None


@cache
def _onednn(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's LSTM for this dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


# --- ours ----------------------------------------------------------------------------------------


def _stack(
    name: str,
    kind: str,
    input: Input,
    states: list[Tensor],
    params: Sequence[Tensor],
    shape: Shape,
    extras: Extras,
) -> tuple[Any, ...]:
    """Layers and directions, each by one op; layouts, masks and dropout around them."""
    packed = isinstance(input, PackedSequence)
    x: Tensor
    if packed:
        x, lengths, host_lengths = _unpacked(input)  # type: ignore[arg-type]
        order, back = input.sorted_indices, input.unsorted_indices  # type: ignore[union-attr]
        if order is not None:
            states = [state.index_select(1, order) for state in states]
    else:
        x, lengths = input, extras.lengths  # type: ignore[assignment]
        unbatched = x.dim() == 2
        if unbatched:
            x, states = x.unsqueeze(1), [state.unsqueeze(1) for state in states]
        elif shape.batch_first:
            x = x.transpose(0, 1)
        if lengths is not None:
            lengths = lengths.to(x.device, torch.int64).contiguous()
            time = torch.arange(x.shape[0], device=x.device)[:, None]
            # What is past the end must not reach a product: NaN times 0 is NaN.
            x = torch.where((time < lengths)[:, :, None], x, 0.0)
    x = x.contiguous()
    layers = shape.num_layers * shape.directions
    # Their gradients are views of one layer's, and one stack of several's.
    each_layer = [state.unbind() if layers > 1 else (state.squeeze(0),) for state in states]
    starts = [list(start) for start in zip(*each_layer, strict=True)]
    if not starts:
        hidden, state = params[0].shape[0] // GATES[kind], params[1].shape[1]
        # Nobody writes to them: all layers can have the same ones.
        h, c = x.new_zeros(x.shape[1], state), x.new_zeros(x.shape[1], hidden)
        starts = [[h, c]] * layers

    each, norms_each = len(params) // layers, len(extras.layer_norm or ()) // layers
    finals: list[list[Tensor]] = []
    everything: list[list[Tensor]] = []
    for layer in range(shape.num_layers):
        calls, outputs = [], []
        for direction in range(shape.directions):
            n = layer * shape.directions + direction
            weights = params[n * each : (n + 1) * each]
            norms = (extras.layer_norm or ())[n * norms_each : (n + 1) * norms_each]
            given = (weights, norms, lengths, direction, shape, extras)
            calls.append(_layer(kind, x, starts[n], *given))
        for output, h_n, c_n, cells in _run(calls, extras.return_all_states):
            outputs.append(output)
            finals.append([h_n, c_n])
            everything.append([output, cells])
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if shape.train and shape.dropout and layer < shape.num_layers - 1:
            x = F.dropout(x, shape.dropout)

    count = 2 if kind == "lstm" else 1
    results = [_stacked([final[i] for final in finals]) for i in range(count)]
    all_states = []
    if extras.return_all_states:
        all_states = [torch.stack([one[i] for one in everything]).to(x.dtype) for i in range(count)]
    if packed:
        if back is not None:
            results = [result.index_select(1, back) for result in results]
        data = torch._VF._pack_padded_sequence(x, host_lengths, False)[0]
        return (input._replace(data=data), *results)  # type: ignore[union-attr]
    if unbatched:
        x, results = x.squeeze(1), [result.squeeze(1) for result in results]
        all_states = [state.squeeze(2) for state in all_states]
    elif shape.batch_first:
        x, all_states = x.transpose(0, 1), [state.transpose(1, 2) for state in all_states]
    if not extras.return_all_states:
        return (x, *results)
    return (x, *results, tuple(all_states) if kind == "lstm" else all_states[0])


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _unpacked(packed: PackedSequence) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(padded [T, B, I], lengths or None if all are the same, lengths on the host)``."""
    data, sizes = packed.data, packed.batch_sizes
    padded, lengths = torch._VF._pad_packed_sequence(data, sizes, False, 0.0, len(sizes))
    same = int(sizes[0]) == int(sizes[-1])
    return padded, None if same else lengths.to(data.device), lengths


def _layer(
    kind: str,
    x: Tensor,
    states: list[Tensor],
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    lengths: Tensor | None,
    direction: int,
    shape: Shape,
    extras: Extras,
) -> tuple[Layer, Options]:
    """A layer in one direction: masks drawn; the op is left."""
    weight_ih, weight_hh, *rest = weights
    bias_ih, bias_hh = (rest[0], rest[1]) if shape.has_biases else (None, None)
    weight_hr = rest[-1] if len(rest) % 2 else None
    norm_ih, norm_hh, norm_c, bias_c = (*norms, None, None, None, None)[:4]

    keep, seed = None, None
    h0, c0 = states[0].contiguous(), states[1].contiguous() if kind == "lstm" else None
    if shape.train and extras.weight_dropout:
        weight_hh = _dropped(weight_hh, extras.weight_dropout)
    if shape.train and extras.recurrent_dropout:
        keep = _dropped(torch.ones_like(h0), extras.recurrent_dropout).detach()
    zoneout = extras.zoneout
    zoneout_h, zoneout_c = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
    if shape.train and (zoneout_h or zoneout_c):
        seed = draw_seed(x.device)
    options = Options(
        kind,
        direction == 1,
        float(zoneout_h),
        float(zoneout_c) if kind == "lstm" else 0.0,
        extras.eps,
        extras.bptt or 0,
        extras.grad_clip or 0.0,
    )
    if torch.compiler.is_compiling():  # which stops where a tensor is in two places: tied weights
        weight_hh = weight_hh.view_as(weight_hh)
        bias_hh = None if bias_hh is None else bias_hh.view_as(bias_hh)
    # The kernels read them as they lie in memory.
    own = (bias_ih, bias_hh, weight_hr, norm_hh, norm_c, bias_c, norm_ih)
    parameters: Any = [None if tensor is None else tensor.contiguous() for tensor in own]
    tensors = (x, h0, c0, weight_ih, weight_hh.contiguous(), *parameters, lengths, seed, keep)
    layer = Layer(*tensors)
    return layer, options


Results = tuple[Tensor, Tensor, Tensor, Tensor]


def _run(calls: list[tuple[Layer, Options]], save: bool) -> list[Results]:
    """The ops of a layer, both directions at once where a GPU can: output, h_n, c_n and cells."""
    if len(calls) == 2 and _runs_at_once(*calls[0]):
        return _run_at_once((calls[0][0], calls[1][0]), calls[0][1], save)
    return [_run_alone(layer, options, save) for layer, options in calls]


def _run_alone(layer: Layer, options: Options, save: bool) -> Results:
    if is_transformed() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        note(options.kind, "reference", "torch.func, forward-mode AD or a trace")
        return layer_by_reference(layer, options)
    if records_gradient(*layer):
        recorded: Results = RecurrentFunction.apply(*layer, options)  # type: ignore[no-untyped-call]
        return recorded
    made: Any = forward_layer(layer, options, save)
    return made[:4]  # type: ignore[no-any-return]


def _runs_at_once(layer: Layer, options: Options) -> bool:
    """What the persistent CUDA kernels take, they take in both directions at once."""
    refused = (layer.weight_hr, layer.norm_hh, layer.norm_c, layer.bias_c)
    plain = not (options.zoneout_h or options.zoneout_c) and all(t is None for t in refused)
    return (
        plain and layer.x.is_cuda and not is_transformed() and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    )


def _run_at_once(layers: tuple[Layer, Layer], options: Options, save: bool) -> list[Results]:
    first, second = layers
    if torch.compiler.is_compiling():  # which stops where a tensor is in two places
        views: Any = [None if t is None else t.view_as(t) for t in second]
        second = Layer(*views)
    if records_gradient(*first, *second):
        both: Any = RecurrentBidirectionalFunction.apply(*first, *second, options)  # type: ignore[no-untyped-call]
        return [both[:4], both[4:]]
    made: Any = forward_layers((first, second), options.kind, save)
    return [made[:4], made[5:9]]


def _dropped(tensor: Tensor, probability: float) -> Tensor:
    """Dropout by the counter-based generator, with a seed drawn from torch's."""
    keep = keep_mask(draw_seed(tensor.device), tuple(tensor.shape), probability)
    return tensor * (keep * keep_scale(probability)).to(tensor.dtype)
