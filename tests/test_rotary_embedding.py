"""Positional encodings: the rotary kernels on every backend, and the modules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq import functional
from fastseq.testing import OPERATORS
from fastseq.testing.check import check
from fastseq.testing.rotary_embedding import torch_rotary_embedding

from .ladder import DTYPES, expect_verified

OPERATOR = OPERATORS["rotary_embedding"]


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend(backend: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("no fp64 kernel")
    for case in OPERATOR.cases:
        if case.large or (backend == "triton" and not case.tiny):
            continue
        outcome = check(OPERATOR, backend, dtype, case, "cpu")
        assert not outcome.failures, (case.name, outcome.failures)
        assert outcome.skipped is None


@pytest.mark.parametrize("instruction_set", ["avx2", "generic"])
def test_narrower_instruction_sets(instruction_set: str) -> None:
    expect_verified(instruction_set, "rotary_embedding", "--quick")


@pytest.mark.parametrize("interleaved", [False, True])
def test_derivatives_of_every_order(interleaved: bool) -> None:
    rotary = fastseq.nn.RotaryEmbedding(4, 8, interleaved=interleaved)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return rotary(x).pow(3)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x)
    tangent = torch.randn_like(x)
    _, jvp = torch.func.jvp(rotary, (x,), (tangent,))
    torch.testing.assert_close(jvp, rotary(tangent))  # it is linear
    by_row = torch.func.vmap(rotary)(x)
    torch.testing.assert_close(by_row, rotary(x))


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(interleaved: bool) -> None:
    """What the rotation is for: q at p and k at p + d give the same product for every p."""
    rotary = fastseq.nn.RotaryEmbedding(32, 100, interleaved=interleaved)
    q, k = torch.randn(32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    positions = torch.arange(90)
    queries = rotary(q.expand(90, 32), positions)
    keys = rotary(k.expand(90, 32), positions + 7)
    products = (queries * keys).sum(-1)
    torch.testing.assert_close(products, products[:1].expand(90), rtol=0, atol=1e-5)
    torch.testing.assert_close(queries.norm(dim=-1), q.norm().expand(90), rtol=1e-6, atol=0)


def test_a_decoder_gets_the_rows_of_the_whole() -> None:
    rotary = fastseq.nn.RotaryEmbedding(16, 20)
    x = torch.randn(2, 4, 20, 16)
    whole = rotary(x)
    steps = [rotary(x[:, :, i : i + 1], offset=i) for i in range(20)]
    assert torch.equal(torch.cat(steps, 2), whole)
    assert torch.equal(rotary(x, torch.arange(20).expand(2, 20)), whole)
    torch.testing.assert_close(whole, torch_rotary_embedding(x, rotary.cos, rotary.sin))


X, COS = torch.randn(2, 3, 5, 8), torch.randn(9, 4)
ROTATE = functional.rotary_embedding
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: ROTATE(X[0, 0, 0], COS, COS), RuntimeError, r"input must be \[\*, L, D\]"),
    (lambda: ROTATE(X.long(), COS, COS), NotImplementedError, "input.*int64"),
    (lambda: ROTATE(X[..., :6], COS, COS), RuntimeError, "cos must be.*up to 6"),
    (lambda: ROTATE(X, COS, COS[1:]), RuntimeError, "sin must have the shape of cos"),
    (lambda: ROTATE(X, COS.to("meta"), COS), RuntimeError, "cos must be on the input's device"),
    (lambda: ROTATE(X, COS, COS, offset=5), IndexError, "5 to 9"),
    (lambda: ROTATE(X, COS, COS, offset=-1), IndexError, "-1 to 3"),
    (lambda: ROTATE(X, COS, COS, torch.arange(5.0)), RuntimeError, "positions must be int64"),
    (lambda: ROTATE(X, COS, COS, torch.arange(4)), RuntimeError, r"positions must be \[5\]"),
    (lambda: ROTATE(X, COS, COS, torch.arange(5) + 5), IndexError, r"\[0, 9\), got 5 to 9"),
    (lambda: fastseq.nn.RotaryEmbedding(5), ValueError, "dim must be even"),
    (lambda: fastseq.nn.LearnedPositionalEncoding(4, 8)(X[0]), IndexError, "0 to 4.*table of 4"),
    (lambda: fastseq.nn.SinusoidalPositionalEncoding(6)(X[0]), RuntimeError, r"input must be.*6"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_model", [6, 7])
def test_sinusoidal(d_model: int) -> None:
    module = fastseq.nn.SinusoidalPositionalEncoding(d_model, 50)
    zero = torch.zeros(2, 9, d_model)
    expected = torch.tensor(
        [
            [
                (math.sin, math.cos)[c % 2](p * 10000.0 ** (-(c - c % 2) / d_model))
                for c in range(d_model)
            ]
            for p in range(9)
        ]
    )
    torch.testing.assert_close(module(zero), expected.expand(2, 9, d_model))
    assert torch.equal(module(zero[:, :4], offset=5), module(zero)[:, 5:])
    assert torch.equal(module(zero[0]), module(zero)[0])
    first = fastseq.nn.SinusoidalPositionalEncoding(d_model, 50, batch_first=False)
    assert torch.equal(first(zero.transpose(0, 1)), module(zero).transpose(0, 1))
    assert not module.state_dict()
    assert module(zero.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_positions_are_rows_of_the_table(kind: str) -> None:
    if kind == "learned":
        module: nn.Module = fastseq.nn.LearnedPositionalEncoding(20, 6)
    else:
        module = fastseq.nn.SinusoidalPositionalEncoding(6, 20)
    x = torch.randn(3, 5, 6)
    positions = torch.randint(0, 20, (3, 5))
    table = module.weight if kind == "learned" else module.table
    torch.testing.assert_close(module(x, positions=positions), x + table[positions])
    torch.testing.assert_close(module(x, positions=positions[0]), x + table[positions[0]])
    torch.testing.assert_close(module(x, offset=4), x + table[4:9])
    module.batch_first = False
    x = x.transpose(0, 1)
    for given in (positions.mT, positions[0][:, None]):
        assert torch.equal(module(x, positions=given), x + table[given])
    assert torch.equal(module(x, positions=positions[0]), x + table[positions[0]][:, None])


def test_dropout_in_training_only() -> None:
    for module in (
        fastseq.nn.SinusoidalPositionalEncoding(8, dropout=0.5),
        fastseq.nn.LearnedPositionalEncoding(9, 8, dropout=0.5),
    ):
        x = torch.ones(2, 9, 8)
        assert (module(x) == 0).any()
        assert isinstance(module, nn.Module)
        assert not (module.eval()(x) == 0).any()
