"""What runs a recurrent call: compilers, torch, persistent kernels; and what nobody can take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import _extension, functional, nn
from fastseq.backends import recorded
from fastseq.ops import recurrent as recurrent_op
from fastseq.ops.recurrent import persistent_plan

from .recurrent_checks import flat

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN", "ignore:overflow encountered"
)


# --- compilers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_compiles_whole(name: str) -> None:
    """As one op a layer and direction. torch refuses subclasses of its RNNs unless asked."""
    torch._dynamo.reset()
    module = getattr(nn, name)(4, 8, num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, 4)
    with torch._dynamo.config.patch(allow_rnn=True), fastseq.use_backend("cpu"):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for a, b in zip(flat(compiled(x)), flat(module(x)), strict=True):
            torch.testing.assert_close(a, b)
        wanted = list(module.parameters())
        found = torch.autograd.grad(compiled(x)[0].sum(), wanted)
        expected = torch.autograd.grad(module(x)[0].sum(), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_functions_compile_whole_as_they_are() -> None:
    torch._dynamo.reset()
    module = nn.GRU(8, 8)
    weight, _, bias, _ = module.parameters()
    params, x = [weight, weight, bias, bias], torch.randn(5, 3, 8)  # tied

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        return functional.gru(x, None, params, lengths=lengths)[0]

    lengths = torch.tensor([5, 2, 3])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, lengths), run(x, lengths))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_exports(name: str) -> None:
    module = getattr(nn, name)(4, 8)
    x = torch.randn(5, 3, 4)
    exported = torch.export.export(module, (x,))
    assert "fastseq._recurrent_fwd" in str(exported.graph)
    for a, b in zip(flat(exported.module()(x)), flat(module(x)), strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    gates = torch.randn(3, 2, 32)
    h, weight = torch.randn(2, 8), torch.randn(32, 8)
    args = (gates, h, h, weight, *(None,) * 5, torch.tensor([3, 1]), None, None)
    options = ("lstm", True, 0.1, 0.1, 1e-5, True)
    for backend in ("cpu", "reference"):
        with fastseq.use_backend(backend):
            torch.library.opcheck(
                torch.ops.fastseq._recurrent_fwd.default,
                (*args, *options),
                test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
            )


# --- what goes to torch, and what nobody can take ------------------------------------------------


def test_subclasses_and_autocast_go_to_torch() -> None:
    module, x = nn.GRU(4, 8), torch.randn(5, 3, 4)

    class Tagged(Tensor):
        pass

    with recorded() as decisions:
        module(x.as_subclass(Tagged))
        with torch.autocast("cpu", torch.bfloat16):
            output = nn.LSTM(4, 8)(x)[0]
    assert [decision.backend for decision in decisions] == ["torch", "torch"]
    assert output.dtype == torch.bfloat16


X, H = torch.randn(5, 3, 4), torch.randn(1, 3, 8)
GRU = nn.GRU(4, 8)
P = list(GRU.parameters())
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: GRU(torch.randn(5, 3, 7)), RuntimeError, "input.*4 features"),
    (lambda: GRU(torch.randn(4)), ValueError, "input.*dimensions"),
    (lambda: GRU(X, H[:, :2]), RuntimeError, "h_0"),
    (lambda: GRU(X, H[0]), RuntimeError, "h_0"),
    (lambda: nn.LSTM(4, 8)(X, (H, H[..., :3])), RuntimeError, "c_0"),
    (lambda: GRU(torch.randn(0, 3, 4)), RuntimeError, "input.*one step"),
    (lambda: GRU(X.double()), ValueError, "dtype"),
    (lambda: GRU(X.to("meta")), RuntimeError, "device"),
    (lambda: GRU(X, None, torch.tensor([5, 5])), RuntimeError, "lengths.*shape"),
    (lambda: GRU(X, None, torch.tensor([5, 6, 1])), RuntimeError, "lengths.*between"),
    (lambda: GRU(X, None, torch.tensor([5, -1, 1])), RuntimeError, "lengths.*between"),
    (lambda: GRU(X, None, torch.tensor([5.0, 1.0, 1.0])), TypeError, "lengths"),
    (lambda: functional.gru(X, None, P[:3]), RuntimeError, "params"),
    (lambda: functional.gru(X, None, [P[1], P[0], *P[2:]]), RuntimeError, "weight|input"),
    (lambda: functional.gru(X, None, P, zoneout=1.5), ValueError, "zoneout"),
    (lambda: functional.gru(X, None, P, zoneout=(0.1, 0.1)), ValueError, "zoneout"),
    (lambda: functional.gru(X, None, P, bptt=0), ValueError, "bptt"),
    (lambda: functional.gru(X, None, P, grad_clip=-1.0), ValueError, "grad_clip"),
    (lambda: functional.gru(X, None, P, layer_norm=P[:1]), RuntimeError, "layer_norm"),
    (lambda: functional.rnn(X, None, P, nonlinearity="sine"), ValueError, "nonlinearity"),
    (lambda: functional.gru(X, None, P, zoneuot=0.1), TypeError, "zoneuot"),
    (lambda: functional.gru_cell(X[0], H[0, :2], *P), RuntimeError, r"hx\[0\]"),
    (lambda: functional.gru_cell(X[0], H[0], P[0], P[1][:, :3]), RuntimeError, "w_hh"),
    (lambda: functional.lstm_cell(X, (H, H), P[0], P[1]), RuntimeError, "input"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with fastseq.use_backend("cpu"), pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_no_hidden_units(kind: str) -> None:
    """torch's functions take them (its LSTM outside oneDNN); a norm has nothing to take."""
    params = [torch.randn(0, 4), torch.randn(0, 0), torch.randn(0), torch.randn(0)]
    with fastseq.use_backend("cpu"):
        assert getattr(functional, kind)(X, None, params)[0].shape == (5, 3, 0)
        if kind != "rnn":
            norms = [torch.ones(0)] * (4 if kind == "lstm" else 2)
            with pytest.raises(RuntimeError, match="layer_norm"):
                getattr(functional, kind)(X, None, params, layer_norm=norms)


def test_signatures_name_what_torchs_functions_lack() -> None:
    for function in (functional.lstm, functional.gru, functional.rnn):
        parameters = inspect.signature(function).parameters
        assert list(parameters)[:3] == ["input", "hx", "params"]
        assert parameters["zoneout"].default == 0.0
        assert parameters["lengths"].kind is inspect.Parameter.KEYWORD_ONLY


def test_auto_takes_torchs_where_that_is_ahead() -> None:
    """oneDNN's LSTM of several rows, and few steps; what torch does step by step is ours."""

    def taken(name: str, steps: int, batch: int, hidden: int = 64, **options: Any) -> str:
        module = getattr(nn, name)(64, hidden, **options)
        with recorded() as decisions:
            module(torch.randn(steps, batch, 64))
        return decisions[0].backend

    if torch.backends.mkldnn.is_available():
        assert taken("LSTM", 20, 8) == "torch"
    assert taken("LSTM", 20, 1) == taken("LSTM", 20, 1, 256) == "cpu"
    assert taken("LSTM", 20, 8, proj_size=32) == "cpu"
    assert taken("GRU", 20, 8) == taken("RNN", 20, 8) == "cpu"
    assert taken("GRU", 2, 8) == taken("RNN", 2, 8) == "torch"


# --- persistent CUDA kernels: the choice; test_simt_recurrent.py has what they compute -----------

H200 = (132, 232448, 16)  # multiprocessors, shared memory of a block, blocks of a cluster


@pytest.mark.skipif(_extension.UNAVAILABLE is not None, reason="needs the extension")
def test_persistent_plan() -> None:
    for hidden, exchange in ((64, "block"), (512, "cluster"), (1024, "grid")):
        found = persistent_plan("lstm", torch.bfloat16, 16, hidden, False, chip=H200)
        assert found["exchange"] == exchange
        assert int(found["units"]) * int(found["blocks"]) >= hidden
        assert int(found["shared_bytes"]) <= H200[1]
    large = persistent_plan("gru", torch.float32, 4, 4096, True, chip=H200)
    assert large == {"rejected": "the recurrent weights and the state do not fit on the chip"}
    exact, rounded = (
        persistent_plan("gru", torch.float32, 4, 128, False, chip=H200, tf32=tf32)
        for tf32 in (False, True)
    )
    assert int(exact["step_cycles"]) > int(rounded["step_cycles"])


def test_persistent_kernels_turn_down() -> None:
    x, h, weight = torch.zeros(2, 3, 20), torch.zeros(3, 5), torch.zeros(20, 5)
    plain = recurrent_op.Forward(
        x, h, h, weight, *(None,) * 8, "lstm", False, 0.0, 0.0, 1e-5, False
    )
    for changed, reason in (
        ({"h0": h.double()}, "fp64"),
        ({"norm_hh": torch.ones(20)}, "layer norm"),
        ({"zoneout_c": 0.1}, "zoneout"),
        ({"weight_hr": torch.zeros(5, 5)}, "projection"),
        ({"gates_x": x[:0]}, "no steps"),
    ):
        given = plain._replace(**changed)
        assert reason in str(recurrent_op._cuda_rejects(given))


@pytest.mark.parametrize("setting", ["allow_tf32", "fp32_precision"])
def test_tf32_where_torch_takes_it(setting: str) -> None:
    """By either of torch's settings: once the newer one was used, the older cannot be read."""
    from types import SimpleNamespace

    from fastseq.kernels.attention_launch import uses_tf32

    matmul = torch.backends.cuda.matmul
    try:
        for wanted in (True, False):
            setattr(
                matmul,
                setting,
                wanted if setting == "allow_tf32" else "tf32" if wanted else "ieee",
            )
            for dtype in (torch.float32, torch.bfloat16):
                call: Any = SimpleNamespace(h0=SimpleNamespace(is_cuda=True, dtype=dtype))
                expected = wanted and dtype == torch.float32
                assert recurrent_op._tf32(call) == expected
                assert uses_tf32(torch.zeros(1, dtype=dtype)) == expected
    finally:
        matmul.fp32_precision = "none"
