"""The recurrent kernels: every backend, threads, lengths, gradients, masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq import _extension, functional, nn
from fastseq.ops import recurrent_layer
from fastseq.ops.recurrent import backward_op, forward_op
from fastseq.random import draw_seed, keep_mask
from fastseq.reference.recurrent import GATES
from fastseq.testing.recurrent import OPERATORS as FAMILY

from .ladder import (
    CPU,
    DTYPES,
    INSTRUCTION_SETS,
    by_threads,
    cases,
    expect_pass,
    expect_same_bits,
    expect_verified,
)
from .recurrent_checks import flat, module_pair, sequence_call

NAMES = [operator.name for operator in FAMILY]
pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN", "ignore:overflow encountered"
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_cpu_kernels(name: str, dtype: torch.dtype) -> None:
    expect_pass(name, "cpu", dtype, cases(name))


@pytest.mark.parametrize(
    "dtype",
    [*DTYPES[:2], pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_triton_kernels_interpreted(name: str, dtype: torch.dtype) -> None:
    expect_pass(name, "triton", dtype, cases(name, tiny=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_other_backends(name: str, dtype: torch.dtype, backend: str) -> None:
    expect_pass(name, backend, dtype, cases(name, quick=True))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_instruction_set(instruction_set: str) -> None:
    expect_verified(instruction_set, "recurrent", "--quick")


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
        from fastseq.ops.recurrent_cell import forward_op as cell_op

        found = cell_op(x, h, h, None, "tanh", False)[0]
        assert ulps(found, x.double().tanh()) <= 2
        gates = x.repeat(1, 4)
        saved = cell_op(gates, torch.zeros_like(gates), h, h, "lstm", True)[3]
        assert ulps(saved[:, :16], x.double().sigmoid()) <= 2.5
        special = torch.tensor([[torch.nan, torch.inf, -torch.inf, -0.0]])
        found = cell_op(special, 0 * h[:1, :4], h[:1, :4], None, "tanh", False)[0]
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


@pytest.mark.parametrize(
    "lengths", [(7, 1, 0, 4), (2, 3, 0, 0), (0, 0, 0, 0), (7, 7, 7, 6)], ids=str
)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LayerNormLSTM", "LayerNormGRU"])
def test_products_of_the_steps_that_are_taken(
    name: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both directions and recurrent dropout, beside the products of all steps."""
    monkeypatch.setattr(recurrent_layer, "_LEAST_PICKED", 0)
    taken, picked = recurrent_layer._taken, []

    def noted(layer: recurrent_layer.Layer) -> Tensor | None:
        picked.append(taken(layer))
        return picked[-1]

    monkeypatch.setattr(recurrent_layer, "_taken", noted)
    x = torch.randn(7, 4, 5, dtype=torch.float64, requires_grad=True)

    def run(module: Any, most: float) -> list[Tensor]:
        monkeypatch.setattr(recurrent_layer, "_MOST_TAKEN", most)
        torch.manual_seed(3)
        results = flat(module(x, None, torch.tensor(lengths)))
        loss = sum(result.sin().sum() for result in results)
        return [*results, *torch.autograd.grad(loss, [x, *module.parameters()])]

    every: list[dict[str, Any]] = [{"bidirectional": True}]
    every += [{"recurrent_dropout": 0.5}] * name.startswith("LayerNorm")
    for options in every:
        module = getattr(nn, name)(5, 6, **options).double()
        found = run(module, 0.9)
        assert (picked[-1] is None) == (sum(lengths) > 0.9 * 28)
        for a, b in zip(found, run(module, -1.0), strict=True):
            torch.testing.assert_close(a, b)
        assert picked[-1] is None


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

    with fastseq.use_backend("cpu"):
        results = by_threads(lambda: run(slice(None)))
        part = run(slice(5, 18))
    expect_same_bits(results)
    for whole, some in zip(results[0], part, strict=True):
        assert torch.equal(whole[:, 5:18], some)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
def test_threads_that_share_one_row_change_no_bit(kind: str, dtype: torch.dtype) -> None:
    """Of so large a layer threads take some units each, and meet after every step."""
    steps, hidden = (100, 256) if kind == "tanh" else (24, 256)
    gates = torch.randn(steps, 1, GATES[kind] * hidden).to(dtype)
    h0 = torch.randn(1, hidden).to(dtype)
    weight = (torch.randn(GATES[kind] * hidden, hidden) / 16).to(dtype)
    bias = torch.randn(GATES[kind] * hidden).to(dtype) if kind == "gru" else None
    c0, none = h0 * 2 if kind == "lstm" else None, (None,) * 3
    lengths = torch.tensor([steps - 1])

    def run() -> list[Tensor]:
        made = forward_op(
            gates, h0, c0, weight, bias, *none, None, lengths, None, None,
            kind, True, 0.1, 0.0, 1e-5, True,
        )  # fmt: skip
        output, h_n, _, cells, saved, *norms = made
        back = backward_op(
            saved, output, h_n, None, None, output, cells, *norms, h0, c0, weight, *none, None,
            lengths, None, None, kind, True, 0.1, 0.0, 7, 0.1,
        )  # fmt: skip
        return [*made[:5], *back[:4]]

    with fastseq.use_backend("cpu"):
        expect_same_bits(by_threads(run))


def test_second_derivatives_where_a_result_depends_on_no_parameter() -> None:
    """The cell of the first step comes before the projection."""
    layer = nn.LSTM(4, 6, proj_size=3)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("weight_hr" in name)
    with fastseq.use_backend("cpu"):
        output, (_, c_n) = layer(torch.randn(1, 2, 4))
    for total, depends in ((c_n.sum(), False), (c_n.sum() + output.sum(), True)):
        (grad,) = torch.autograd.grad(
            total, [layer.weight_hr_l0], create_graph=True, allow_unused=True, retain_graph=True
        )
        assert (grad is not None) == depends


@pytest.mark.parametrize(("kind", "projected"), [("LSTM", 0), ("GRU", 0), ("LSTM", 4)])
def test_backward_within_autocast(kind: str, projected: int) -> None:
    """Which would round some operands of a product and not the others."""
    options = {"proj_size": projected} if projected else {}
    layer, x = getattr(nn, kind)(8, 8, **options), torch.randn(5, 3, 8)
    grads = []
    for enabled in (False, True):
        for small in (0, 1 << 23):
            with pytest.MonkeyPatch.context() as patch, fastseq.use_backend("cpu"):
                patch.setattr(recurrent_layer, "_SMALL", small)
                total = layer(x)[0].sum()
                with torch.autocast("cpu", enabled=enabled):
                    grads.append(torch.autograd.grad(total, list(layer.parameters())))
    for others in grads[1:]:
        torch.testing.assert_close(others, grads[0])


# --- the products around the loop ----------------------------------------------------------------


@pytest.mark.skipif(_extension.UNAVAILABLE is not None, reason="needs the extension")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1), (5, 3, 7, 33, 17), (70, 2, 65, 96, 64)], ids=str
)
def test_products_of_small_layers(sizes: tuple[int, ...], reverse: bool) -> None:
    """All five gradients and the input's gates, beside those of torch's fp32 products."""
    steps, batch, features, width, state = sizes
    x, output = torch.randn(steps, batch, features), torch.randn(steps, batch, state)
    h0, weight = torch.randn(batch, state), torch.randn(width, features)
    biases = torch.randn(width), torch.randn(width)
    gates_x, gates_h = torch.randn(2, steps, batch, width)

    def expected(dtype: torch.dtype) -> list[Tensor]:
        to = [t.to(dtype) for t in (x, output, h0, weight, gates_x, gates_h, *biases)]
        x_, output_, h0_, weight_, gates_x_, gates_h_, *biases_ = to
        before = [output_[1:], h0_[None]] if reverse else [h0_[None], output_[:-1]]
        flat_x, flat_h = gates_x_.flatten(0, 1), gates_h_.flatten(0, 1)
        return [
            x_ @ weight_.t() + biases_[0] + biases_[1],
            gates_x_ @ weight_,
            flat_x.t() @ x_.flatten(0, 1),
            flat_h.t() @ torch.cat(before).flatten(0, 1),
            flat_x.sum(0),
            flat_h.sum(0),
        ]

    found = [recurrent_layer._extension_input_gates(x, weight, *biases)]
    found += recurrent_layer._extension_gradients(
        gates_x, gates_h, x, weight, output, h0, reverse, 31
    )
    for a, b, true in zip(found, expected(torch.float32), expected(torch.float64), strict=True):
        theirs, ours = (b - true).abs().max(), (a - true).abs().max()
        assert ours <= 2 * theirs + 4e-7 * true.abs().max()
    some = recurrent_layer._extension_gradients(
        gates_x, gates_h, x, weight, output, h0, reverse, 2 + 8
    )
    assert [t.numel() > 0 for t in some] == [False, True, False, True, False]
    assert torch.equal(some[1], found[2])


@pytest.mark.parametrize("name", ["GRU", "LayerNormLSTM"])
def test_a_layer_is_one_node(name: str) -> None:
    """Of a small layer a node costs as much as its arithmetic: none may come in unnoticed."""
    module = getattr(nn, name)(4, 8)
    x = torch.randn(5, 3, 4, requires_grad=True)
    with fastseq.use_backend("cpu"):
        output, _ = module(x)
    assert "RecurrentFunction" in output.grad_fn.name()
    before = [node for node, _ in output.grad_fn.next_functions if node is not None]
    assert len(before) == 1 + len(list(module.parameters()))
    assert all("AccumulateGrad" in node.name() for node in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_gradients_of_each_alone_with_layer_norm(kind: str, dtype: torch.dtype) -> None:
    """What one input's gradient needs is there whatever others are wanted, with biases or without:
    beside the gradients that can be differentiated again, which have a way of their own."""
    gates = {"lstm": 4, "gru": 3}[kind] * 5
    for biases in (True, False):
        shapes = [(3, 2, 4), (gates, 4), (gates, 5), *[(gates,)] * (2 * biases + 2)]
        shapes += [(5,)] * 2 if kind == "lstm" else []
        given = [torch.randn(*shape, dtype=dtype) for shape in shapes]
        params = given[1 : 3 + 2 * biases]
        for tensor in given:
            tensor.requires_grad_()
            x, norms = given[0], given[1 + len(params) :]
            results = getattr(functional, kind)(x, None, params, biases, layer_norm=norms)
            loss = sum(result.sin().sum() for result in results)
            (found,) = torch.autograd.grad(loss, [tensor], retain_graph=True)
            (again,) = torch.autograd.grad(loss, [tensor], create_graph=True)
            assert not found.requires_grad
            torch.testing.assert_close(found, again)
            tensor.requires_grad_(False)


# --- autograd ------------------------------------------------------------------------------------


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
