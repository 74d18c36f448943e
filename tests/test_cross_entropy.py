"""The cross_entropy family: backends against the fp64 oracle, autograd, transforms, bad input."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from fastseq import functional
from fastseq.backends import recorded
from fastseq.testing.cross_entropy import OPERATORS as FAMILY

from .ladder import DTYPES, by_threads, cases, expect_pass, expect_same_bits, expect_verified

NAMES = [operator.name for operator in FAMILY]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_cpu_kernels(name: str, dtype: torch.dtype) -> None:
    chosen = [c for c in cases(name, tiny=False) if c.quick or dtype != torch.float16]
    expect_pass(name, "cpu", dtype, chosen)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_triton_kernels_interpreted(name: str, dtype: torch.dtype) -> None:
    chosen = [c for c in cases(name, tiny=True) if c.quick or dtype == torch.float32]
    expect_pass(name, "triton", dtype, chosen)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_other_candidates(name: str, dtype: torch.dtype, backend: str) -> None:
    expect_pass(name, backend, dtype, cases(name, tiny=True))


@pytest.mark.parametrize("instruction_set", ["avx2", "generic"])
def test_every_instruction_set(instruction_set: str) -> None:
    expect_verified(instruction_set, "cross_entropy", "--quick")


def loss_and_gradient(
    function: Callable[..., Tensor], x: Tensor, *arguments: object, **options: object
) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    loss = function(leaf, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def test_results_do_not_depend_on_threads_or_batch() -> None:
    x, target = torch.randn(600, 300), torch.randint(0, 300, (600,))
    options = {"reduction": "none", "label_smoothing": 0.1}

    def call() -> list[Tensor]:
        each = loss_and_gradient(functional.cross_entropy, x, target, **options)
        return [*each, functional.cross_entropy(x, target)]

    with fastseq.use_backend("cpu"):
        results = by_threads(call)
        some = loss_and_gradient(functional.cross_entropy, x[100:177], target[100:177], **options)
    expect_same_bits(results)
    for whole, half in zip(results[0][:2], some, strict=True):
        assert torch.equal(whole[100:177], half)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_row_does_not_depend_on_its_batch(backend: str) -> None:
    x, target = torch.randn(9, 70).bfloat16(), torch.randint(0, 70, (9,))
    with fastseq.use_backend(backend):
        whole = loss_and_gradient(functional.cross_entropy, x, target, reduction="none")
        for row in (0, 4, 8):
            one = loss_and_gradient(
                functional.cross_entropy, x[row : row + 1], target[row : row + 1], reduction="none"
            )
            assert torch.equal(one[0], whole[0][row : row + 1])
            assert torch.equal(one[1], whole[1][row : row + 1])


# --- invariants ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_invariants(backend: str) -> None:
    x, target = torch.randn(8, 37), torch.randint(0, 37, (8,))
    order = torch.randperm(37)
    with fastseq.use_backend(backend):
        loss, grad = loss_and_gradient(functional.cross_entropy, x, target, reduction="none")
        # The gradient is softmax - one_hot: a row sums to 0, only the target's is negative.
        assert grad.sum(1).abs().max() < 1e-6
        assert torch.equal((grad < 0).nonzero()[:, 1], target)
        assert (loss > 0).all()
        shifted = functional.cross_entropy(x + 8.0, target, reduction="none")
        torch.testing.assert_close(shifted, loss, rtol=1e-5, atol=1e-5)
        permuted = functional.cross_entropy(x[:, order], order.argsort()[target], reduction="none")
        torch.testing.assert_close(permuted, loss)
        extreme = torch.full((2, 5), -1e4)
        extreme[:, 3] = 1e4
        extreme_loss, extreme_grad = loss_and_gradient(
            functional.cross_entropy, extreme, torch.tensor([3, 0]), reduction="none"
        )
        assert extreme_loss.tolist() == [0.0, 2e4]
        assert extreme_grad.tolist() == [[0.0] * 5, [-1.0, 0.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference", "torch"])
def test_a_stretch_of_minus_infinity_costs_nothing(backend: str) -> None:
    """Longer than a block or a tile, at the beginning, in the middle, at the end."""
    n = 13000
    for begin, end in ((0, 9000), (2000, 12000), (3000, n)):
        x, target = torch.randn(2, n), torch.tensor([2500, 12500])
        x[:, begin:end] = -math.inf
        target[:] = 0 if begin else n - 1
        with fastseq.use_backend(backend):
            loss, grad = loss_and_gradient(functional.cross_entropy, x, target)
        expected, expected_grad = loss_and_gradient(F.cross_entropy, x.double(), target)
        assert abs(float(loss) - float(expected)) < 1e-5
        torch.testing.assert_close(grad, expected_grad.float(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("backend", ["auto", "cpu", "triton", "reference", "torch"])
def test_all_rows_ignored(backend: str) -> None:
    x, target = torch.randn(5, 7), torch.full((5,), -100)
    with fastseq.use_backend(backend):
        mean, mean_grad = loss_and_gradient(functional.cross_entropy, x, target)
        total, total_grad = loss_and_gradient(functional.cross_entropy, x, target, reduction="sum")
    assert mean.isnan()
    assert total == 0
    assert torch.equal(total_grad, torch.zeros_like(x))
    assert mean_grad.shape == x.shape


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_nan_in_an_ignored_row_stays_there(backend: str) -> None:
    x, target = torch.randn(3, 70), torch.tensor([4, -100, 5])
    x[1] = math.nan
    with fastseq.use_backend(backend):
        loss, grad = loss_and_gradient(functional.cross_entropy, x, target)
    assert loss.isfinite()
    assert torch.equal(grad[1], torch.zeros(70))
    expected = F.cross_entropy(x[::2], target[::2])
    torch.testing.assert_close(loss, expected)


def test_lse_is_that_of_every_row() -> None:
    x, target = torch.randn(3, 70), torch.tensor([4, -100, 5])
    for backend in ("cpu", "triton", "reference"):
        with fastseq.use_backend(backend):
            _, lse = functional.cross_entropy(x.bfloat16(), target, return_lse=True, softcap=2.0)
        assert lse.dtype == torch.float32
        z = 2.0 * torch.tanh(x.bfloat16().float() / 2.0)
        torch.testing.assert_close(lse, torch.logsumexp(z, 1))


# --- torch's own samples -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_torchs_sample_inputs(backend: str) -> None:
    pytest.importorskip("expecttest", reason="torch's test utilities import it")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [op for op in op_db if op.name == "nn.functional.cross_entropy"]
    count = 0
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            mine = sample.input.detach().requires_grad_()
            theirs = sample.input.detach().requires_grad_()
            with fastseq.use_backend(backend):
                ours = functional.cross_entropy(mine, *sample.args, **sample.kwargs)
                grad = torch.ones_like(ours)
                (our_grad,) = torch.autograd.grad(ours, mine, grad)
            expected = F.cross_entropy(theirs, *sample.args, **sample.kwargs)
            (expected_grad,) = torch.autograd.grad(expected, theirs, grad)
            torch.testing.assert_close(ours, expected)
            torch.testing.assert_close(our_grad, expected_grad)
            count += 1
    assert count >= 60


def test_legacy_reductions() -> None:
    x, target = torch.randn(5, 7), torch.randint(0, 7, (5,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for legacy in ({"size_average": False}, {"reduce": False}, {"size_average": True}):
            with fastseq.use_backend("cpu"):
                ours = functional.cross_entropy(x, target, **legacy)
            torch.testing.assert_close(ours, F.cross_entropy(x, target, **legacy))


def test_bytes_as_targets() -> None:
    x, target = torch.randn(5, 7), torch.randint(0, 7, (5,))
    with fastseq.use_backend("cpu"):
        assert torch.equal(
            functional.cross_entropy(x, target.byte()), functional.cross_entropy(x, target)
        )


# --- autograd ------------------------------------------------------------------------------------

EXTRAS = {"label_smoothing": 0.2, "softcap": 2.0, "z_loss": 0.3, "return_lse": True}


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradients_are_derivatives(backend: str, extras: dict[str, object], reduction: str) -> None:
    x = torch.randn(4, 6, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64)
    target = torch.randint(0, 6, (4, 2))
    target[1, 0] = -100

    def function(x: Tensor) -> object:
        return functional.cross_entropy(x, target, weight, reduction=reduction, **extras)

    with fastseq.use_backend(backend):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)
        assert torch.autograd.gradcheck(
            function, x, check_forward_ad=True, check_batched_grad=False
        )


@pytest.mark.parametrize("extras", [{}, {**EXTRAS, "return_lse": False}], ids=["plain", "extras"])
def test_probabilities_as_targets(extras: dict[str, object]) -> None:
    x = torch.randn(4, 6, 2, dtype=torch.float64, requires_grad=True)
    target = torch.softmax(torch.randn(4, 6, 2, dtype=torch.float64), 1).requires_grad_()
    weight = torch.rand(6, dtype=torch.float64)

    def function(x: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(x, target, weight, **extras)

    assert torch.autograd.gradcheck(function, (x, target))
    assert torch.autograd.gradgradcheck(function, (x, target))
    if not extras:
        assert torch.equal(function(x, target), F.cross_entropy(x, target, weight))
    # Probabilities that pick a class each are the class indices.
    indices = torch.randint(0, 6, (4, 2))
    one_hot = F.one_hot(indices, 6).movedim(-1, 1).double()
    torch.testing.assert_close(
        functional.cross_entropy(x, one_hot, **extras),
        functional.cross_entropy(x, indices, **extras),
    )


def test_the_logits_are_not_modified_and_hold_one_buffer() -> None:
    x = torch.randn(64, 5000, requires_grad=True)
    before = x.detach().clone()
    target = torch.randint(0, 5000, (64,))
    saved = []
    with (
        fastseq.use_backend("cpu"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        loss = functional.cross_entropy(x, target)
    loss.backward()
    assert torch.equal(x, before)
    others = [t for t in saved if t.data_ptr() != x.data_ptr()]
    assert sum(t.numel() for t in others) < 64 * 4


def test_gradients_that_are_not_contiguous() -> None:
    x, target = torch.randn(6, 70, requires_grad=True), torch.randint(0, 70, (6,))
    with fastseq.use_backend("cpu"):
        loss, lse = functional.cross_entropy(x, target, reduction="none", return_lse=True)
        wide = torch.randn(6, 3)
        strided = torch.autograd.grad((loss, lse), x, (wide[:, 1], wide[:, 2]), retain_graph=True)
        packed = torch.autograd.grad(
            (loss, lse), x, (wide[:, 1].contiguous(), wide[:, 2].contiguous()), retain_graph=True
        )
        assert torch.equal(*strided, *packed)
        (expanded,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
        (only_lse,) = torch.autograd.grad(lse.sum(), x)
    torch.testing.assert_close(only_lse, torch.softmax(x.detach(), 1))
    expected = torch.softmax(x.detach(), 1) - F.one_hot(target, 70)
    torch.testing.assert_close(expanded, expected)


def test_func_transforms() -> None:
    """grad, vmap, jvp and their compositions give what torch's own function gives."""
    x, tangent = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    target = torch.randint(0, 8, (3, 5))

    def values(function: Callable[..., Tensor]) -> list[Tensor]:
        def loss(x: Tensor, t: Tensor) -> Tensor:
            return function(x, t, label_smoothing=0.1)

        def at(x: Tensor) -> Tensor:
            return loss(x, target[0])

        return [
            torch.func.vmap(loss)(x, target),
            torch.func.vmap(at)(x),
            torch.func.grad(loss)(x[0], target[0]),
            torch.func.vmap(torch.func.grad(loss))(x, target),
            torch.func.jvp(at, (x[0],), (tangent[0],))[1],
            torch.func.jvp(torch.func.grad(at), (x[0],), (tangent[0],))[1],
            torch.func.hessian(at)(x[0, :, :]),
        ]

    with fastseq.use_backend("cpu"):
        mine = values(functional.cross_entropy)
    for a, b in zip(mine, values(F.cross_entropy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- dtypes, subclasses, modules -----------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gives_the_dtypes_torch_gives(device: str, dtype: torch.dtype) -> None:
    """On fake tensors, so that CUDA's rule is tested without one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    enabled, half = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    try:
        with FakeTensorMode():
            x = torch.empty(4, 8, device=device, dtype=dtype)
            target = torch.empty(4, device=device, dtype=torch.int64)
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.bfloat16)
            with fastseq.use_backend("reference"):
                ours = functional.cross_entropy(x, target)
            assert ours.dtype == F.cross_entropy(x, target).dtype
    finally:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, half)


def test_who_serves_which_call() -> None:
    """Small calls, images and probabilities go to torch; a language model's loss does not."""
    threads = torch.get_num_threads()

    def served(x: Tensor, target: Tensor, **options: object) -> set[str]:
        with recorded() as decisions:
            functional.cross_entropy(x, target, **options)
        return {decision.backend for decision in decisions}

    rows = 70 * threads
    logits = torch.randn(2, rows, 1000)
    assert served(torch.randn(4, 8), torch.tensor([1, 2, 3, 4])) == {"torch"}
    assert served(logits.transpose(1, 2), torch.zeros(2, rows).long()) == {"cpu"}
    assert served(logits, torch.zeros(2, 1000).long()) == {"torch"}
    assert served(logits[0], torch.softmax(logits[0], 1)) == {"torch"}
    assert served(logits[0, :4], torch.zeros(4).long(), z_loss=0.1) == {"cpu"}


def test_subclasses_go_to_torch() -> None:
    class Tagged(Tensor):
        pass

    x, target = torch.randn(4, 8).as_subclass(Tagged), torch.tensor([1, 2, 3, 4])
    assert type(functional.cross_entropy(x, target)) is Tagged
    assert type(functional.cross_entropy(x, target, z_loss=0.1)) is Tagged


@pytest.mark.parametrize("weighted", [True, False])
def test_module_is_torchs(weighted: bool) -> None:
    options = {
        "weight": torch.rand(1000) if weighted else None,
        "ignore_index": 3,
        "label_smoothing": 0.1,
        "reduction": "sum",
    }
    ours, theirs = fastseq.nn.CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict())
    x, target = torch.randn(200, 1000), torch.randint(0, 1000, (200,))
    torch.testing.assert_close(ours(x, target), theirs(x, target))
    scripted = torch.jit.script(ours)
    assert "fastseq::" not in str(scripted.graph)
    torch.testing.assert_close(scripted(x, target), theirs(x, target))


def test_compiled_training_step() -> None:
    torch._dynamo.reset()
    linear = torch.nn.Linear(16, 300)
    x, target = torch.randn(40, 16), torch.randint(0, 300, (40,))

    def step(x: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(linear(x), target, label_smoothing=0.1, z_loss=0.01)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (40, 13):
        results = []
        for function in (step, compiled):
            linear.zero_grad()
            loss = function(x[:rows], target[:rows])
            loss.backward()
            results.append((loss.detach(), linear.weight.grad.clone()))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


# --- bad input -----------------------------------------------------------------------------------

X, T = torch.randn(4, 8), torch.tensor([1, 2, 3, 4])
TORCHS = [  # what torch rejects too: its class, our words
    ((X, torch.tensor([1, 9, 3, 4])), {}, IndexError, r"target.*\[0, 8\).*got 9 at position 1"),
    ((X, torch.tensor([1, 2, 3, -1])), {}, IndexError, r"target.*got -1 at position 3"),
    ((X, T), {"ignore_index": 3, "reduction": "bad"}, ValueError, "reduction.*'bad'"),
    ((X.long(), T), {}, NotImplementedError, "input.*int64"),
    ((X, T[:3]), {}, ValueError, "target.*batch size, 4, got 3"),
    ((X, T.int()), {}, RuntimeError, "target.*int32"),
    ((X, T.float()), {}, RuntimeError, "target.*float32"),
    ((X, torch.rand(4, 7)), {}, RuntimeError, r"target.*\[4, 8\].*got shape \[4, 7\]"),
    ((X, T[:, None]), {}, RuntimeError, "target.*shape"),
    ((X[:, :, None], T), {}, RuntimeError, "target.*shape"),
    ((torch.tensor(1.0), torch.tensor(0)), {}, RuntimeError, "Expected|input"),
    ((X, T, torch.ones(7)), {}, RuntimeError, "weight.*8 classes"),
    ((X, T, torch.ones(8, 1)), {}, RuntimeError, "weight.*8 classes"),
    ((X, T, torch.ones(8).long()), {}, RuntimeError, "weight.*int64"),
    ((X, T), {"label_smoothing": 1.5}, RuntimeError, "label_smoothing.*1.5"),
    ((X, T.to("meta")), {}, RuntimeError, "target.*device"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), TORCHS)
def test_bad_input_has_torchs_class(
    arguments: tuple[object, ...],
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error):
        F.cross_entropy(*arguments, **options)
    for backend in ("cpu", "reference"):
        with fastseq.use_backend(backend), pytest.raises(error, match=message):
            functional.cross_entropy(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap.*0.0"),
        ({"softcap": -1.0}, "softcap"),
        ({"softcap": math.nan}, "softcap"),
        ({"z_loss": -0.1}, "z_loss.*-0.1"),
        ({"z_loss": math.inf}, "z_loss"),
    ],
)
def test_bad_extras(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional.cross_entropy(X, T, **options)


def test_target_out_of_range_is_nan_where_nobody_can_raise() -> None:
    """As on a GPU: the row is NaN, nothing is read outside, the other rows are right."""
    target = torch.tensor([1, 2**40, -(2**40), 8])
    with fastseq.use_backend("triton"):
        loss, grad = loss_and_gradient(functional.cross_entropy, X, target, reduction="none")
        mean = functional.cross_entropy(X, target)
    assert loss.isnan().tolist() == [False, True, True, True]
    assert grad.isnan().all(1).tolist() == [False, True, True, True]
    torch.testing.assert_close(loss[:1], F.cross_entropy(X[:1], target[:1], reduction="none"))
    assert mean.isnan()
