"""Both directions of a layer in one op, which a GPU runs side by side: the same as each alone.

What the persistent kernels compute then is in test_simt_recurrent.py.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import _extension, functional
from fastseq.backends import recorded
from fastseq.functional._dispatch import is_transformed
from fastseq.ops import recurrent_bidirectional as op
from fastseq.ops.recurrent import persistent_plan
from fastseq.ops.recurrent_layer import Layer
from fastseq.reference.recurrent import GATES, Options

KINDS = ("lstm", "gru", "tanh")
STEPS, BATCH, INPUT, HIDDEN = 5, 3, 8, 6
OPS = {"_recurrent_bidirectional_fwd", "_recurrent_bidirectional_bwd"}
BACKENDS = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(_extension.UNAVAILABLE is not None, reason="no extension")
    ),
    "reference",
]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    module = sys.modules["fastseq.functional.recurrent"]
    monkeypatch.setattr(module, "_runs_at_once", lambda layer, options: not is_transformed())


def leaves(kind: str, layers: int = 2, **like: Any) -> list[Tensor]:
    """Input, params of so many bidirectional layers, states."""
    torch.manual_seed(3)
    width = GATES[kind] * HIDDEN
    made = [torch.randn(STEPS, BATCH, INPUT)]
    for layer in range(layers):
        for _ in range(2):
            size = INPUT if layer == 0 else 2 * HIDDEN
            made += [torch.randn(width, size) / 3, torch.randn(width, HIDDEN) / 3]
            made += [torch.randn(width), torch.randn(width)]
    states = 2 if kind == "lstm" else 1
    made += [torch.randn(2 * layers, BATCH, HIDDEN) for _ in range(states)]
    return [(tensor.to(**like) if like else tensor).requires_grad_() for tensor in made]


def run(kind: str, given: list[Tensor], **options: Any) -> list[Tensor]:
    split = -2 if kind == "lstm" else -1
    x, *params = given[:split]
    hx: Any = tuple(given[split:]) if kind == "lstm" else given[split]
    if kind not in ("lstm", "gru"):
        options["nonlinearity"] = kind
    function = getattr(functional, kind if kind in ("lstm", "gru") else "rnn")
    made = function(x, hx, params, True, len(params) // 8, 0.0, True, True, **options)
    return list(made)


def results_and_gradients(kind: str, **options: Any) -> list[Tensor]:
    given = leaves(kind)
    made = run(kind, given, **options)
    loss = sum((result * torch.randn_like(result)).sum() for result in made)
    assert isinstance(loss, Tensor)
    return [*made, *torch.autograd.grad(loss, given)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.1, "recurrent_dropout": 0.5}], ids=str)
def test_both_at_once_is_each_alone(
    request: pytest.FixtureRequest, kind: str, backend: str, options: dict[str, Any]
) -> None:
    options = {**options, "lengths": torch.tensor([5, 0, 3])}
    with fastseq.use_backend(backend):
        alone = results_and_gradients(kind, **options)
        request.getfixturevalue("at_once")
        with recorded() as decisions:
            both = results_and_gradients(kind, **options)
    assert {decision.op for decision in decisions} == OPS
    for mine, other in zip(both, alone, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", ["gru"])
def test_by_triton(at_once: None, kind: str) -> None:
    with torch.no_grad(), fastseq.use_backend("triton"):
        both = run(kind, leaves(kind, layers=1))
    with torch.no_grad(), fastseq.use_backend("reference"):
        for mine, other in zip(both, run(kind, leaves(kind, layers=1)), strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients(at_once: None, kind: str) -> None:
    given = leaves(kind, layers=1, dtype=torch.float64)
    lengths = torch.tensor([5, 1, 3])

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(kind, list(tensors), lengths=lengths))

    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_one_direction_gets_no_gradient(at_once: None, kind: str) -> None:
    given = leaves(kind, layers=1)
    output, *_ = run(kind, given, grad_clip=100.0)
    forward_alone = output[..., :HIDDEN].square().sum()
    grads = torch.autograd.grad(forward_alone, given, allow_unused=True)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads[:5])
    assert all(grad is None or not grad.any() for grad in grads[5:9])


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    lstm = kind == "lstm"
    width = GATES[kind] * HIDDEN
    gates = [torch.randn(STEPS, BATCH, width) for _ in range(2)]
    states = [torch.randn(BATCH, HIDDEN) for _ in range(4)]
    weights = [torch.randn(width, HIDDEN) for _ in range(2)]
    bias = [torch.randn(width) for _ in range(2)] if kind == "gru" else [None, None]
    cells = states[2:] if lstm else [None, None]
    lengths = torch.tensor([5, 2, 1])
    forward = (*gates, *states[:2], *cells, *weights, *bias, None, None, lengths, kind, True)
    utils = ("test_schema", "test_faketensor", *(("test_aot_dispatch_dynamic",) * (kind == "gru")))
    ops = torch.ops.fastseq
    torch.library.opcheck(ops._recurrent_bidirectional_fwd.default, forward, test_utils=utils)
    output, _, _, kept, saved, *second = op.forward_op(*forward)
    grads = (torch.randn_like(output), None, None, states[0])
    of_cells = (states[1], None, None, torch.randn_like(kept)) if lstm else (None,) * 4
    backward = (
        *(saved, second[4], *grads, *of_cells, output, second[0], kept, second[3], *states[:2]),
        *(*cells, *weights, None, None, lengths, kind, 0.0),
    )
    torch.library.opcheck(ops._recurrent_bidirectional_bwd.default, backward, test_utils=utils)


def test_compiled_whole(at_once: None) -> None:
    given = leaves("tanh", layers=1)
    compiled = torch.compile(lambda *a: run("tanh", list(a)), fullgraph=True, backend="aot_eager")
    for mine, other in zip(compiled(*given), run("tanh", given, grad_clip=100.0), strict=True):
        torch.testing.assert_close(mine, other)


def test_it_is_the_gpu_s() -> None:
    """What the persistent kernels do not take goes one by one, and so does all on the CPU."""
    module = sys.modules["fastseq.functional.recurrent"]
    options = Options("gru", False, 0.0, 0.0, 1e-5)
    for is_cuda in (True, False):
        x: Any = types.SimpleNamespace(is_cuda=is_cuda)
        layer = Layer(x, *[torch.ones(1)] * 6, *[None] * (len(Layer._fields) - 7))  # type: ignore[arg-type]
        assert module._runs_at_once(layer, options) == is_cuda
        for name in ("weight_hr", "norm_hh", "norm_c", "bias_c"):
            assert not module._runs_at_once(layer._replace(**{name: torch.ones(1)}), options)
        assert not module._runs_at_once(layer, options._replace(zoneout_h=0.1))


# The plan.


@pytest.mark.skipif(_extension.UNAVAILABLE is not None, reason="needs the extension")
def test_two_directions_take_the_time_of_one() -> None:
    """By the plan's arithmetic, for an H200: they run side by side up to half the GPU."""
    chip = (132, 232448, 16)
    for hidden, batch, backward in ((128, 64, False), (512, 16, False), (512, 16, True),
                                    (1024, 16, False), (1024, 8, True)):  # fmt: skip
        one, two = (
            persistent_plan("lstm", torch.bfloat16, batch, hidden, backward, 0, chip, False, count)
            for count in (1, 2)
        )
        assert one["step_cycles"] == two["step_cycles"]
        assert one["waves"] == two["waves"] == "1", (hidden, two)
    # A grid of most of the GPU: one after the other.
    large = persistent_plan("lstm", torch.bfloat16, 8, 1792, False, 0, chip, False, 2)
    assert (large["exchange"], large["waves"]) == ("grid", "2")


# Tensors as a user may have them.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_and_biases_with_strides(kind: str, backend: str) -> None:
    given = [tensor.detach() for tensor in leaves(kind, layers=1)]
    lengths = torch.tensor([5, 9, 0, 9, 3, 9])[::2]
    strided = [torch.stack([t, t * 7], -1)[..., 0] if t.dim() == 1 else t for t in given]
    with fastseq.use_backend(backend):
        plain = run(kind, given, lengths=lengths.contiguous())
        for mine, other in zip(run(kind, strided, lengths=lengths), plain, strict=True):
            assert torch.equal(mine, other)
