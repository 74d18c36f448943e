"""sample: its distribution, its generator, top-k and top-p, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import functional


def draws(logits: Tensor, times: int, **options: object) -> Tensor:
    """How often each class of one row comes in so many draws."""
    rows = logits.expand(times, -1)
    tokens = functional.sample(rows, seed=torch.tensor([77]), **options)
    return torch.bincount(tokens, minlength=logits.numel()).double()


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert expected[possible].min() > 5
    return float(((counts - expected)[possible].square() / expected[possible]).sum())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample_draws_from_softmax(backend: str, dtype: torch.dtype) -> None:
    """So do Triton's kernels, whose tokens are the reference's (below)."""
    logits = torch.randn(23).to(dtype)
    with fastseq.use_backend(backend):
        for temperature in (1.0, 2.5):
            counts = draws(logits, 20_000, temperature=temperature)
            # 22 degrees of freedom: above 60 once in 40 thousand fair draws.
            truth = torch.softmax(logits.double() / temperature, 0)
            assert chi_square(counts, truth) < 60
            other = torch.softmax(logits.double() / (temperature * 1.3), 0)
            assert chi_square(counts, other) > 60  # the test has teeth


def test_sample_of_many_equal_classes() -> None:
    """The winner's E is tiny there: its digits must not run out."""
    with fastseq.use_backend("cpu"):
        tokens = functional.sample(torch.zeros(400, 100_000), seed=torch.tensor([5]))
    counts = torch.bincount(tokens // 10_000, minlength=10)
    assert chi_square(counts.double(), torch.full((10,), 0.1)) < 40  # 9 degrees of freedom
    assert tokens.unique().numel() > 390


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_sample_is_the_references(backend: str) -> None:
    """The same tokens as in fp64, but for scores that are equal to fp32."""
    for dtype, classes in ((torch.float32, 1), (torch.bfloat16, 70), (torch.float32, 5003)):
        logits, seed = 3 * torch.randn(40, classes).to(dtype), torch.tensor([-(2**40) + 3])
        with fastseq.use_backend("reference"):
            expected = functional.sample(logits, seed=seed, first_row=2**33)
        with fastseq.use_backend(backend):
            assert torch.equal(functional.sample(logits, seed=seed, first_row=2**33), expected)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_sample_does_not_depend_on_the_batch_split(backend: str) -> None:
    logits, seed = torch.randn(3, 20, 70), torch.tensor([1234])
    with fastseq.use_backend(backend):
        whole = functional.sample(logits, seed=seed)
        parts = [
            functional.sample(logits[i], seed=seed, first_row=20 * i, temperature=1.0)
            for i in range(3)
        ]
        strided = functional.sample(logits.transpose(0, 1), seed=seed)
    assert whole.shape == (3, 20)
    assert torch.equal(whole, torch.stack(parts))
    assert not torch.equal(strided.t(), whole)  # numbered in the order of its own rows


def test_sample_follows_the_generator() -> None:
    logits = torch.randn(50, 100)
    first, second = (
        functional.sample(logits, generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    torch.manual_seed(7)
    third, fourth = functional.sample(logits), functional.sample(logits)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(third, fourth)


def test_sample_top_k_and_top_p() -> None:
    logits = torch.log(torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1]))
    kept = {
        (3, None): [0, 0.4, 0.25, 0.2, 0],
        (99, None): [0.05, 0.4, 0.25, 0.2, 0.1],
        (None, 0.6): [0, 0.4, 0.25, 0, 0],
        (None, 0.3): [0, 1, 0, 0, 0],
        (None, 1e-9): [0, 1, 0, 0, 0],
        (None, 1.0): [0.05, 0.4, 0.25, 0.2, 0.1],
        (2, 0.9): [0, 0.4, 0.25, 0, 0],
    }
    for (top_k, top_p), weights in kept.items():
        truth = torch.tensor(weights) / sum(weights)
        counts = draws(logits, 4000, top_k=top_k, top_p=top_p)
        assert chi_square(counts, truth) < 30
    assert (functional.sample(logits.expand(100, 5), temperature=1e-3) == 1).all()


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_sample_never_chooses_what_has_no_probability(backend: str) -> None:
    logits = torch.full((4, 70), -math.inf)
    logits[0, 69], logits[1, 3], logits[2, 5] = -1e30, math.nan, math.inf
    logits[2, 6] = 1e30
    with fastseq.use_backend(backend):
        assert functional.sample(logits).tolist() == [69, -1, 5, -1]
        assert functional.sample(logits[:0]).shape == (0,)


def test_sample_compiles() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, seed: functional.sample(x, seed=seed, top_k=5, top_p=0.9), fullgraph=True
    )
    x, seed = torch.randn(30, 40), torch.tensor([3])
    assert torch.equal(compiled(x, seed), functional.sample(x, seed=seed, top_k=5, top_p=0.9))
    op = torch.ops.fastseq._sample.default
    torch.library.opcheck(op, (x, seed, 0, 1.0), test_utils=("test_schema", "test_faketensor"))


SAMPLE = [
    ({"temperature": 0.0}, ValueError, "temperature.*0.0"),
    ({"temperature": -1.0}, ValueError, "temperature"),
    ({"temperature": math.nan}, ValueError, "temperature"),
    ({"top_k": 0}, ValueError, "top_k.*got 0"),
    ({"top_p": 0.0}, ValueError, "top_p.*got 0.0"),
    ({"top_p": 1.1}, ValueError, "top_p"),
    ({"first_row": -1}, ValueError, "first_row"),
    ({"seed": torch.tensor(3)}, RuntimeError, r"seed.*\[1\]"),
    ({"seed": torch.tensor([3]), "generator": torch.Generator()}, ValueError, "generator and seed"),
    ({"logits": torch.ones(3, 4).long()}, NotImplementedError, "logits.*int64"),
    ({"logits": torch.ones(3, 0)}, RuntimeError, "logits.*classes"),
    ({"logits": torch.tensor(1.0)}, RuntimeError, "logits.*classes"),
]


@pytest.mark.parametrize(("options", "error", "message"), SAMPLE)
def test_bad_input_of_sample(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        functional.sample(**{"logits": torch.randn(3, 4), **options})
