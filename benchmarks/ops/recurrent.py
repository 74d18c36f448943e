"""LSTM, GRU and RNN over whole sequences: bound by products of a few rows, step after step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fastseq.reference.recurrent import GATES
from fastseq.testing import OPERATORS, Problem

from ..registry import Asked, Benchmark, Cost, Provider, Sizes, asked, nbytes
from . import recurrent_flashrnn, recurrent_onnx

#: Of the rows, repeated as often as it takes.
RAGGED = (128, 100, 77, 50, 31, 17, 5, 1)
_WIDTHS = (128, 256, 512, 768, 1024, 2048)


def _sweeps(kind: str) -> dict[str, tuple[Sizes, ...]]:
    """Steps x batch x hidden units, as many features as units."""

    def sizes(*shapes: tuple[int, int, int], **more: Any) -> tuple[Sizes, ...]:
        return tuple({"kind": kind, "sizes": (t, b, h, h), **more} for t, b, h in shapes)

    ragged = {"lengths": RAGGED}
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
        "baselines": (
            *sizes(*((512, b, h) for h in _WIDTHS for b in (1, 16, 64, 256))),
            *sizes((512, 64, 256), (512, 64, 512), layers=2),
            *sizes((512, 64, 256), (512, 64, 512), bidirectional=True),
            *sizes((512, 64, 256), (512, 64, 512), lengths=(512, 400, 300, 200, 128)),
        ),
        "all": sizes((1000, 1, 33), (17, 100, 129)),
    }


_TRAINING, _BOTH = ("fwd+bwd",), ("inference", "fwd+bwd")


def _asked(kind: str) -> tuple[Asked, ...]:
    def at(*shape: int, **more: Any) -> list[Sizes]:
        t, b, h = shape
        return [{"kind": kind, "sizes": (t, b, h, h), **more}]

    small, middle, wide = (128, 1, 64), (128, 8, 128), (128, 32, 64)
    inference = (
        *asked(at(*small), "inference", fp32=5.0),
        *asked(at(*middle) + at(*wide), "inference", fp32=1.4),
    )
    if kind == "gru":
        return (
            *inference,
            *asked(at(*small), *_TRAINING, fp32=10.0),
            *asked(at(*middle) + at(*wide), *_TRAINING, fp32=2.0),
            *asked(at(64, 32, 512), *_TRAINING, fp32=1.0),
        )
    if kind == "tanh":
        return (
            *inference,
            *asked(at(*small), *_TRAINING, fp32=8.0),
            *asked(at(*wide), *_TRAINING, fp32=1.8),
        )
    large = (128, 32, 128)
    ragged = {"lengths": RAGGED}
    others = [at(*shape)[0] for shape in (middle, wide, large, (128, 32, 256), (64, 32, 512))]
    return (
        *asked(at(*small), *_BOTH, fp32=1.5),
        *asked(at(128, 1, 256), *_BOTH, fp32=1.2),
        *asked(others, *_BOTH, fp32=1.0),
        *asked(at(*middle, **ragged) + at(*wide, **ragged), *_TRAINING, fp32=2.5),
        *asked(at(*large, **ragged), *_TRAINING, fp32=2.0),
        *(
            Asked(at(*s, **ragged)[0], "fwd+bwd", "fp32", beside=at(*s)[0], times=1.1)
            for s in (middle, wide, large)
        ),
        *asked(at(*large), *_TRAINING, fp64=1.3),
        *asked(at(*large, projection=64), *_TRAINING, fp32=1.3),
        *asked(at(*small, norm=True), *_TRAINING, fp32=5.0),
        *asked(at(*large, norm=True), *_TRAINING, fp32=2.5),
        *(
            Asked(at(*s, norm=True)[0], "fwd+bwd", "fp32", beside=at(*s)[0], times=1.6)
            for s in (small, large)
        ),
    )


def _label(sizes: Sizes) -> str:
    steps, batch, _, hidden = sizes["sizes"]
    words = [f"{sizes['kind']} {steps}x{batch}x{hidden}"]
    words += [f"{sizes['layers']} layers"] if "layers" in sizes else []
    words += ["both ways"] if "bidirectional" in sizes else []
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


def _rivals(name: str) -> tuple[Provider, ...]:
    """ONNX Runtime; on a GPU torch's loop of cells beside cuDNN's kernels, the baseline there, and
    FlashRNN."""
    if not torch.cuda.is_available():
        return recurrent_onnx.rivals()

    def run(**arguments: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return OPERATORS[name].torch(**arguments)

    flashrnn = recurrent_flashrnn.rivals()
    return (*recurrent_onnx.rivals(), Provider("torch native", run), *flashrnn)


BENCHMARKS = tuple(
    Benchmark(
        OPERATORS[name], _sweeps(kind), _label, _cost, partial(_rivals, name), asked=_asked(kind)
    )
    for name, kind in (("lstm", "lstm"), ("gru", "gru"), ("rnn", "tanh"))
)
