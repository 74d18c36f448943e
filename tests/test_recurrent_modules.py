"""The recurrent modules: torch's product grid, torch's samples, layer norm, scripts and traces."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq
from fastseq import nn

from .recurrent_checks import everything, flat, module_pair

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN", "ignore:overflow encountered"
)


# --- torch's own grid ----------------------------------------------------------------------------


def grid() -> Iterator[Any]:
    for name in ("LSTM", "GRU", "RNN"):
        projections = (0, 3) if name == "LSTM" else (0,)
        relu = (False, True) if name == "RNN" else (False,)
        for values in itertools.product((True, False), (True, False), (1, 2), projections, relu):
            bias, bidirectional, layers, projection, is_relu = values
            options: dict[str, Any] = {
                "bias": bias,
                "bidirectional": bidirectional,
                "num_layers": layers,
            }
            if projection:
                options["proj_size"] = projection
            if is_relu:
                options["nonlinearity"] = "relu"
            yield pytest.param(name, options, id="-".join([name, *map(str, values)]))


@pytest.mark.parametrize(("name", "options"), list(grid()))
def test_product_grid(name: str, options: dict[str, Any]) -> None:
    """bias x directions x layers x projection x batch_first x packed x contiguous, to 1e-10."""
    hidden, state = 6, options.get("proj_size", 6)
    for batch_first, packed, contiguous in itertools.product((False, True), repeat=3):
        ours, theirs = module_pair(name, 5, hidden, batch_first=batch_first, **options)
        count = options["num_layers"] * (1 + options["bidirectional"])
        results = []
        for module in (ours, theirs):
            torch.manual_seed(3)
            x = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
            h = torch.randn(count, 4, state, dtype=torch.float64, requires_grad=True)
            c = torch.randn(count, 4, hidden, dtype=torch.float64, requires_grad=True)
            given = x if batch_first else x.transpose(0, 1)
            given = given.contiguous() if contiguous else given
            if packed:
                given = pack_padded_sequence(
                    given, torch.tensor([4, 7, 2, 7]), batch_first, enforce_sorted=False
                )
            with fastseq.use_backend("cpu" if module is ours else "auto"):
                results.append(everything(module, given, (h, c) if name == "LSTM" else h, x))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_dropout_between_layers_is_torchs(name: str) -> None:
    ours, theirs = module_pair(name, 5, 6, num_layers=3, dropout=0.4)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(11)
        with fastseq.use_backend("cpu" if module is ours else "auto"):
            results.append(module(x)[0])
    torch.testing.assert_close(*results)
    with fastseq.use_backend("cpu"):
        torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x)[0])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 33), (1000, 3, 17), (5, 17, 129)])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_odd_sizes_and_many_steps(name: str, sizes: tuple[int, int, int]) -> None:
    steps, batch, hidden = sizes
    ours, theirs = module_pair(name, 3, hidden)
    x = torch.randn(steps, batch, 3, dtype=torch.float64)
    with fastseq.use_backend("cpu"):
        mine = ours(x)
    for a, b in zip(flat(mine), flat(theirs(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_saturated_gates(name: str) -> None:
    ours, theirs = module_pair(name, 4, 8, dtype=torch.float32)
    x = 50 * torch.randn(6, 4) if name.endswith("Cell") else 50 * torch.randn(6, 3, 4)
    with fastseq.use_backend("cpu"):
        mine = flat(ours(x))
    for a, b in zip(mine, flat(theirs(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_unbatched_and_eval_backward(name: str) -> None:
    ours, theirs = module_pair(name, 4, 8, bidirectional=True)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 8, dtype=torch.float64)
    hx = (h, h) if name == "LSTM" else h
    for module in (ours, theirs):
        module.eval()
    with fastseq.use_backend("cpu"):
        mine = flat(ours(x, hx))
    both = [(mine, ours), (flat(theirs(x, hx)), theirs)]
    grads = [torch.autograd.grad(sum(o.sum() for o in outs), x)[0] for outs, _ in both]
    for a, b in zip([*mine, grads[0]], [*both[1][0], grads[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# --- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_modules_are_torchs(name: str) -> None:
    import copy
    import pickle

    ours, theirs = module_pair(name, 4, 8, dtype=torch.float32)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    x = torch.randn(5, 4)
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for a, b in zip(flat(clone(x)), flat(theirs(x)), strict=True):
            torch.testing.assert_close(a, b)
    if name.endswith("Cell"):
        for a, b in zip(flat(ours(x[0])), flat(theirs(x[0])), strict=True):
            torch.testing.assert_close(a, b)
    torch.manual_seed(1)
    ours.reset_parameters()
    torch.manual_seed(1)
    theirs.reset_parameters()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_module_samples_of_torch() -> None:
    """torch's own ModuleInfo samples, forward and backward."""
    from torch.testing._internal.common_modules import module_db

    ran = 0
    for info in module_db:
        mine = getattr(nn, info.module_cls.__name__, None)
        if info.module_cls.__name__ not in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"):
            continue
        for training in (True, False):
            samples = info.module_inputs_func(
                info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
            )
            for sample in samples:
                args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
                theirs = info.module_cls(*args, **kwargs).double()
                ours = mine(*args, **kwargs).double()
                ours.load_state_dict(theirs.state_dict())
                given = sample.forward_input
                with fastseq.use_backend("cpu"):
                    found = flat_any(ours(*given.args, **given.kwargs))
                expected = flat_any(theirs(*given.args, **given.kwargs))
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a, b)
                ran += 1
    assert ran > 50


def flat_any(results: Any) -> list[Tensor]:
    if isinstance(results, PackedSequence):
        return [results.data]
    if isinstance(results, Tensor):
        return [results]
    return [tensor for part in results for tensor in flat_any(part)]


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_layer_norm_modules(kind: str) -> None:
    """Against the cell written out in torch's functions; both directions, all gradients."""
    from fastseq.testing.recurrent import theirs as written_out

    name = f"LayerNorm{kind.upper()}"
    module = getattr(nn, name)(4, 8, batch_first=True).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)
    assert {"ln_ih_l0", "ln_hh_l0"} <= dict(module.named_parameters()).keys()
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    with fastseq.use_backend("cpu"):
        output, _ = module(x)
        grads = torch.autograd.grad(output.pow(2).sum(), [x, *module.parameters()])
    named = {f"{n.removesuffix('_l0')}_0": p for n, p in module.named_parameters()}
    expected = written_out(kind=kind, layers=1, bidirectional=False, input=x, **named)["output"]
    expected_grads = torch.autograd.grad(expected.pow(2).sum(), [x, *module.parameters()])
    for a, b in zip([output, *grads], [expected, *expected_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    stack = getattr(nn, name)(4, 8, 2, bidirectional=True, zoneout=0.1, recurrent_dropout=0.2)
    assert "zoneout=0.1" in repr(stack)
    stack.reset_parameters()
    assert torch.equal(stack.ln_hh_l1_reverse, torch.ones_like(stack.ln_hh_l1_reverse))
    output, _ = stack(torch.randn(5, 3, 4))
    assert output.shape == (5, 3, 16)


def test_accelerate_swaps_and_explains() -> None:
    model = torch.nn.ModuleDict(
        {name: getattr(torch.nn, name)(4, 8) for name in ("LSTM", "GRU", "RNN", "GRUCell")}
    )
    before = {name: flat(module(torch.ones(5, 4))) for name, module in model.items()}
    fastseq.accelerate(model, verbose=False)
    assert all(type(module).__module__.startswith("fastseq.") for module in model.values())
    with fastseq.use_backend("cpu"):
        for name, module in model.items():
            for a, b in zip(flat(module(torch.ones(5, 4))), before[name], strict=True):
                torch.testing.assert_close(a, b)
    explained = str(fastseq.explain(model["GRU"], torch.ones(5, 2, 4)))
    assert "recurrent forward" in explained
    fastseq.restore(model)
    assert type(model["LSTM"]) is torch.nn.LSTM


def test_parametrized_and_functional_weights() -> None:
    """Weights that are replaced (weight drop, functional_call) are those that run."""
    module = nn.GRU(4, 8)
    x = torch.randn(5, 2, 4)
    with fastseq.use_backend("cpu"):
        doubled = {name: 2 * p for name, p in module.named_parameters()}
        found = torch.func.functional_call(module, doubled, (x,))[0]
        other = torch.nn.GRU(4, 8)
        other.load_state_dict(doubled)
        torch.testing.assert_close(found, other(x)[0])


# --- TorchScript ---------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    """torch's own RNNs can be scripted inside another module only."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_a_script_is_torchs_module(name: str) -> None:
    """It runs where fastseq is not, and has the very parameters of ours."""
    ours = Wrapped(getattr(nn, name)(4, 8))
    x = torch.randn(5, 4) if name.endswith("Cell") else torch.randn(5, 3, 4)
    expected = flat(ours(x))
    scripted = torch.jit.script(ours)
    for a, b in zip(flat(scripted(x)), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert "fastseq::" not in str(scripted.inlined_graph)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(0.5)
    for a, b in zip(flat(scripted(x)), flat(ours(x)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRUCell", "LayerNormLSTM", "LayerNormGRU"])
def test_a_trace_runs_on_torchs_functions(name: str) -> None:
    module = getattr(nn, name)(4, 8)
    shape = (5, 4) if name.endswith("Cell") else (5, 3, 4)
    traced = torch.jit.trace(module, (torch.randn(shape),))
    assert "fastseq::" not in str(traced.inlined_graph)
    assert "PythonOp" not in str(traced.inlined_graph)
    x = torch.randn(shape)
    for a, b in zip(flat(traced(x)), flat(module(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_torch_lacks_cannot_be_scripted() -> None:
    with pytest.raises(NotImplementedError, match="LayerNormGRU has no TorchScript"):
        torch.jit.script(Wrapped(nn.LayerNormGRU(4, 8)))
