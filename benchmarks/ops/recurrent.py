"""LSTM, GRU and RNN over whole sequences: bound by products of a few rows, step after step."""

from __future__ import annotations

from typing import Any

from fastseq.reference.recurrent import GATES
from fastseq.testing import OPERATORS, Problem

from ..registry import Benchmark, Cost, Sizes, nbytes
from . import recurrent_onnx


def _sweeps(kind: str) -> dict[str, tuple[Sizes, ...]]:
    """Steps x batch x hidden units, as many features as units."""

    def sizes(*shapes: tuple[int, int, int], **more: Any) -> tuple[Sizes, ...]:
        return tuple({"kind": kind, "sizes": (t, b, h, h), **more} for t, b, h in shapes)

    ragged = {"lengths": (128, 100, 77, 50, 31, 17, 5, 1)}
    cpu = sizes((128, 1, 64), (128, 1, 256), (128, 8, 128), (128, 32, 64), (128, 32, 128))
    cpu += sizes((128, 32, 256), (64, 32, 512))
    cpu += sizes((128, 8, 128), (128, 32, 64), (128, 32, 128), **ragged)
    if kind == "lstm":
        cpu += sizes((128, 32, 128), projection=64)
    if kind in ("lstm", "gru"):
        cpu += sizes((128, 1, 64), (128, 32, 128), norm=True)
    return {
        "smoke": sizes((16, 2, 32)),
        "cpu": cpu,
        "gpu": sizes((512, 1, 128), (512, 16, 256), (512, 64, 512), (512, 64, 1024)),
        "all": sizes((1000, 1, 33), (17, 100, 129)),
    }


def _label(sizes: Sizes) -> str:
    steps, batch, _, hidden = sizes["sizes"]
    words = [f"{sizes['kind']} {steps}x{batch}x{hidden}"]
    words += ["lengths"] if "lengths" in sizes else []
    words += ["projected"] if "projection" in sizes else []
    words += ["layer norm"] if "norm" in sizes else []
    return " ".join(words)


def _cost(problem: Problem, mode: str) -> Cost:
    """Two products a layer forward, of input and state, and twice that backward; each tensor once.

    The gates of all units, which the backward starts from, are written and read.
    """
    arguments = problem.arguments
    input, weight = arguments["input"], arguments["weight_ih_0"]
    assert input is not None
    assert weight is not None
    hidden = weight.shape[0] // GATES[problem.options["kind"]]
    rows = input.shape[0] * input.shape[1]
    flops = 2 * rows * weight.shape[0] * (weight.shape[1] + hidden)
    given = nbytes(*(t for t in arguments.values() if t is not None))
    output = nbytes(problem.grad_outputs["output"])
    gates = rows * weight.shape[0] * weight.element_size()
    if mode == "fwd":
        return Cost(given + output + 2 * gates, flops, True)
    return Cost(2 * given + output + 2 * gates, 2 * flops, True)


BENCHMARKS = tuple(
    Benchmark(OPERATORS[name], _sweeps(kind), _label, _cost, recurrent_onnx.rivals)
    for name, kind in (("lstm", "lstm"), ("gru", "gru"), ("rnn", "tanh"))
)
