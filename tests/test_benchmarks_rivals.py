"""Packages that need a GPU to run: what stands in for them here has their functions' signatures and
layouts, so that their adapters, and the gate, are tried with both."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import benchmarks_of, recurrent_flashrnn
from benchmarks.registry import Benchmark
from fastseq.backends import BackendError
from fastseq.testing import BOUND, OPERATORS, make_problem, measure_torch, run


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **functions) -> None:
    module = ModuleType(name)
    for function, value in functions.items():
        setattr(module, function, value)
    monkeypatch.setitem(sys.modules, name, module)


def _worst(operator: str, provider, sizes: dict) -> float:
    problem = make_problem(OPERATORS[operator], sizes, torch.float32, "cpu")
    ratios = measure_torch(OPERATORS[operator], problem).ratios(run(provider.function, problem))
    return max(max(pair) for pair in ratios.values())


# FlashRNN 1.0: flashrnn(Wx, R, b, states=...) -> states [S, B, T, N, D], last [S, B, 1, N, D].


def _flashrnn(
    Wx: Tensor,
    R: Tensor,  # [G, N, D, P]: from P to D
    b: Tensor,  # [G, N, D]
    states: Tensor,  # [S, B, 1, N, D]
    function: str,
    backend: str,
    dtype: str,
) -> tuple[Tensor, Tensor]:
    assert backend == "cuda_fused"
    assert dtype == "float32"
    assert Wx.dim() == states.dim() == 5
    state = list(states[:, :, 0])
    every = []
    for x in Wx.unbind(1):
        product = torch.einsum("bnp,gndp->bgnd", state[0], R)
        if function == "gru":
            g = product[:, 0] + b[0]
            r, z = (torch.sigmoid(x[:, i] + product[:, i + 1] + b[i + 1]) for i in (0, 1))
            new = torch.tanh(x[:, 2] + b[3] + r * g)
            state = [z * state[0] + (1 - z) * new]
        elif function == "lstm":
            i, f, z, o = (x + product + b).unbind(1)
            cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(z)
            state = [torch.sigmoid(o) * torch.tanh(cell), cell]
        else:
            assert function == "elman"
            state = [torch.tanh(x + product + b)[:, 0]]
        every.append(torch.stack(state))
    result = torch.stack(every, 2)
    return result, result[:, :, -1:]


@pytest.mark.parametrize("more", [{}, {"bias": False}, {"initial": False}], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
def test_flashrnn(monkeypatch: pytest.MonkeyPatch, kind: str, more: dict) -> None:
    assert recurrent_flashrnn.rivals() == ()
    _module(monkeypatch, "flashrnn", flashrnn=_flashrnn)
    (provider,) = recurrent_flashrnn.rivals()
    name = kind.replace("tanh", "rnn")
    sizes = {"kind": kind, "sizes": (7, 3, 5, 8)}
    assert _worst(name, provider, {**sizes, **more}) <= BOUND
    for beyond in ({"layers": 2}, {"bidirectional": True}, {"lengths": (7, 4)}):
        problem = make_problem(OPERATORS[name], {**sizes, **beyond}, torch.float32, "cpu")
        with pytest.raises(BackendError, match="flashrnn: cannot serve"):
            run(provider.function, problem)


# quack-kernels 0.6.


def _rmsnorm(x, weight=None, bias=None, residual=None, eps=1e-6, prenorm=False):
    assert bias is None
    summed = x if residual is None else x + residual
    output = F.rms_norm(summed, x.shape[-1:], weight, eps)
    return (output, summed) if prenorm else output


def _cross_entropy(x, target, lse_partial=None, weight=None, reduction="mean"):
    assert lse_partial is None
    return F.cross_entropy(x, target, weight, reduction=reduction)


def _chunked_linear_cross_entropy(x, weight, target, chunk_size=4096, reduction="mean"):
    return F.cross_entropy(x @ weight.T, target, reduction=reduction)


ROWS = {"leading": (6,), "ignored": 0.0}
QUACK = {
    "rms_norm": {"leading": (6,), "normalized": (32,)},
    "add_rms_norm": {"leading": (6,), "normalized": (32,)},
    "softmax": {"shape": (6, 32)},
    "cross_entropy": {**ROWS, "classes": 40, "weighted": True},
    "linear_cross_entropy": {**ROWS, "features": 16, "classes": 40},
}


def _benchmark(name: str) -> Benchmark:
    return next(b for b in benchmarks_of() if b.operator.name == name)


@pytest.mark.parametrize("name", QUACK)
def test_quack(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    functions = {"rmsnorm": _rmsnorm, "cross_entropy": _cross_entropy}
    _module(monkeypatch, "quack", **functions, softmax=lambda x: F.softmax(x, -1))
    chunked = {"chunked_linear_cross_entropy": _chunked_linear_cross_entropy}
    _module(monkeypatch, "quack.linear_cross_entropy", **chunked)
    (provider,) = (p for p in _benchmark(name).rivals() if p.name == "quack")
    assert _worst(name, provider, QUACK[name]) <= BOUND


def test_without_the_packages_nobody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("quack", "quack.linear_cross_entropy", "flashrnn"):
        monkeypatch.setitem(sys.modules, name, None)
    names = {p.name for benchmark in benchmarks_of() for p in benchmark.rivals()}
    assert not names & {"quack", "flashrnn"}
