"""Persistent recurrent kernels as the tests call them on the emulated device, and what each step
must come to, in fp64.

Every step is judged by itself, from the states that the kernel itself wrote before it: nothing
but that step's arithmetic is between the two, and the bound is that of a sum in fp32. With unit
roundoff u = 2^-24 a sum of K products is off by at most K u times the sum of their sizes; gates,
with derivatives of at most 1, pass it on; what is left of a cell are some ten roundings more.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from fastseq.reference import recurrent as reference
from simt.host import Host
from simt.layer_norm import DTYPES, U, half_ulp, rounded, to_bytes, to_floats

CELLS = {"lstm": 0, "gru": 1, "tanh": 2, "relu": 3}
ARITHMETIC = {"f16": 0, "bf16": 1, "tf32": 2, "f32": 3}
EXCHANGES = {"": -1, "block": 0, "cluster": 1, "grid": 2}
FIGURES = (
    "blocks", "groups", "waves", "rows", "units", "tiles", "splits", "chunks", "split_chunks",
    "threads", "shared_bytes", "weight_bytes", "exchange", "strands", "partners", "at_once",
)  # fmt: skip
H200 = (132, 232448, 16)
A100 = (108, 166912, 1)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer in one direction. ``exchange``, ``blocks``, ``splits``, ``strands``,
    ``partners``: 0 leaves them to the plan."""

    kind: str = "lstm"
    arithmetic: str = "bf16"
    steps: int = 3
    batch: int = 3
    hidden: int = 40
    blocks: int = 0
    splits: int = 0
    strands: int = 0
    partners: int = 0
    exchange: str = ""
    reverse: bool = False
    lengths: tuple[int, ...] | None = None
    keep: bool = False
    bptt: int = 0
    grad_clip: float = 0.0
    transposed: bool = False  # gates_x and grad_output lie as [B, T, n]
    shifted: bool = False  # ... and begin at an odd element
    draw: int = 0  # which of several layers of one shape
    chip: tuple[int, int, int] = H200

    @property
    def dtype(self) -> str:
        return "f32" if self.arithmetic == "tf32" else self.arithmetic

    @property
    def gates(self) -> int:
        return reference.GATES[self.kind]

    @property
    def saved(self) -> int:
        return reference.SAVED[self.kind]

    def task(self, directions: int = 1) -> list[int]:
        numbers = [CELLS[self.kind], ARITHMETIC[self.arithmetic], self.batch, self.hidden]
        numbers += [directions, *self.chip]
        numbers += [EXCHANGES[self.exchange], self.blocks, self.splits, self.strands]
        return [*numbers, self.partners]

    def __str__(self) -> str:
        default = Layer()
        fields = dataclasses.asdict(self)
        changed = {k: v for k, v in fields.items() if v != getattr(default, k)}
        return " ".join(f"{k}={v}" for k, v in changed.items()) or "plain"


def plan(host: Host, layer: Layer, backward: bool, directions: int = 1) -> dict[str, int]:
    """The plan's figures; ValueError with its reason where there is none."""
    figures = np.zeros(len(FIGURES), np.int64)
    error = host.call("plan", [figures], [int(backward), *layer.task(directions), 0, 0])
    if error is not None:
        raise ValueError(error)
    return dict(zip(FIGURES, figures.tolist(), strict=True))


class Call:
    """Buffers and numbers in the order the server reads them: of each direction in turn."""

    def __init__(self, layer: Layer, directions: int = 1) -> None:
        self.layer = layer
        self.buffers: list[np.ndarray] = []
        self.integers = layer.task(directions)
        self.reals: list[float] = []
        self.outputs: list[dict[str, tuple[np.ndarray, tuple[int, ...], str]]] = []

    def direction(self, layer: Layer, given: dict[str, np.ndarray]) -> None:
        """What every pass reads of the next direction."""
        self.layer = layer
        self.outputs.append({})
        self.integers += [layer.steps, int(layer.reverse)]
        self.given(given["h0"])
        self.given(given["c0"] if layer.kind == "lstm" else None)
        self.given(given["weight_hh"])
        self.given(None if layer.lengths is None else np.array(layer.lengths, np.int64))
        self.given(given["keep"] if layer.keep else None)

    def given(self, values: np.ndarray | None, dtype: str | None = None) -> None:
        if values is None:
            self.integers += [-1, 0]
            return
        self.integers += [len(self.buffers), 0]
        integral = values.dtype.kind == "i"
        self.buffers.append(values if integral else to_bytes(values, dtype or self.layer.dtype))

    def steps(self, values: np.ndarray | None, dtype: str | None = None) -> None:
        """``[T, B, n]`` as the layer's layout has it, poison between."""
        if values is None:
            self.integers += [-1, 0, 0, 0]
            return
        dtype = dtype or self.layer.dtype
        size = DTYPES[dtype].itemsize
        steps, batch, n = values.shape
        strides = (n, n * steps) if self.layer.transposed else (n * batch, n)
        ordered = values.swapaxes(0, 1) if self.layer.transposed else values
        data = to_bytes(ordered, dtype).reshape(-1)
        shift = size if self.layer.shifted else 0
        self.integers += [len(self.buffers), shift, *strides]
        self.buffers.append(np.concatenate([np.full(shift, 0xFF, np.uint8), data]))

    def output(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> None:
        dtype = dtype or self.layer.dtype
        data = np.full(int(np.prod(shape)) * DTYPES[dtype].itemsize, 0xFF, np.uint8)
        self.outputs[-1][name] = (data, shape, dtype)
        self.integers += [len(self.buffers), 0]
        self.buffers.append(data)

    def run(self, host: Host, function: str, seed: int) -> list[dict[str, np.ndarray]]:
        written = {id(data) for made in self.outputs for data, _, _ in made.values()}
        before = [buffer.copy() for buffer in self.buffers]
        error = host.call(function, self.buffers, self.integers, self.reals, seed)
        if error is not None:
            raise ValueError(error)
        for old, new in zip(before, self.buffers, strict=True):
            assert id(new) in written or np.array_equal(old, new), "an input was modified"
        return [
            {
                name: to_floats(data, dtype).reshape(shape)
                for name, (data, shape, dtype) in made.items()
            }
            for made in self.outputs
        ]


def parameters(layer: Layer) -> dict[str, np.ndarray]:
    """What a layer is given, as its dtype holds it."""
    seed = layer.hidden * 1000 + layer.steps * 10 + layer.batch + layer.draw * 1000000
    generator = np.random.default_rng(seed)
    steps, batch, hidden, width = layer.steps, layer.batch, layer.hidden, layer.gates * layer.hidden

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rounded(generator.standard_normal(shape) * scale, layer.dtype)

    given = {
        "gates_x": draw(steps, batch, width),
        "h0": draw(batch, hidden),
        "c0": draw(batch, hidden),
        "weight_hh": draw(width, hidden, scale=1 / np.sqrt(hidden)),
        "bias_hh": draw(width, scale=0.3),
        "keep": rounded((generator.random((batch, hidden)) < 0.7) / 0.7, layer.dtype),
        "grad_output": draw(steps, batch, hidden),
        "grad_h_n": draw(batch, hidden),
        "grad_c_n": draw(batch, hidden),
        "grad_cells": generator.standard_normal((steps, batch, hidden)).astype(np.float32),
    }
    if not layer.keep:
        given["keep"] = np.ones((batch, hidden))
    return {name: np.asarray(value, np.float64) for name, value in given.items()}


def run_forward(
    host: Host, layer: Layer, seed: int = 0, save: bool = True, **changed: np.ndarray
) -> dict[str, np.ndarray]:
    call = Call(layer)
    _forward(call, layer, {**parameters(layer), **changed}, save)
    return call.run(host, "forward", seed)[0]


def run_both_forward(
    host: Host, layers: tuple[Layer, Layer], seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """Two directions in one launch."""
    call = Call(layers[0], directions=2)
    for layer in layers:
        _forward(call, layer, parameters(layer), save=True)
    return call.run(host, "forward", seed)


def _forward(call: Call, layer: Layer, given: dict[str, np.ndarray], save: bool) -> None:
    steps, batch, hidden, lstm = layer.steps, layer.batch, layer.hidden, layer.kind == "lstm"
    call.direction(layer, given)
    call.given(given["bias_hh"] if layer.kind == "gru" else None)
    call.steps(given["gates_x"])
    call.output("output", (steps, batch, hidden))
    call.output("h_n", (batch, hidden))
    if lstm:
        call.output("c_n", (batch, hidden))
    else:
        call.given(None)
    if save:
        call.output("gates", (steps, batch, layer.saved * hidden))
    else:
        call.given(None)
    if save and lstm:
        call.output("cells", (steps, batch, hidden), "f32")
    else:
        call.given(None)


def run_backward(
    host: Host,
    layer: Layer,
    made: dict[str, np.ndarray],
    seed: int = 0,
    absent: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    call = Call(layer)
    _backward(call, layer, {**parameters(layer), **made}, absent)
    return call.run(host, "backward", seed)[0]


def run_both_backward(
    host: Host, layers: tuple[Layer, Layer], made: list[dict[str, np.ndarray]], seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """Two directions in one launch."""
    call = Call(layers[0], directions=2)
    for layer, of_layer in zip(layers, made, strict=True):
        _backward(call, layer, {**parameters(layer), **of_layer}, ())
    return call.run(host, "backward", seed)


def _backward(
    call: Call, layer: Layer, given: dict[str, np.ndarray], absent: tuple[str, ...]
) -> None:
    steps, batch, hidden, lstm = layer.steps, layer.batch, layer.hidden, layer.kind == "lstm"
    call.direction(layer, given)

    def wanted(name: str) -> np.ndarray | None:
        exists = name not in absent and (lstm or name not in ("grad_c_n", "grad_cells"))
        return given[name] if exists else None

    call.steps(wanted("grad_output"))
    call.steps(wanted("grad_cells"), "f32")
    call.given(wanted("grad_h_n"))
    call.given(wanted("grad_c_n"))
    call.given(given["output"])
    call.given(given["gates"])
    call.given(given["cells"] if lstm else None, "f32")
    call.integers.append(layer.bptt)
    call.reals.append(layer.grad_clip)
    call.output("gates_x", (steps, batch, layer.gates * hidden))
    if layer.kind == "gru":
        call.output("gates_h", (steps, batch, 3 * hidden))
    else:
        call.given(None)
    call.output("h0", (batch, hidden))
    if lstm:
        call.output("c0", (batch, hidden))
    else:
        call.given(None)


# --- what it must come to ------------------------------------------------------------------------


def operand(values: np.ndarray, arithmetic: str) -> np.ndarray:
    """As a product takes it: rounded to tf32's 11 bits, halves away from zero."""
    if arithmetic != "tf32":
        return values
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def check(
    name: str, actual: np.ndarray, expected: np.ndarray, error: np.ndarray, dtype: str
) -> None:
    assert not np.isnan(actual).any(), f"{name}: NaN"
    bound = error + half_ulp(dtype, np.abs(expected) + error)
    excess = np.abs(actual - expected) / bound
    assert excess.size == 0 or excess.max() <= 1, f"{name}: {excess.max()} of the bound"


def active(layer: Layer, t: int) -> np.ndarray:
    lengths = [layer.steps] * layer.batch if layer.lengths is None else layer.lengths
    return (t < np.array(lengths, np.int64))[:, None]


def times(layer: Layer) -> list[int]:
    return list(range(layer.steps))[:: -1 if layer.reverse else 1]


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def check_forward(
    host: Host, layer: Layer, seed: int = 0, **changed: np.ndarray
) -> dict[str, np.ndarray]:
    """Runs the layer and judges every step; returns what it made."""
    given = {**parameters(layer), **changed}
    made = run_forward(host, layer, seed, **changed)
    lstm, dtype = layer.kind == "lstm", layer.dtype
    weight = operand(given["weight_hh"], layer.arithmetic)
    h, c = given["h0"], given["c0"]
    for t in times(layer):
        taken = rounded(h * given["keep"], dtype) if layer.keep else h
        taken = operand(taken, layer.arithmetic)
        hidden = taken @ weight.T
        if layer.kind == "gru":
            hidden = hidden + given["bias_hh"]
        x = given["gates_x"][t]
        sizes = np.abs(taken) @ np.abs(weight).T + np.abs(x) + np.abs(given["bias_hh"])
        off = (layer.hidden + 16) * U * sizes.reshape(*h.shape[:1], layer.gates, -1).sum(1)
        off = 2 * (off + 16 * U * (1 + np.abs(c)))
        if layer.kind == "gru":  # the hidden part of n is saved as it is, r multiplies it
            off = off * (1 + np.abs(hidden[:, -layer.hidden :]))
        h_new, c_new, saved = (
            r.numpy() for r in reference.cell(*tensors(x, hidden, h, c), layer.kind)
        )
        live = active(layer, t)
        expected = np.where(live, h_new, 0)
        check(f"output[{t}]", made["output"][t], expected, off * live, dtype)
        gates_off = np.tile(off, layer.saved) * live
        check(f"gates[{t}]", made["gates"][t], np.where(live, saved, 0), gates_off, dtype)
        if lstm:
            check(f"cells[{t}]", made["cells"][t], np.where(live, c_new, 0), off * live, "f32")
            c = np.where(live, made["cells"][t], c)
        h = np.where(live, made["output"][t], h)
    np.testing.assert_array_equal(made["h_n"], h)
    if lstm:
        np.testing.assert_array_equal(made["c_n"], rounded(c, dtype))
    return made


def check_backward(
    host: Host,
    layer: Layer,
    made: dict[str, np.ndarray],
    seed: int = 0,
    absent: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """Runs the backward of what a forward made and judges every step; returns what it made."""
    given = parameters(layer)
    found = run_backward(host, layer, made, seed, absent)
    for name in absent:
        given[name] = np.zeros_like(given[name])
    lstm, dtype, kind = layer.kind == "lstm", layer.dtype, layer.kind
    weight = operand(given["weight_hh"], layer.arithmetic)
    grad_h, grad_c = given["grad_h_n"], given["grad_c_n"] if lstm else None
    off_h, off_c = 0 * grad_h, 0 * grad_h
    order = times(layer)
    bound = layer.grad_clip or np.inf
    for n in reversed(range(layer.steps)):
        t, live = order[n], active(layer, order[n])
        before = order[n - 1] if n else -1
        began = live & (active(layer, before) if n else False)
        h = np.where(began, made["output"][before], given["h0"])
        c = np.where(began, made["cells"][before], given["c0"]) if lstm else given["c0"]
        total = grad_h + given["grad_output"][t]
        total_c = None if grad_c is None else grad_c + given["grad_cells"][t]
        c_new = made["cells"][t] if lstm else c
        arrays = (made["gates"][t], h, c, c_new)
        saved, before_h, before_c, after_c = tensors(*arrays)
        gates_x, gates_h, more, back_c = (
            None if r is None else r.numpy()
            for r in reference.cell_backward(
                torch.from_numpy(total),
                None if total_c is None else torch.from_numpy(total_c),
                saved, before_h, before_c if lstm else None, after_c if lstm else None, kind,
            )
        )  # fmt: skip
        # What the gradients so far are off by, through factors of at most 1, c and h; and what this
        # step's products add.
        size = (
            1
            + np.abs(c)
            + np.abs(h)
            + np.abs(made["gates"][t]).reshape(*h.shape[:1], layer.saved, -1).max(1)
        )
        off_c = (off_c + off_h) * size + 24 * U * size * (
            np.abs(total) + (0 if total_c is None else np.abs(total_c))
        )
        off = np.tile(off_c + (off_h + 24 * U * np.abs(total)) * size, layer.gates) * live
        check(f"gates_x[{t}]", found["gates_x"][t], np.where(live, gates_x, 0), off, dtype)
        into = found["gates_x"][t]
        if kind == "gru":
            into = found["gates_h"][t]
            check(f"gates_h[{t}]", into, np.where(live, gates_h, 0), off * np.tile(size, 3), dtype)
        into = operand(into, layer.arithmetic)
        back = (into @ weight) * given["keep"] + (more if kind == "gru" else 0)
        sizes = np.abs(into) @ np.abs(weight) * given["keep"] + np.abs(total)
        off_back = (layer.gates * layer.hidden + 8) * U * sizes
        if kind == "gru":
            off_back = off_back + off_h
        cut = layer.bptt and n and n % layer.bptt == 0
        back = 0 * back if cut else np.clip(back, -bound, bound)
        grad_h, off_h = np.where(live, back, grad_h), np.where(live, off_back, off_h)
        if grad_c is not None and back_c is not None:
            back_c = 0 * back_c if cut else np.clip(back_c, -bound, bound)
            grad_c = np.where(live, back_c, grad_c)
    check("h0", found["h0"], grad_h, off_h, dtype)
    if lstm:
        assert grad_c is not None
        check("c0", found["c0"], grad_c, off_c, dtype)
    return found
