"""The embedding family: every backend against the fp64 oracle, autograd, bad input, the module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq
from fastseq.backends import recorded
from fastseq.functional import token_position_embedding
from fastseq.nn import TokenPositionEmbedding
from fastseq.testing import OPERATORS, make_problem, measure_torch
from fastseq.testing.check import check

from .ladder import DTYPES, expect_verified

OPERATOR = OPERATORS["token_position_embedding"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend(dtype: torch.dtype) -> None:
    gradients: Counter[str] = Counter()
    for case in (case for case in OPERATOR.cases if not case.large):
        yardstick = measure_torch(OPERATOR, make_problem(OPERATOR, case.sizes, dtype, "cpu"))
        for backend in ("cpu", "triton", "reference"):
            # Interpreted, of the 16-bit types what their loads and stores need.
            fits = case.tiny and (dtype == torch.float32 or case.quick)
            if backend == "triton" and (dtype == torch.float64 or not fits):
                continue
            outcome = check(OPERATOR, backend, dtype, case, "cpu", yardstick)
            assert not outcome.failures, (backend, case.name, outcome.failures)
            assert outcome.skipped is None
            gradients[backend] += outcome.gradients
    cases = [case for case in OPERATOR.cases if not case.large]
    assert gradients["cpu"] == gradients["reference"] == len(cases)
    # Triton has a part in the gradient where there is dropout.
    assert gradients["triton"] == {torch.float32: 4, torch.float64: 0}.get(dtype, 1)


@pytest.mark.parametrize("instruction_set", ["avx2", "generic"])
def test_narrower_instruction_sets(instruction_set: str) -> None:
    expect_verified(instruction_set, "embedding", "--quick")


@pytest.fixture
def kernel() -> Iterator[None]:
    """The CPU's, for sizes too that go to torch."""
    with fastseq.use_backend("cpu"):
        yield


def ids_and_tables(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    ids = torch.tensor([[1, 4, 0, 4], [2, 2, 2, 0]])
    return ids, [torch.randn(n, 3, dtype=dtype, requires_grad=True) for n in (5, 6, 2)]


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_of_sorted_sums_are_those_of_the_kernel(p: float) -> None:
    """The backward that a GPU runs, torch's, against the CPU's kernel."""
    from fastseq.ops.embedding import backward_op

    ids = torch.randint(0, 7, (5, 9))
    seed = torch.tensor([3]) if p else None
    for positions, segments in ((None, None), (torch.randint(0, 20, (9,)), ids % 2)):
        arguments = (
            *(torch.randn(5, 9, 24), ids, positions, segments, 2, 3.0, p, seed),
            *([8, 20, 2], 5, [True, True, segments is not None]),
        )
        results = []
        for backend in ("cpu", "torch", "reference"):
            with fastseq.use_backend(backend):
                results.append(backward_op(*arguments))
        assert not results[0][0][[5, 7]].any()
        for other in results[1:]:
            for ours, theirs in zip(results[0], other, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_sorted_sums_take_no_key_that_is_out_of_range() -> None:
    """On a GPU nobody has looked at the keys: such a row adds to nothing."""
    from fastseq.ops.embedding import backward_op

    grad = torch.randn(1, 6, 4)
    ids = torch.tensor([[0, -1, 3, 2**40, 2, -(2**40)]])
    with fastseq.use_backend("torch"):
        token, position, _ = backward_op(
            *(grad, ids, ids, None, 0, 1.0, 0.0, None, [3, 3, 0], -1, [True, True, False])
        )
    expected = torch.stack((grad[0, 0], torch.zeros(4), grad[0, 4]))
    assert torch.equal(token, expected)
    assert torch.equal(position, expected)


def test_rows_of_keys_out_of_range_are_nan_in_the_triton_kernel() -> None:
    from fastseq.kernels import embedding

    table = torch.randn(3, 20)
    ids = torch.tensor([[0, 3, 2, -1, 2**40]])
    positions = torch.tensor([0, 1, 9, 2, 1])
    output = torch.empty(1, 5, 20)
    embedding.forward(table, table, None, ids, positions, None, 0, 1.0, None, 0, 1.0, output)
    assert torch.equal(output[0, 0], 2 * table[0])
    assert output[0, 1:].isnan().all()


@pytest.mark.usefixtures("kernel")
def test_derivatives_of_every_order() -> None:
    ids, tables = ids_and_tables()

    def function(token: Tensor, position: Tensor, segment: Tensor) -> Tensor:
        output = token_position_embedding(
            *(ids, token, position, None, segment, ids % 2), scale=1.5, offset=1, padding_idx=0
        )
        return output.pow(3)

    token, position, segment = tables
    # The row of padding takes part and has no gradient, so it is none of the numbers moved.
    rest = token.detach()[1:].requires_grad_()

    def of_rest(rest: Tensor, position: Tensor, segment: Tensor) -> Tensor:
        return function(torch.cat((token.detach()[:1], rest)), position, segment)

    assert torch.autograd.gradcheck(of_rest, (rest, position, segment), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(of_rest, (rest, position, segment))
    (grad,) = torch.autograd.grad(function(token, position, segment).sum(), token)
    assert not grad[0].any()
    assert grad[1:].any(1).tolist() == [True, True, False, True]


@pytest.mark.usefixtures("kernel")
def test_under_torch_func() -> None:
    ids, (token, position, _) = ids_and_tables()
    expected = token_position_embedding(ids, token, position)
    by_row = torch.func.vmap(lambda row: token_position_embedding(row, token, position))(ids)
    torch.testing.assert_close(by_row, expected)
    grad = torch.func.grad(lambda t: token_position_embedding(ids, t, position).square().sum())
    expected.square().sum().backward()
    torch.testing.assert_close(grad(token), token.grad)


@pytest.mark.usefixtures("kernel")
def test_a_batch_has_the_rows_of_its_sequences() -> None:
    ids = torch.randint(0, 50, (6, 12))
    token, position = torch.randn(50, 70), torch.randn(20, 70)
    whole = token_position_embedding(ids, token, position)
    assert torch.equal(token_position_embedding(ids[2:4], token, position), whole[2:4])
    steps = [
        token_position_embedding(ids[:, i : i + 1], token, position, offset=i) for i in range(12)
    ]
    assert torch.equal(torch.cat(steps, 1), whole)
    each = torch.arange(12).expand(6, 12)
    assert torch.equal(token_position_embedding(ids, token, position, each), whole)


IDS, TABLES = torch.tensor([[1, 4, 0], [2, 2, 0]]), ids_and_tables(torch.float32)[1]
TOKEN, POSITION, SEGMENT = (table.detach() for table in TABLES)


def embed(ids: Tensor = IDS, **changed: Any) -> Tensor:
    return token_position_embedding(
        **{"ids": ids, "token_table": TOKEN, "position_table": POSITION, **changed}
    )


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: embed(IDS + 1), IndexError, r"ids must be in \[0, 5\), got 5 at position 1"),
    (lambda: embed(IDS - 1), IndexError, r"ids must be in \[0, 5\), got -1 at position 2"),
    (lambda: embed(positions=IDS + 2), IndexError, r"positions.*\[0, 6\), got 6 at position 1"),
    (
        lambda: embed(segment_table=SEGMENT, segments=IDS),
        IndexError,
        r"segments must be in \[0, 2\), got 4 at position 1",
    ),
    (lambda: embed(offset=4), IndexError, "4 to 6 are not all in a table of 6"),
    (lambda: embed(offset=-1), IndexError, "-1 to 1"),
    (lambda: embed(IDS[0, 0]), RuntimeError, "got a scalar"),
    (lambda: embed(IDS.float()), RuntimeError, "ids must be int64 or int32"),
    (lambda: embed(positions=IDS[:1]), RuntimeError, r"positions must be \[3\] or \[2, 3\]"),
    (lambda: embed(segments=IDS), RuntimeError, "segments needs segment_table"),
    (lambda: embed(segment_table=SEGMENT), RuntimeError, "segment_table needs segments"),
    (lambda: embed(token_table=TOKEN[0]), RuntimeError, r"token_table must be \[rows, D\]"),
    (lambda: embed(token_table=TOKEN[0, 0]), RuntimeError, r"token_table must be \[rows, D\]"),
    (lambda: embed(token_table=TOKEN.long()), RuntimeError, "token_table must be fp32"),
    (lambda: embed(position_table=POSITION[:, 1:]), RuntimeError, r"\[rows, 3\], got \[6, 2\]"),
    (lambda: embed(position_table=POSITION.half()), RuntimeError, "position_table.*float16"),
    (lambda: embed(IDS.to("meta")), RuntimeError, "ids must be on token_table's device cpu"),
    (lambda: embed(padding_idx=5), ValueError, r"padding_idx must be in \[-5, 5\), got 5"),
    (lambda: embed(dropout_p=1.5), ValueError, "dropout_p must be between 0 and 1"),
    (lambda: TokenPositionEmbedding(5, 4, 9)(IDS, segments=IDS), RuntimeError, "without num_seg"),
    (lambda: TokenPositionEmbedding(5, 4, 9, num_segments=2)(IDS), RuntimeError, "with num_seg"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_bad_input(
    backend: str, call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with fastseq.use_backend(backend), pytest.raises(error, match=message):
        call()


def test_an_empty_table_has_no_rows_to_read() -> None:
    """Nor has it an address: the kernel took it for a table that was not given."""
    with fastseq.use_backend("cpu"), pytest.raises(IndexError, match=r"ids must be in \[0, 0\)"):
        embed(token_table=TOKEN[:0])


# --- the module ----------------------------------------------------------------------------------


def by_hand(module: TokenPositionEmbedding, ids: Tensor, segments: Tensor | None) -> Tensor:
    rows = module.scale * module.token.weight[ids] + module.position.weight[: ids.shape[-1]]
    return rows if segments is None else rows + module.segment.weight[segments]  # type: ignore[union-attr]


def test_small_calls_go_to_torch_and_say_so() -> None:
    module = TokenPositionEmbedding(40, 100, 64)
    for rows, backends in ((4, ["torch"]), (8, ["cpu"])):
        with recorded() as decisions:
            module(torch.randint(0, 40, (rows, 64)))
        assert [decision.backend for decision in decisions] == backends


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("segments", [False, True])
def test_module(segments: bool, backend: str) -> None:
    module = TokenPositionEmbedding(11, 8, 6, padding_idx=0, scale=2.0, num_segments=2 * segments)
    ids = torch.randint(1, 11, (3, 5))
    kinds = ids % 2 if segments else None
    expected = by_hand(module, ids, kinds)
    with fastseq.use_backend(backend):
        output = module(ids, segments=kinds)
    torch.testing.assert_close(output, expected)
    upstream = torch.randn_like(output)
    ours = torch.autograd.grad(output, list(module.parameters()), upstream)
    theirs = torch.autograd.grad(expected, list(module.parameters()), upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    names = {"token.weight", "position.weight", *(["segment.weight"] if segments else [])}
    assert set(module.state_dict()) == names


def test_dropout_in_training_only() -> None:
    module = TokenPositionEmbedding(11, 40, 6, dropout=0.5)
    ids = torch.randint(0, 11, (3, 5))
    torch.manual_seed(1)
    output = module(ids)
    assert 0.3 < float((output == 0).float().mean()) < 0.7
    torch.manual_seed(1)
    assert torch.equal(module(ids), output)
    assert not (module.eval()(ids) == 0).any()


def max_norm(module: TokenPositionEmbedding) -> None:
    module.token.max_norm = 0.5


def sparse(module: TokenPositionEmbedding) -> None:
    module.token.sparse = True


def hook(module: TokenPositionEmbedding) -> None:
    module.token.register_forward_hook(lambda module, args, output: 3 * output)


def parametrized(module: TokenPositionEmbedding) -> None:
    nn.utils.parametrizations.weight_norm(module.token)


def adapter(module: TokenPositionEmbedding) -> None:
    class Adapter(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + 1

    module.token = Adapter(11, 8)


@pytest.mark.parametrize("change", [max_norm, sparse, hook, parametrized, adapter])
def test_parts_that_were_changed_are_called(
    change: Callable[[TokenPositionEmbedding], None],
) -> None:
    torch.manual_seed(0)
    module = TokenPositionEmbedding(11, 8, 6, num_segments=2)
    ids, positions = torch.randint(0, 11, (3, 5)), torch.randint(0, 6, (3, 5))
    with recorded() as decisions, fastseq.use_backend("cpu"):
        before = module(ids, 0, positions, ids % 2)
    assert [decision.op for decision in decisions] == ["_embedding_fwd"]
    change(module)
    expected = (
        module.token(ids)
        + F.embedding(positions, module.position.weight)
        + F.embedding(ids % 2, module.segment.weight)  # type: ignore[union-attr]
    )
    with recorded() as decisions, fastseq.use_backend("cpu"):
        output = module(ids, 0, positions, ids % 2)
    assert decisions == []
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    if change in (max_norm, hook, adapter):
        assert not torch.allclose(output, before)
