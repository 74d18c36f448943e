"""The recurrent family's operators and cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..reference.recurrent import GATES
from .operators import FLOATING, Case, Operator, Problem

_HALVES = (torch.bfloat16, torch.float16)
_WIDE = (torch.float32, torch.float64)


def make(
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    kind: str,
    sizes: tuple[int, int, int, int],
    layers: int = 1,
    bidirectional: bool = False,
    projection: int = 0,
    bias: bool = True,
    initial: bool = True,
    lengths: tuple[int, ...] | None = None,
    norm: bool = False,
    values: str = "normal",
    transposed: bool = False,
    **options: Any,
) -> Problem:
    """A problem of a sequence operator; everything that has a batch has it in front.

    Args:
        kind: ``lstm``, ``gru``, ``tanh`` or ``relu``.
        sizes: steps, batch, features, hidden units.
        projection: the state's size where it is not the hidden units'.
        initial: whether initial states are given.
        lengths: of the rows, repeated as often as it takes; None: all have every step.
        norm: with layer norm.
        values: ``normal``; ``saturated`` (inputs of 50); ``padded`` (NaN past each row's length).
        transposed: the input is a view of time-major memory.
        options: of the public function.
    """
    steps, batch, features, hidden = sizes
    directions, state, gates = 1 + bidirectional, projection or hidden, GATES[kind] * hidden
    bound = 1 / math.sqrt(hidden)

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device) * scale
        return drawn.to(dtype)

    if transposed:
        input = tensor(steps, batch, features).transpose(0, 1)
    else:
        input = tensor(batch, steps, features)
    if values == "saturated":
        input = 50.0 * input.sign() * (1 + input.abs() % 1)
    arguments: dict[str, Tensor | None] = {"input": input}
    of_rows = None
    if lengths is not None:
        repeated = (lengths * batch)[:batch]
        of_rows = torch.tensor(repeated, dtype=torch.int64, device=device)
        if values == "padded":
            time = torch.arange(steps, device=device)
            input = torch.where(time[:, None] < of_rows[:, None, None], input, math.nan)
            arguments["input"] = input
        arguments["lengths"] = of_rows
    count = layers * directions
    if initial:
        arguments["h_0"] = tensor(batch, count, state)
        if kind == "lstm":
            arguments["c_0"] = tensor(batch, count, hidden)
    summed = {}
    for n in range(count):
        width = features if n < directions else state * directions
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (gates, width)}
        shapes["weight_hh"] = (gates, state)
        if bias:
            shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
        if projection:
            shapes["weight_hr"] = (state, hidden)
        if norm:
            shapes |= {"ln_ih": (gates,), "ln_hh": (gates,)}
            shapes |= {"ln_c": (hidden,), "ln_c_bias": (hidden,)} if kind == "lstm" else {}
        for name, shape in shapes.items():
            scale = 0.2 if name.startswith("ln") else bound
            drawn = tensor(*shape, scale=scale)
            if name.startswith("ln") and name != "ln_c_bias":
                drawn += 1
            arguments[f"{name}_{n}"] = drawn
            summed[f"{name}_{n}"] = steps * batch
    grads = {
        "output": tensor(batch, steps, state * directions),
        "h_n": tensor(batch, count, state),
    }
    if kind == "lstm":
        grads["c_n"] = tensor(batch, count, hidden)
    if options.get("return_all_states"):
        grads["all_h"] = tensor(count, batch, steps, state)
        if kind == "lstm":
            grads["all_c"] = tensor(count, batch, steps, hidden)
    return Problem(
        arguments,
        grads,
        options={"kind": kind, "layers": layers, "bidirectional": bidirectional, **options},
        differentiable=tuple(name for name in arguments if name != "lengths"),
        summed=summed,
    )


def _sorted_arguments(
    arguments: dict[str, Tensor | None],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """``(states [layers, B, n], params, norms)`` as the public functions take them."""
    given = {name: tensor for name, tensor in arguments.items() if tensor is not None}
    states = [given[name].transpose(0, 1) for name in ("h_0", "c_0") if name in given]
    params = [t for name, t in given.items() if name.startswith(("weight", "bias"))]
    norms = [t for name, t in given.items() if name.startswith("ln")]
    return states, params, norms


def _named(kind: str, results: tuple[Any, ...]) -> dict[str, Tensor]:
    """A public function's results by name, batch in front."""
    results = tuple(results)
    count = 3 if kind == "lstm" else 2
    names = ("output", "h_n", "c_n")[:count]
    found = dict(zip(names, results, strict=False))
    for name in names[1:]:
        found[name] = found[name].transpose(0, 1)
    if len(results) > count:
        everything = results[count] if kind == "lstm" else (results[count],)
        found |= dict(zip(("all_h", "all_c"), everything, strict=False))
    return found


def ours(
    *, kind: str, layers: int, bidirectional: bool, lengths: Tensor | None = None, **rest: Any
) -> dict[str, Tensor]:
    """The public function of this kind."""
    options = {name: rest.pop(name) for name in list(rest) if name in _OPTIONS}
    states, params, norms = _sorted_arguments(rest)
    hx = None if not states else tuple(states) if kind == "lstm" else states[0]
    function = getattr(functional, kind if kind in ("lstm", "gru") else "rnn")
    if norms:
        options["layer_norm"] = norms
    if kind in ("tanh", "relu"):
        options["nonlinearity"] = kind
    has_biases = any(name.startswith("bias") for name in rest)
    stack = (has_biases, layers, 0.0, False, bidirectional, True)
    results = function(rest["input"], hx, params, *stack, lengths=lengths, **options)
    return _named(kind, results)


_OPTIONS = ("zoneout", "bptt", "grad_clip", "return_all_states", "eps")


def theirs(
    *, kind: str, layers: int, bidirectional: bool, lengths: Tensor | None = None, **rest: Any
) -> dict[str, Tensor]:
    """torch's function; where it has none, the same written out in torch's functions, row by row
    where lengths differ."""
    options = {name: rest.pop(name) for name in list(rest) if name in _OPTIONS}
    states, params, norms = _sorted_arguments(rest)
    input, has_biases = rest["input"], any(name.startswith("bias") for name in rest)
    count = layers * (1 + bidirectional)
    hidden, state = params[0].shape[0] // GATES[kind], params[1].shape[1]
    if not states:
        states = [input.new_zeros(count, len(input), n) for n in (state, hidden)]
    states = states[: 2 if kind == "lstm" else 1]
    if norms or options:
        assert not bidirectional
        return _written_out(kind, input, states, params, norms, lengths, **options)

    def run(x: Tensor, hx: list[Tensor]) -> tuple[Tensor, ...]:
        function = getattr(torch, kind if kind in ("lstm", "gru") else f"rnn_{kind}")
        given = hx if kind == "lstm" else hx[0]
        stack = (has_biases, layers, 0.0, False, bidirectional, True)
        results: tuple[Tensor, ...] = function(x, given, params, *stack)
        return results

    if lengths is None:
        return _named(kind, run(input, [s.contiguous() for s in states]))
    rows = []
    for b, length in enumerate(lengths.tolist()):
        mine = [s[:, b : b + 1].contiguous() for s in states]
        if length:
            output, *final = run(input[b : b + 1, :length], mine)
            rows.append((F.pad(output, (0, 0, 0, input.shape[1] - length)), *final))
        else:
            width = state * (1 + bidirectional)
            rows.append((input.new_zeros(1, input.shape[1], width), *mine))
    output, *final = (
        torch.cat(parts, min(i, 1)) for i, parts in enumerate(zip(*rows, strict=True))
    )
    return _named(kind, (output, *final))


def _written_out(
    kind: str,
    input: Tensor,
    states: list[Tensor],
    params: list[Tensor],
    norms: list[Tensor],
    lengths: Tensor | None,
    *,
    zoneout: float = 0.0,
    bptt: int = 0,
    return_all_states: bool = False,
    eps: float = 1e-5,
) -> dict[str, Tensor]:
    """One layer, step by step, with what torch's functions lack."""
    w_ih, w_hh, b_ih, b_hh = params[:4]
    h, c = states[0][0], states[1][0] if kind == "lstm" else None
    outputs, cells = [], []
    for t in range(input.shape[1]):
        if bptt and t and t % bptt == 0:
            h, c = h.detach(), None if c is None else c.detach()
        x, u = F.linear(input[:, t], w_ih), F.linear(h, w_hh)
        if norms:
            x = F.layer_norm(x, x.shape[-1:], norms[0], None, eps)
            u = F.layer_norm(u, u.shape[-1:], norms[1], None, eps)
        x, u = x + b_ih, u + b_hh
        new_c = c
        if kind == "lstm":
            assert c is not None
            i, f, g, o = (x + u).chunk(4, -1)
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            squashed = new_c
            if norms:
                squashed = F.layer_norm(new_c, new_c.shape[-1:], norms[2], norms[3], eps)
            new_h = o.sigmoid() * squashed.tanh()
            new_c = new_c + zoneout * (c - new_c)
        else:
            (xr, xz, xn), (ur, uz, un) = x.chunk(3, -1), u.chunk(3, -1)
            z, n = (xz + uz).sigmoid(), (xn + (xr + ur).sigmoid() * un).tanh()
            new_h = n + z * (h - n)
        new_h = new_h + zoneout * (h - new_h)
        output, cell = new_h, new_c
        if lengths is not None:
            active = (t < lengths)[:, None]
            output, new_h = torch.where(active, new_h, 0.0), torch.where(active, new_h, h)
            if c is not None and new_c is not None:
                cell, new_c = torch.where(active, new_c, 0.0), torch.where(active, new_c, c)
        h, c = new_h, new_c
        outputs.append(output)
        cells.append(cell)
    found = {"output": torch.stack(outputs, 1), "h_n": h[:, None]}
    if c is not None:
        found["c_n"] = c[:, None]
    if return_all_states:
        found["all_h"] = found["output"][None].clone()
        if c is not None:
            found["all_c"] = torch.stack([cell for cell in cells if cell is not None], 1)[None]
    return found


# --- cells ---------------------------------------------------------------------------------------


def make_cell(
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    kind: str,
    sizes: tuple[int, int, int],
    bias: bool = True,
    values: str = "normal",
    **options: Any,
) -> Problem:
    """A problem of a cell; ``sizes``: batch, features, hidden units; ``values`` as :func:`make`."""
    batch, features, hidden = sizes
    gates, bound = GATES[kind] * hidden, 1 / math.sqrt(hidden)

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device) * scale
        return drawn.to(dtype)

    input = tensor(batch, features, scale=50.0 if values == "saturated" else 1.0)
    arguments: dict[str, Tensor | None] = {"input": input, "h": tensor(batch, hidden)}
    if kind == "lstm":
        arguments["c"] = tensor(batch, hidden)
    arguments["w_ih"] = tensor(gates, features, scale=bound)
    arguments["w_hh"] = tensor(gates, hidden, scale=bound)
    for name in ("b_ih", "b_hh"):
        arguments[name] = tensor(gates, scale=bound) if bias else None
    grads = {"h_new": tensor(batch, hidden)}
    if kind == "lstm":
        grads["c_new"] = tensor(batch, hidden)
    return Problem(
        arguments,
        grads,
        options={"kind": kind, **options},
        differentiable=tuple(name for name, value in arguments.items() if value is not None),
        summed=dict.fromkeys(("w_ih", "w_hh", "b_ih", "b_hh"), batch),
    )


def _cell(
    lstm: Callable[..., Any],
    gru: Callable[..., Any],
    tanh: Callable[..., Any],
    relu: Callable[..., Any],
    **rest: Any,
) -> dict[str, Tensor]:
    kind, h, c = rest.pop("kind"), rest.pop("h"), rest.pop("c", None)
    function = {"lstm": lstm, "gru": gru, "tanh": tanh, "relu": relu}[kind]
    result = function(hx=h if c is None else (h, c), **rest)
    return {"h_new": result} if c is None else dict(zip(("h_new", "c_new"), result, strict=True))


_our_cell = partial(
    _cell,
    functional.lstm_cell,
    functional.gru_cell,
    functional.rnn_cell,
    partial(functional.rnn_cell, nonlinearity="relu"),
)
_their_cell = partial(
    _cell, torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell
)


# --- cases ---------------------------------------------------------------------------------------


def _case(
    name: str,
    kind: str,
    *sizes: int,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    quick: bool = False,
    tiny: bool = False,
    large: bool = False,
    **more: Any,
) -> Case:
    return Case(name, {"kind": kind, "sizes": sizes, **more}, dtypes, quick, tiny, large)


def _cases(kind: str) -> tuple[Case, ...]:
    ragged = (3, 0, 1, 2)
    gated = kind in ("lstm", "gru")
    common = (
        _case("odd", kind, 3, 3, 5, 33, dtypes=_WIDE, quick=True, tiny=True),
        _case("wide", kind, 2, 17, 7, 129, quick=True),
        _case("stack", kind, 3, 6, 4, 20, layers=2, bidirectional=True, dtypes=_WIDE, quick=True),
        _case("both ways", kind, 2, 9, 12, 64, bidirectional=True, quick=True, tiny=True),
        _case("no bias, no states", kind, 3, 9, 8, 40, bias=False, initial=False),
        _case("lengths", kind, 3, 9, 8, 40, lengths=ragged, quick=True, tiny=True),
        _case("lengths, both ways", kind, 3, 9, 8, 40, lengths=ragged, bidirectional=True),
        _case("NaN in the padding", kind, 3, 9, 8, 40, lengths=ragged, values="padded", quick=True),
        _case("saturated", kind, 3, 16, 4, 32, values="saturated", dtypes=_WIDE[:1]),
        _case("time-major input", kind, 4, 9, 6, 48, transposed=True),
        _case("batch of 70", kind, 4, 70, 8, 20, dtypes=_WIDE),
        _case("64 steps", kind, 64, 4, 16, 48, dtypes=_WIDE),
        _case("128x32x256", kind, 128, 32, 256, 256, large=True),
        _case("64x16x1000", kind, 64, 16, 96, 1000, large=True),
    )
    if kind == "relu":  # in 16 bits what is rounded differently may fall to the other side of 0
        return tuple(case for case in common if not case.large and case.name in ("odd", "stack"))
    if not gated:
        return common
    return (
        *common,
        _case("layer norm", kind, 2, 33, 16, 129, norm=True, dtypes=_WIDE, quick=True),
        _case("layer norm, lengths", kind, 3, 17, 16, 64, norm=True, lengths=ragged, dtypes=_WIDE),
        _case("zoneout", kind, 3, 9, 8, 40, zoneout=0.3, dtypes=_WIDE),
        _case("truncated", kind, 5, 9, 8, 40, bptt=2, dtypes=_WIDE),
        _case("all states", kind, 3, 9, 8, 40, return_all_states=True, dtypes=_WIDE, tiny=True),
    )


_PROJECTED = (
    _case("projection", "lstm", 3, 9, 8, 65, projection=17, quick=True, tiny=True),
    _case(
        "projection, stack", "lstm", 3, 9, 8, 40, projection=20, layers=2, bidirectional=True,
        lengths=(3, 0, 1, 2), dtypes=_WIDE,
    ),
)  # fmt: skip


def _cell_cases(kind: str) -> tuple[Case, ...]:
    if kind == "relu":
        return (_case("relu", kind, 17, 40, 129, dtypes=_WIDE, quick=True, tiny=True),)
    return (
        _case("odd", kind, 3, 5, 33, quick=True, tiny=True),
        _case("wide", kind, 17, 40, 129),
        _case("no bias", kind, 5, 4, 64, bias=False, quick=True, tiny=True),
        _case("saturated", kind, 16, 4, 32, values="saturated", dtypes=_WIDE[:1], tiny=True),
        _case("no rows", kind, 0, 4, 8, tiny=True),
        _case("256x1024", kind, 256, 512, 1024, large=True),
    )


def _sequence_operator(name: str, kinds: tuple[str, ...], more: tuple[Case, ...] = ()) -> Operator:
    cases = tuple(case for kind in kinds for case in _cases(kind)) + more
    return Operator(name, "recurrent", "_recurrent_fwd", make, ours, theirs, cases)


def _cell_operator(name: str, kinds: tuple[str, ...]) -> Operator:
    cases = tuple(case for kind in kinds for case in _cell_cases(kind))
    op = "_recurrent_cell_fwd"
    return Operator(name, "recurrent", op, make_cell, _our_cell, _their_cell, cases)


OPERATORS = (
    _sequence_operator("lstm", ("lstm",), _PROJECTED),
    _sequence_operator("gru", ("gru",)),
    _sequence_operator("rnn", ("tanh", "relu")),
    _cell_operator("lstm_cell", ("lstm",)),
    _cell_operator("gru_cell", ("gru",)),
    _cell_operator("rnn_cell", ("tanh", "relu")),
)
