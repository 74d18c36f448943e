"""linear_cross_entropy: gradients, memory, what goes to torch, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from fastseq import functional

EXTRAS = {"label_smoothing": 0.2, "softcap": 2.0, "z_loss": 0.3}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "extras"])
def test_linear_gradients_are_derivatives(
    reduction: str, extras: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastseq.ops import linear_cross_entropy

    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 2 * 5 * 8)  # two tokens at a time
    hidden, matrix, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 3), (5, 3), (5,))
    )
    target, weight = torch.tensor([0, 4, -100, 2, 2]), torch.rand(5, dtype=torch.float64)

    def function(hidden: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        return functional.linear_cross_entropy(
            hidden, matrix, target, linear_bias=bias, weight=weight, reduction=reduction, **extras
        )

    with fastseq.use_backend("cpu"):
        assert torch.autograd.gradcheck(function, (hidden, matrix, bias))
        assert torch.autograd.gradgradcheck(function, (hidden, matrix, bias))
        assert torch.autograd.gradcheck(
            function, (hidden, matrix, bias), check_forward_ad=True, check_batched_grad=False
        )
    expected = functional.cross_entropy(
        F.linear(hidden, matrix, bias), target, weight, reduction=reduction, **extras
    )
    torch.testing.assert_close(function(hidden, matrix, bias), expected)


@pytest.mark.parametrize("wanted", ["hidden", "matrix", "bias"])
def test_linear_computes_only_wanted_gradients(wanted: str) -> None:
    tensors = {"hidden": torch.randn(6, 4), "matrix": torch.randn(9, 4), "bias": torch.randn(9)}
    tensors[wanted].requires_grad_()
    target = torch.randint(0, 9, (6,))
    for reduction in ("mean", "none"):
        loss = functional.linear_cross_entropy(
            tensors["hidden"],
            tensors["matrix"],
            target,
            linear_bias=tensors["bias"],
            reduction=reduction,
        )
        logits = F.linear(tensors["hidden"], tensors["matrix"], tensors["bias"])
        expected = F.cross_entropy(logits, target, reduction=reduction)
        for _ in range(2):  # a retained graph gives the same again
            (grad,) = torch.autograd.grad(loss.sum() * 3.0, tensors[wanted], retain_graph=True)
        (right,) = torch.autograd.grad(expected.sum() * 3.0, tensors[wanted])
        torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-5)


def test_linear_holds_a_chunk_of_logits() -> None:
    """Peak memory, by the profiler: a quarter of what the plain pair takes at most."""
    from torch.profiler import ProfilerActivity, profile

    from fastseq.ops import linear_cross_entropy

    hidden = torch.randn(8192, 16, requires_grad=True)
    matrix = torch.randn(32000, 16, requires_grad=True)
    target = torch.randint(0, 32000, (8192,))

    def peak(function: Callable[[], Tensor]) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function().backward()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most

    ours = peak(lambda: functional.linear_cross_entropy(hidden, matrix, target))
    logits = 8192 * 32000 * 4  # of which the plain pair holds three: logits, log p, a gradient
    assert linear_cross_entropy.CHUNK_BYTES < ours < logits * 3 / 4


def test_linear_leaves_the_rest_to_torchs_pair() -> None:
    hidden, matrix = torch.randn(6, 4), torch.randn(9, 4)
    probabilities = torch.softmax(torch.randn(6, 9), 1)
    ours = functional.linear_cross_entropy(hidden, matrix, probabilities)
    torch.testing.assert_close(ours, F.cross_entropy(F.linear(hidden, matrix), probabilities))
    several = torch.randn(9, 2, 4)
    target = torch.randint(0, 9, (6, 2))
    logits = torch.einsum("nf,cdf->ncd", hidden, several)
    ours = functional.linear_cross_entropy(hidden, several, target)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target))
    one = functional.linear_cross_entropy(hidden[0], matrix, torch.tensor(3))
    torch.testing.assert_close(one, F.cross_entropy(matrix @ hidden[0], torch.tensor(3)))


def test_linear_under_autocast() -> None:
    hidden, matrix = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    target = torch.randint(0, 9, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = functional.linear_cross_entropy(hidden, matrix, target)
        theirs = F.cross_entropy(F.linear(hidden, matrix), target)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    ours.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


# --- bad input -----------------------------------------------------------------------------------

T = torch.tensor([1, 2, 3, 4])
H, M = torch.randn(4, 3), torch.randn(8, 3)
LINEAR = [
    ((H, M, torch.tensor([1, 9, 3, 4])), {}, IndexError, "target.*got 9"),
    ((H, M, T[:3]), {}, ValueError, "target.*batch size, 4, got 3"),
    ((H, M, T.float()), {}, RuntimeError, "target.*float32"),
    ((H, M[:, :2], T), {}, RuntimeError, "linear_weight.*3 features"),
    ((H, M[0], T), {}, RuntimeError, "linear_weight"),
    ((H, M.double(), T), {}, RuntimeError, "linear_weight.*dtype.*float64"),
    ((H, M, T), {"linear_bias": torch.ones(7)}, RuntimeError, r"linear_bias.*\[8\].*\[7\]"),
    ((H, M, T), {"weight": torch.ones(7)}, RuntimeError, "weight.*8 classes"),
    ((H, M, T), {"reduction": "bad"}, ValueError, "reduction.*'bad'"),
    ((H, M, torch.rand(4, 8)), {"ignore_index": 2}, RuntimeError, "ignore_index.*2"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), LINEAR)
def test_bad_input_of_linear(
    arguments: tuple[object, ...],
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        functional.linear_cross_entropy(*arguments, **options)
    if hasattr(F, "linear_cross_entropy"):
        with pytest.raises(error):
            F.linear_cross_entropy(*arguments, **options)
