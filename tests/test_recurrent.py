"""The recurrent family: every backend, torch's product grid, autograd, features, modules."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq import _extension, functional, nn
from fastseq.backends import recorded
from fastseq.ops import recurrent as recurrent_op
from fastseq.ops.recurrent import persistent_plan
from fastseq.random import draw_seed, keep_mask
from fastseq.testing import OPERATORS, Case
from fastseq.testing.check import check
from fastseq.testing.recurrent import OPERATORS as FAMILY

NAMES = [operator.name for operator in FAMILY]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN", "ignore:overflow encountered"
)


def expect_pass(name: str, backend: str, dtype: torch.dtype, chosen: list[Case]) -> None:
    ran = 0
    for case in chosen:
        if dtype not in case.dtypes or case.large:
            continue
        outcome = check(OPERATORS[name], backend, dtype, case, CPU)
        assert not outcome.failures, (name, backend, dtype, case.name, outcome.failures)
        ran += outcome.skipped is None
    assert ran or (backend == "triton" and dtype == torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_cpu_kernels(name: str, dtype: torch.dtype) -> None:
    expect_pass(name, "cpu", dtype, list(OPERATORS[name].cases))


@pytest.mark.parametrize(
    "dtype",
    [*DTYPES[:2], pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_triton_kernels_interpreted(name: str, dtype: torch.dtype) -> None:
    expect_pass(name, "triton", dtype, [case for case in OPERATORS[name].cases if case.tiny])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_other_backends(name: str, dtype: torch.dtype, backend: str) -> None:
    expect_pass(name, backend, dtype, [case for case in OPERATORS[name].cases if case.quick])


@pytest.mark.parametrize("instruction_set", ["avx512", "avx2", "generic"])
def test_every_instruction_set(instruction_set: str) -> None:
    """A machine runs the widest it has; a process of its own runs the others."""
    available = fastseq.backends()["cpu"]
    if instruction_set not in ("generic", *available.split()) and "avx512" not in available:
        pytest.skip(f"this machine has {available}")
    code = (
        "import fastseq, sys\n"
        "assert sys.argv[1] in fastseq.backends()['cpu'], fastseq.backends()\n"
        "from fastseq.cli import main\n"
        "sys.exit(main(['verify', '--quick', '--family', 'recurrent', '--backend', 'cpu']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, instruction_set],
        env={**os.environ, "FASTSEQ_CPU_ISA": instruction_set},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


# --- torch's own grid ----------------------------------------------------------------------------


def module_pair(name: str, *sizes: int, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    ours = getattr(nn, name)(*sizes, **options).to(dtype)
    theirs = getattr(torch.nn, name)(*sizes, **options).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def everything(module: Any, input: Any, hx: Any, x: Tensor) -> list[Tensor]:
    """Outputs, final states and all gradients, for fixed gradients of the outputs."""
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    output, final = module(input, hx)
    data = output.data if isinstance(output, PackedSequence) else output
    outputs = [data, *([final] if isinstance(final, Tensor) else final)]
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    inputs = [x, *states, *module.parameters()]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


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


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [tensor for part in results for tensor in flat(part)]


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


# --- the vectors' tanh and sigmoid ---------------------------------------------------------------


def ulps(found: Tensor, true: Tensor) -> float:
    step = torch.nextafter(true.float().abs(), torch.tensor(torch.inf)).double()
    return float(((found.double() - true).abs() / (step - true.float().abs().double())).max())


def test_tanh_is_within_2_ulp_and_sigmoid_within_2_5() -> None:
    """An RNN of one step without weights is a tanh; an LSTM with c = 0 shows a sigmoid."""
    x = torch.cat(
        [
            torch.linspace(-20, 20, 400001),
            torch.logspace(-30, 1, 100001),
            -torch.logspace(-30, 1, 100001),
        ]
    )
    h = torch.zeros(len(x) // 16 + 1, 16)
    x = torch.nn.functional.pad(x, (0, h.numel() - len(x))).view_as(h)
    with fastseq.use_backend("cpu"):
        from fastseq.ops.recurrent_cell import forward_op

        found = forward_op(x, h, h, None, "tanh", False)[0]
        assert ulps(found, x.double().tanh()) <= 2
        gates = x.repeat(1, 4)
        saved = forward_op(gates, torch.zeros_like(gates), h, h, "lstm", True)[3]
        assert ulps(saved[:, :16], x.double().sigmoid()) <= 2.5
        special = torch.tensor([[torch.nan, torch.inf, -torch.inf, -0.0]])
        found = forward_op(special, 0 * h[:1, :4], h[:1, :4], None, "tanh", False)[0]
    torch.testing.assert_close(found, torch.tensor([[torch.nan, 1.0, -1.0, 0.0]]), equal_nan=True)


# --- lengths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_lengths_equal_packing(name: str, backend: str) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    ours, theirs = module_pair(
        name, 4, 8, dtype=dtype, num_layers=2, bidirectional=True, batch_first=True
    )
    lengths = torch.tensor([2, 5, 1])
    x = torch.randn(3, 5, 4, dtype=dtype)
    x[0, 2:], x[2, 1:] = torch.nan, torch.nan
    x.requires_grad_()
    with fastseq.use_backend(backend):
        output, final = ours(x, None, lengths)
        loss = output.pow(2).sum() + sum(s.pow(3).sum() for s in flat(final))
        grads = torch.autograd.grad(loss, [x, *ours.parameters()])
    clean = x.detach().nan_to_num().requires_grad_()
    packed = pack_padded_sequence(clean, lengths, True, enforce_sorted=False)
    expected, expected_final = theirs(packed)
    expected = pad_packed_sequence(expected, True)[0]
    loss = expected.pow(2).sum() + sum(s.pow(3).sum() for s in flat(expected_final))
    expected_grads = torch.autograd.grad(loss, [clean, *theirs.parameters()])
    tolerance = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 1e-4}
    for a, b in zip(
        [output, *flat(final), *grads],
        [expected, *flat(expected_final), *expected_grads],
        strict=True,
    ):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_rows_of_length_zero_keep_their_state(name: str, backend: str) -> None:
    module = getattr(nn, name)(4, 8)
    x = torch.full((3, 2, 4), torch.nan)
    x[:, 0] = torch.randn(3, 4)
    x.requires_grad_()
    h = torch.randn(1, 2, 8, requires_grad=True)
    hx = (h, h * 2) if name == "LSTM" else h
    with fastseq.use_backend(backend):
        output, final = module(x, hx, torch.tensor([3, 0]))
    first = flat(final)[0]
    assert torch.equal(first[:, 1], h[:, 1])
    assert not output[:, 1].any()
    grad_x, grad_h = torch.autograd.grad(first.sum() + output.sum(), (x, h))
    assert not grad_x[:, 1].any()
    assert torch.equal(grad_h[:, 1], torch.ones(1, 8))
    assert grad_h.isfinite().all()
    assert all(
        p.isfinite().all()
        for p in torch.autograd.grad(
            module(x, hx, torch.tensor([3, 0]))[0].sum(), list(module.parameters())
        )
    )


def test_results_do_not_depend_on_threads_or_batch() -> None:
    """Of the kernels themselves: the products around them are the library's."""
    from fastseq.ops.recurrent import backward_op, forward_op

    gates, h0 = torch.randn(6, 70, 3 * 40), torch.randn(70, 40)
    weight, bias = torch.randn(120, 40), torch.randn(120)
    grad = torch.randn(6, 70, 40)

    def run(rows: slice) -> list[Tensor]:
        h = h0[rows].contiguous()
        none = (None,) * 7
        kind = ("gru", False, 0.0, 0.0)
        made = forward_op(gates[:, rows], h, None, weight, bias, *none, *kind, 1e-5, True)
        output, _, _, cells, saved, *norms = made
        grads, states = (grad[:, rows], None, None, None), (output, cells, *norms, h, None)
        back = backward_op(saved, *grads, *states, weight, *none, *kind, 0, 0.0)
        return [output, *back[:2]]

    before = torch.get_num_threads()
    with fastseq.use_backend("cpu"):
        try:
            torch.set_num_threads(2)
            whole = run(slice(None))
            torch.set_num_threads(1)
            single = run(slice(None))
        finally:
            torch.set_num_threads(before)
        part = run(slice(5, 18))
    for a, b, c in zip(whole, single, part, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[:, 5:18], c)


# --- autograd ------------------------------------------------------------------------------------


def sequence_call(kind: str, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    """A small call of two steps and its inputs, for numerical gradients."""
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[kind] * 3
    shapes = [(2, 2, 2), (1, 2, 3), *([(1, 2, 3)] if kind == "lstm" else [])]
    shapes += [(gates, 2), (gates, 3), (gates,), (gates,)]
    norms = 0
    if options.pop("norm", False):
        extra = [(gates,), (gates,)] + ([(3,), (3,)] if kind == "lstm" else [])
        norms = len(extra)
        shapes += extra
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    states = 2 if kind == "lstm" else 1

    def call(*tensors: Tensor) -> Any:
        torch.manual_seed(5)  # one mask for all evaluations
        hx = tensors[1 : 1 + states]
        params = list(tensors[1 + states : len(tensors) - norms])
        more = {**options, "layer_norm": list(tensors[-norms:])} if norms else options
        made = getattr(functional, kind)(
            tensors[0], hx if states == 2 else hx[0], params, True, 1, 0.0, True, **more
        )
        return tuple(flat(made))

    return call, inputs


FEATURES: list[dict[str, Any]] = [
    {},
    {"norm": True},
    {"zoneout": 0.4},
    {"recurrent_dropout": 0.4},
    {"weight_dropout": 0.4},
    {"lengths": torch.tensor([1, 2])},
    {"return_all_states": True},
]


@pytest.mark.parametrize("options", FEATURES, ids=lambda o: next(iter(o), "plain"))
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_gradients_are_derivatives(kind: str, options: dict[str, Any]) -> None:
    if kind == "rnn" and "norm" in options:
        pytest.skip("no layer norm there")
    call, inputs = sequence_call(kind, **options)
    with fastseq.use_backend("cpu"):
        assert torch.autograd.gradcheck(call, inputs)
        if options.keys() <= {"lengths"}:
            assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_transforms(kind: str) -> None:
    call, inputs = sequence_call(kind)
    inputs = [tensor.detach() for tensor in inputs]

    def loss(*tensors: Tensor) -> Tensor:
        return sum(o.pow(2).sum() for o in call(*tensors))  # type: ignore[return-value]

    with fastseq.use_backend("cpu"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        found = torch.func.grad(loss, argnums=tuple(range(len(inputs))))(*inputs)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        tangent = torch.randn_like(inputs[0])
        _, slope = torch.func.jvp(lambda x: loss(x, *inputs[1:]), (inputs[0],), (tangent,))
        torch.testing.assert_close(slope, (expected[0] * tangent).sum())
        many = torch.stack([inputs[0], -inputs[0]])
        batched = torch.func.vmap(lambda x: call(x, *inputs[1:])[0])(many)
        torch.testing.assert_close(batched[1], call(many[1], *inputs[1:])[0])


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_bptt_is_the_loop_that_detaches(name: str, backend: str) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    module = getattr(nn, name)(4, 8, num_layers=2).to(dtype)
    x = torch.randn(7, 3, 4, dtype=dtype, requires_grad=True)
    h = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
    hx = (h, h.detach() * 2) if name == "LSTM" else h
    function = getattr(functional, name.lower())
    with fastseq.use_backend(backend):
        output, *final = function(x, hx, list(module.parameters()), True, 2, bptt=3)
        wanted = [x, h, *module.parameters()]
        grads = torch.autograd.grad(output.pow(2).sum() + final[0].sum(), wanted)
    plain = getattr(torch.nn, name)(4, 8, num_layers=2).to(dtype)
    plain.load_state_dict(module.state_dict())
    outputs, state = [], hx
    for start in range(0, 7, 3):
        if start:
            state = tuple(s.detach() for s in state) if name == "LSTM" else state.detach()
        chunk, state = plain(x[start : start + 3], state)
        outputs.append(chunk)
    last = state[0] if name == "LSTM" else state
    expected_output = torch.cat(outputs)
    expected = torch.autograd.grad(
        expected_output.pow(2).sum() + last.sum(), [x, h, *plain.parameters()]
    )
    tolerance = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 1e-4}
    for a, b in zip([output, *grads], [expected_output, *expected], strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_grad_clip_equals_the_reference_and_binds(kind: str, backend: str) -> None:
    grads = {}
    for where, bound in ((backend, 0.05), ("reference", 0.05), ("reference", None)):
        torch.manual_seed(2)
        call, inputs = sequence_call(kind, grad_clip=bound, lengths=torch.tensor([2, 1]))
        inputs = [t.detach().float().requires_grad_() for t in inputs]
        with fastseq.use_backend(where):
            loss = sum(o.pow(2).sum() for o in call(*inputs))
            grads[where, bound] = torch.autograd.grad(loss, inputs)
    for a, b in zip(grads[backend, 0.05], grads["reference", 0.05], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # h0's gradient leaves through the clamp; that of a plain call is larger.
    assert grads[backend, 0.05][1].abs().max() <= 0.05
    assert grads["reference", None][1].abs().max() > 0.05


# --- masks ---------------------------------------------------------------------------------------


def test_zoneout_draws_the_twins_mask() -> None:
    """With update gate 1 - z = 1 (h' = n) a unit is either n or what it was."""
    gates = torch.zeros(3, 2, 3 * 5)
    gates[..., 5:10] = -100.0
    gates[..., 10:] = 100.0
    call = (gates, torch.zeros(2, 5), None, torch.zeros(15, 5), *(None,) * 6)
    torch.manual_seed(4)
    seed = draw_seed(CPU)
    mask = keep_mask(seed, (3, 2, 5), 0.5)
    from fastseq.ops.recurrent import forward_op

    with fastseq.use_backend("cpu"):
        output = forward_op(*call, seed, None, "gru", False, 0.5, 0.0, 1e-5, False)[0]
    assert torch.equal(output > 0.5, mask.cummax(0)[0])


@pytest.mark.parametrize(
    "option", [{"zoneout": 0.3}, {"recurrent_dropout": 0.3}, {"weight_dropout": 0.3}]
)
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_masks_are_seeded_and_the_same_everywhere(kind: str, option: dict[str, float]) -> None:
    call, inputs = sequence_call(kind, **option)
    plain, _ = sequence_call(kind)
    with torch.no_grad():
        with fastseq.use_backend("cpu"):
            ours, again, without = call(*inputs), call(*inputs), plain(*inputs)
        with fastseq.use_backend("reference"):
            expected = call(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert not torch.allclose(ours[0], without[0])
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


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
    module = nn.GRU(4, 8)
    params, x = list(module.parameters()), torch.randn(5, 3, 4)

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
    (lambda: functional.gru_cell(X[0], H[0, :2], *P), RuntimeError, r"hx\[0\]"),
    (lambda: functional.gru_cell(X[0], H[0], P[0], P[1][:, :3]), RuntimeError, "w_hh"),
    (lambda: functional.lstm_cell(X, (H, H), P[0], P[1]), RuntimeError, "input"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with fastseq.use_backend("cpu"), pytest.raises(error, match=message):
        call()


def test_auto_takes_torchs_where_that_is_ahead() -> None:
    """oneDNN's LSTM of several rows, and few steps; what torch does step by step is ours."""

    def taken(name: str, steps: int, batch: int, **options: Any) -> str:
        module = getattr(nn, name)(64, 64, **options)
        with recorded() as decisions:
            module(torch.randn(steps, batch, 64))
        return decisions[0].backend

    if torch.backends.mkldnn.is_available():
        assert taken("LSTM", 20, 8) == "torch"
    assert taken("LSTM", 20, 1) == "cpu"
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
