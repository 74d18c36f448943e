"""LSTM, GRU and Elman RNN: one step, one layer in one direction, and its backward in closed form.

LSTM: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000 and the projection of
Sak et al. 2014. GRU: Cho et al. 2014, with the reset gate after the recurrent product. RNN: Elman
1990. Layer norm: Ba et al. 2016, eq. 20-25. Zoneout: Krueger et al. 2017. Recurrent dropout: Gal &
Ghahramani 2016, one mask for the whole sequence. Gates stand in torch's order: i, f, g, o and
r, z, n.

Arithmetic and the cell state are fp32 (fp64 for fp64 input); each h_t is rounded to the input's
dtype, and the next step reads it as rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..random import keep_mask
from .layer_norm import compute_dtype

#: Gates of each kind of cell, and how many numbers a unit leaves behind for the backward.
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
SAVED = {"lstm": 4, "gru": 4, "tanh": 1, "relu": 1}


class Parameters(NamedTuple):
    """What a layer-direction is made of, apart from the input's weights.

    With ``G`` gates of ``H`` units and a state of ``P`` (``H``, or ``proj_size``):

    Attributes:
        weight_hh: ``[G H, P]``.
        bias_hh: ``[G H]`` or None; of a GRU only, as elsewhere it is added to the input's.
        weight_hr: the projection ``[P, H]`` or None.
        norm_hh: the gain ``[G H]`` of the norm over the hidden gates, or None: no layer norm.
        norm_c, bias_c: gain and bias ``[H]`` of the norm over the cell, of an LSTM with layer norm.
    """

    weight_hh: Tensor
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None
    norm_hh: Tensor | None = None
    norm_c: Tensor | None = None
    bias_c: Tensor | None = None


class Options(NamedTuple):
    """How a layer-direction runs; what is a tensor of the call itself is an argument.

    Attributes:
        kind: ``lstm``, ``gru``, ``tanh`` or ``relu``.
        reverse: from the last step of each row to the first.
        zoneout_h, zoneout_c: the probability that a unit keeps its state.
        eps: of the layer norms.
        bptt: no gradient flows back past every so many steps; 0: it does.
        grad_clip: what flows back to a step's state is clamped to this; 0: it is not.
    """

    kind: str
    reverse: bool = False
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    eps: float = 1e-5
    bptt: int = 0
    grad_clip: float = 0.0


class States(NamedTuple):
    """What a layer-direction computes; the first four are results, the rest is for the backward.

    Attributes:
        output: every h_t, ``[T, B, P]``, 0 past a row's length.
        h_n, c_n: the state after each row's last step; ``c_n`` is empty but for an LSTM.
        cells: every c_t in the arithmetic's dtype ``[T, B, H]``, likewise.
        gates: activated, ``[T, B, 4 H]``: i, f, g, o; r, z, n and the hidden part of n; h.
        normalized: with layer norm the normalized hidden gates ``[T, B, G H]``.
        statistics: with layer norm ``[T, B, 3]``: rstd of the gates, mean and rstd of the cell.
    """

    output: Tensor
    h_n: Tensor
    c_n: Tensor
    cells: Tensor
    gates: Tensor
    normalized: Tensor
    statistics: Tensor


# --- one step ------------------------------------------------------------------------------------


def lstm_step(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(c', o, activated gates)`` with ``c' = f c + i g`` and ``h' = o tanh(c')`` left to do."""
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    return f * c + i * g, o, torch.cat([i, f, g, o], -1)


def gru_step(gates_x: Tensor, gates_h: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """``(h', saved)`` with ``n = tanh(n_x + r n_h)`` and ``h' = (1 - z) n + z h``."""
    (xr, xz, xn), (hr, hz, hn) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return n + z * (h - n), torch.cat([r, z, n, hn], -1)


def cell(
    gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One plain step from both halves of the gates: ``(h', c', saved)``, ``c'`` empty without c.

    ``h'`` and ``c'`` have the dtypes of ``h`` and ``c``.
    """
    compute = compute_dtype(gates_x.dtype)
    x, hidden, before = gates_x.to(compute), gates_h.to(compute), h.to(compute)
    if kind == "lstm":
        assert c is not None
        cell_state, o, saved = lstm_step(x + hidden, c.to(compute))
        return (o * cell_state.tanh()).to(h.dtype), cell_state.to(c.dtype), saved.to(h.dtype)
    if kind == "gru":
        after, saved = gru_step(x, hidden, before)
    else:
        after = saved = (x + hidden).tanh() if kind == "tanh" else (x + hidden).relu()
    return after.to(h.dtype), h.new_empty(0), saved.to(h.dtype)


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``((x - mean) rstd, mean, rstd)`` over the last dimension."""
    mean = x.mean(-1, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + eps)
    return (x - mean) * rstd, mean, rstd


# --- a layer in one direction --------------------------------------------------------------------


def sequence(
    gates_x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    parameters: Parameters,
    lengths: Tensor | None,
    seed: Tensor | None,
    keep: Tensor | None,
    options: Options,
) -> States:
    """Every step of a layer in one direction, differentiable.

    Args:
        gates_x: ``W_ih x + b_ih`` of all steps, ``[T, B, G H]`` (normalized, with layer norm).
        h0, c0: ``[B, P]`` and, for an LSTM, ``[B, H]``.
        lengths: int64 ``[B]``: a row's steps from this one on are not taken; None: all are.
        seed: int64 ``[1]``, draws the units that zoneout holds; None: it takes the expectation.
        keep: ``[B, P]``: what h is multiplied by before the recurrent product (dropout), or None.
    """
    kind, compute, dtype = options.kind, compute_dtype(gates_x.dtype), gates_x.dtype
    weight = parameters.weight_hh.to(compute)
    bias, projection, norm_hh, norm_c, bias_c = (
        None if p is None else p.to(compute) for p in parameters[1:]
    )
    h, c = h0.to(compute), None if c0 is None else c0.to(compute)
    made: dict[int, dict[str, Tensor]] = {}
    for n, t, held_h, held_c in _steps(gates_x, h0, seed, options):
        # A row that does not take part keeps its state as it is, gradient and all.
        h_idle, c_idle = h, c
        if options.bptt and n and n % options.bptt == 0:
            h, c = h.detach(), None if c is None else c.detach()
        if options.grad_clip:
            h = clip_gradient(h, options.grad_clip)
            c = None if c is None else clip_gradient(c, options.grad_clip)
        x, step = gates_x[t].to(compute), made.setdefault(t, {})
        hidden = (h if keep is None else h * keep.to(compute)) @ weight.T
        statistics: list[Tensor] = []
        c_new: Tensor | None = None
        if norm_hh is not None:
            hidden, _, rstd = normalize(hidden, options.eps)
            step["normalized"], hidden = hidden.to(dtype), hidden * norm_hh
            statistics = [rstd, torch.zeros_like(rstd), torch.zeros_like(rstd)]
        if bias is not None:
            hidden = hidden + bias
        if kind == "lstm":
            assert c is not None
            cell_state, o, saved = lstm_step(x + hidden, c)
            squashed = cell_state
            if norm_c is not None:
                squashed, mean, rstd = normalize(cell_state, options.eps)
                statistics[1:] = [mean, rstd]
                squashed = squashed * norm_c
                if bias_c is not None:
                    squashed = squashed + bias_c
            h_new = o * squashed.tanh()
            if projection is not None:
                h_new = h_new @ projection.T
            c_new = step["cells"] = _hold(c, cell_state, held_c)
        elif kind == "gru":
            h_new, saved = gru_step(x, hidden, h)
        else:
            h_new = saved = (x + hidden).tanh() if kind == "tanh" else (x + hidden).relu()
        h_new = _hold(h, h_new, held_h).to(dtype).to(compute)
        step["gates"] = saved.to(dtype)
        if statistics:
            step["statistics"] = torch.cat(statistics, -1)
        step["output"] = h_new.to(dtype)
        if lengths is not None:
            active = (t < lengths)[:, None]
            for name, value in step.items():
                step[name] = torch.where(active, value, 0.0)
            h_new = torch.where(active, h_new, h_idle)
            if c_new is not None and c_idle is not None:
                c_new = torch.where(active, c_new, c_idle)
        h, c = h_new, c_new

    def stacked(name: str) -> Tensor:
        if name not in made[0]:
            return gates_x.new_empty(0, dtype=_DTYPES.get(name, lambda d: d)(dtype))
        return torch.stack([made[t][name] for t in range(len(made))])

    c_n = h0.new_empty(0) if c is None or c0 is None else c.to(c0.dtype)
    names = ("cells", "gates", "normalized", "statistics")
    return States(stacked("output"), h.to(h0.dtype), c_n, *map(stacked, names))


_DTYPES = {"cells": compute_dtype, "statistics": compute_dtype}


def _steps(
    gates_x: Tensor, h0: Tensor, seed: Tensor | None, options: Options
) -> Iterator[tuple[int, int, Any, Any]]:
    """``(n, t, held_h, held_c)``: the n-th step, its time, and what zoneout keeps of h and c."""
    steps, batch = gates_x.shape[:2]
    hidden = gates_x.shape[2] // GATES[options.kind]
    held_h = zoneout(seed, options.zoneout_h, 0, (steps, batch, h0.shape[-1]))
    held_c = zoneout(seed, options.zoneout_c, 1, (steps, batch, hidden))
    for n in range(steps):
        t = steps - 1 - n if options.reverse else n
        yield (
            n,
            t,
            held_h[t] if isinstance(held_h, Tensor) else held_h,
            held_c[t] if isinstance(held_c, Tensor) else held_c,
        )


def zoneout(
    seed: Tensor | None, probability: float, which: int, shape: tuple[int, int, int]
) -> Tensor | float:
    """What part of a unit's state stays as it was: 0 or 1 as drawn, or the probability itself.

    The draws for ``h`` (``which`` 0) and for ``c`` (1) are rows ``(which T + t) B + b`` of the
    counter-based generator.
    """
    if seed is None or not probability:
        return probability
    drawn = keep_mask(seed, (which + 1, *shape), probability)[which]
    return (~drawn).to(torch.float32)


def _hold(before: Tensor, after: Tensor, held: Tensor | float) -> Tensor:
    if isinstance(held, float) and not held:
        return after
    return (
        after + held * (before - after)
        if isinstance(held, float)
        else torch.where(held > 0, before, after)
    )


class _ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is clamped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-ctx.bound, ctx.bound), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


def clip_gradient(x: Tensor, bound: float) -> Tensor:
    """``x`` itself; its gradient is clamped to ``[-bound, bound]``."""
    clipped: Tensor = _ClipGradient.apply(x, bound)  # type: ignore[no-untyped-call]
    return clipped


# --- backward ------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """What the backward recurrence leaves; weights' gradients are products of these.

    Attributes:
        gates_x: with respect to ``gates_x``, ``[T, B, G H]``, 0 past a row's length.
        gates_h: with respect to ``W_hh h``; empty where it is the same (no GRU, no layer norm).
        h0, c0: of the initial state.
        projected: with a projection, with respect to its result, ``[T, B, P]``.
        rows: with layer norm, sums over time for each row ``[B, 2 G H + 2 H]``: norm_hh, bias_hh,
            norm_c, bias_c.
    """

    gates_x: Tensor
    gates_h: Tensor
    h0: Tensor
    c0: Tensor
    projected: Tensor
    rows: Tensor


def cell_backward(
    grad_h: Tensor,
    grad_c: Tensor | None,
    saved: Tensor,
    h: Tensor,
    c: Tensor | None,
    c_new: Tensor | None,
    kind: str,
    squash: Tensor | None = None,
    grad_squash: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`cell`: ``(gates_x, gates_h, h, c)``, all in the arithmetic's dtype.

    ``h`` is the direct part, without that through the recurrent product. With layer norm of the
    cell, ``squash`` is what the tanh was taken of, and ``grad_squash`` None asks for the gradient
    with respect to that in place of ``c``'s.
    """
    if kind == "gru":
        r, z, n, hn = saved.chunk(4, -1)
        grad_n = grad_h * (1 - z) * (1 - n * n)
        grad_r = grad_n * hn * r * (1 - r)
        grad_z = grad_h * (h - n) * z * (1 - z)
        return (
            torch.cat([grad_r, grad_z, grad_n], -1),
            torch.cat([grad_r, grad_z, grad_n * r], -1),
            grad_h * z,
            None,
        )
    if kind != "lstm":
        slope = 1 - saved * saved if kind == "tanh" else (saved > 0).to(saved.dtype)
        return grad_h * slope, grad_h * slope, torch.zeros_like(grad_h), None
    assert c is not None
    assert c_new is not None
    i, f, g, o = saved.chunk(4, -1)
    tanh = (c_new if squash is None else squash).tanh()
    through = grad_h * o * (1 - tanh * tanh) if grad_squash is None else grad_squash
    total = through if grad_c is None else through + grad_c
    gates = [
        total * g * i * (1 - i),
        total * c * f * (1 - f),
        total * i * (1 - g * g),
        grad_h * tanh * o * (1 - o),
    ]
    grads = torch.cat(gates, -1)
    return grads, grads, torch.zeros_like(grad_h), total * f


def normalize_backward(grad: Tensor, normalized: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of :func:`normalize`'s input from that of its result."""
    mean = grad.mean(-1, keepdim=True)
    return rstd * (grad - mean - normalized * (grad * normalized).mean(-1, keepdim=True))


def sequence_backward(
    grads: Sequence[Tensor | None],
    states: States,
    h0: Tensor,
    c0: Tensor | None,
    parameters: Parameters,
    lengths: Tensor | None,
    seed: Tensor | None,
    keep: Tensor | None,
    options: Options,
) -> Gradients:
    """The backward of :func:`sequence`, step by step from the last.

    Args:
        grads: of output, h_n, c_n and cells; None where nothing depends on it.
        states: what :func:`sequence` returned.
    """
    kind, dtype = options.kind, states.output.dtype
    compute = compute_dtype(dtype)
    weight = parameters.weight_hh.to(compute)
    _, projection, norm_hh, norm_c, bias_c = (
        None if p is None else p.to(compute) for p in parameters[1:]
    )
    steps, batch = states.output.shape[:2]
    width = states.gates.shape[2] // SAVED[kind]
    lstm = kind == "lstm"

    def first(grad: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like, dtype=compute) if grad is None else grad.to(compute)

    grad_h = first(grads[1], h0)
    grad_c = first(grads[2], c0) if c0 is not None else None
    rows = torch.zeros(batch, 2 * (GATES[kind] + 1) * width, dtype=compute, device=h0.device)
    made: dict[str, dict[int, Tensor]] = {"gates_x": {}, "gates_h": {}, "projected": {}}
    for n, t, held_h, held_c in reversed(
        list(_steps(states.gates[..., : GATES[kind] * width], h0, seed, options))
    ):
        before = t + 1 if options.reverse else t - 1
        h = _previous(states.output, before, t, h0, lengths, options.reverse).to(compute)
        c = c_new = None
        if lstm:
            assert c0 is not None
            c = _previous(states.cells, before, t, c0, lengths, options.reverse).to(compute)
        total = grad_h if grads[0] is None else grad_h + grads[0][t].to(compute)
        total_c = grad_c
        if lstm and grad_c is not None and grads[3] is not None:
            total_c = grad_c + grads[3][t].to(compute)
        held = held_h if isinstance(held_h, Tensor) else torch.full_like(total, held_h)
        direct, inner = held * total, (1 - held) * total
        direct_c = None
        if lstm and total_c is not None:
            held = held_c if isinstance(held_c, Tensor) else torch.full_like(total_c, held_c)
            direct_c, total_c = held * total_c, (1 - held) * total_c
        if projection is not None:
            made["projected"][t] = inner.to(dtype)
            inner = made["projected"][t].to(compute) @ projection
        saved = states.gates[t].to(compute)
        if lstm:
            assert c is not None
            i, f, g, _ = saved.chunk(4, -1)
            # What zoneout mixed in is not in the tanh.
            c_new = f * c + i * g if options.zoneout_c else states.cells[t]
        squash = through = None
        if norm_c is not None:
            assert c_new is not None
            mean, rstd = states.statistics[t, :, 1:2], states.statistics[t, :, 2:]
            normalized = (c_new - mean) * rstd
            squash = normalized * norm_c
            if bias_c is not None:
                squash = squash + bias_c
            slope = inner * saved[:, 3 * width :] * (1 - squash.tanh().square())
            through = normalize_backward(slope * norm_c, normalized, rstd)
        gates_x, gates_h, more, back_c = cell_backward(
            inner, total_c, saved, h, c, c_new, kind, squash, through
        )
        gates_x, gates_h = gates_x.to(dtype), gates_h.to(dtype)
        active = None if lengths is None else (t < lengths)[:, None]
        if norm_hh is not None:
            after = gates_h.to(compute)
            normal = states.normalized[t].to(compute)
            sums = [after * normal, after]
            if norm_c is not None:
                sums += [slope * normalized, slope]
            else:
                sums += [torch.zeros_like(inner)] * 2
            added = torch.cat(sums, -1)
            rows = rows + (added if active is None else torch.where(active, added, 0.0))
            rstd = states.statistics[t, :, :1]
            gates_h = normalize_backward(after * norm_hh, normal, rstd).to(dtype)
        back = gates_h.to(compute) @ weight
        if keep is not None:
            back = back * keep.to(compute)
        back = back + direct
        if kind == "gru":
            back = back + more
        if back_c is not None and direct_c is not None:
            back_c = back_c + direct_c
        if options.grad_clip:
            bound = options.grad_clip
            back = back.clamp(-bound, bound)
            back_c = None if back_c is None else back_c.clamp(-bound, bound)
        if options.bptt and n and n % options.bptt == 0:
            back = torch.zeros_like(back)
            back_c = None if back_c is None else torch.zeros_like(back_c)
        if active is not None:
            gates_x, gates_h = (torch.where(active, g, 0.0) for g in (gates_x, gates_h))
            if projection is not None:
                made["projected"][t] = torch.where(active, made["projected"][t], 0.0)
            back = torch.where(active, back, grad_h)
            back_c = None if back_c is None else torch.where(active, back_c, grad_c)  # type: ignore[arg-type]
        made["gates_x"][t], made["gates_h"][t] = gates_x, gates_h
        grad_h, grad_c = back, back_c

    def stacked(name: str, present: bool) -> Tensor:
        if not present:
            return h0.new_empty(0, dtype=dtype)
        return torch.stack([made[name][t] for t in range(steps)])

    normed = norm_hh is not None
    return Gradients(
        stacked("gates_x", True),
        stacked("gates_h", normed or kind == "gru"),
        grad_h.to(h0.dtype),
        h0.new_empty(0) if grad_c is None or c0 is None else grad_c.to(c0.dtype),
        stacked("projected", projection is not None),
        rows if normed else rows[:0, 0],
    )


def _previous(
    states: Tensor, before: int, t: int, initial: Tensor, lengths: Tensor | None, reverse: bool
) -> Tensor:
    """The state that a step at time t started from, of all rows."""
    if not 0 <= before < states.shape[0]:
        return initial
    if lengths is None or not reverse:
        return states[before]
    return torch.where((before < lengths)[:, None], states[before], initial.to(states.dtype))


def hidden_before(
    output: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool, keep: Tensor | None
) -> Tensor:
    """Every h that went into the recurrent product, ``[T, B, P]``."""
    h0 = h0.to(output.dtype)
    if reverse:
        rest = output[1:]
        if lengths is not None:
            time = torch.arange(1, output.shape[0], device=output.device)[:, None, None]
            rest = torch.where(time < lengths[:, None], rest, h0)
        h = torch.cat([rest, h0[None]])
    else:
        h = torch.cat([h0[None], output[:-1]])
    return h if keep is None else h * keep.to(h.dtype)
