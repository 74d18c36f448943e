"""The attention family: every backend against the fp64 oracle, autograd, transforms, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from fastseq import functional
from fastseq.backends import recorded
from fastseq.functional.attention import prepared
from fastseq.ops import attention_blockwise as blockwise
from fastseq.testing import BOUND, OPERATORS, Case, make_problem, measure_torch, run
from fastseq.testing.attention import OPERATORS as FAMILY
from fastseq.testing.attention import torch_attention
from fastseq.testing.check import check

from .ladder import (
    CPU,
    DTYPES,
    INSTRUCTION_SETS,
    by_threads,
    cases,
    expect_pass,
    expect_same_bits,
    expect_verified,
    in_a_process,
)

NAMES = [operator.name for operator in FAMILY]
attention, sdpa = functional.attention, functional.scaled_dot_product_attention
KERNELS = ["cpu", "triton", "torch", "reference"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    """By choice, which is the C++ rows but for fp64 and what torch serves."""
    expect_pass(name, "auto", dtype, cases(name, tiny=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_other_candidates(name: str, dtype: torch.dtype) -> None:
    for backend in ("torch", "reference"):
        expect_pass(name, backend, dtype, cases(name, tiny=True, quick=True))
    if dtype != torch.float64 and name == "scaled_dot_product_attention":
        expect_pass(name, "cpu", dtype, cases(name, tiny=True))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_plain_calls_of_torch_run_its_flash_kernel(dtype: torch.dtype) -> None:
    """Without lse, whose gradient it does not have; by themselves they run ours, but for few."""

    def only_output(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **arguments: {"output": function(**arguments)["output"]}

    operator = replace(
        OPERATORS["attention"],
        ours=lambda **arguments: {"output": attention(**arguments)},
        torch=only_output(torch_attention),
    )
    names = ("plain", "causal", "groups", "cross", "transposed", "rows apart", "scale", "113 x 203")
    for case in cases("attention", tiny=False):
        if case.name in names and dtype in case.dtypes:
            outcome = check(operator, "torch", dtype, case, CPU)
            assert not outcome.failures, (case.name, outcome.failures)
            assert outcome.ran == {"_attention_fwd": "torch", "_attention_bwd": "torch"}
            problem = make_problem(operator, case.sizes, dtype, CPU)
            arguments, _ = prepared("attention", **problem.arguments, **problem.options)
            with torch.no_grad():
                torch.library.opcheck(
                    torch.ops.fastseq._attention_fwd.default,
                    tuple(arguments),
                    test_utils=("test_schema", "test_faketensor"),
                )
                with recorded() as decisions:
                    attention(**problem.arguments, **problem.options)
            if dtype == torch.float32:  # few, with nothing to record: no op
                assert [d.op for d in decisions] == ["attention"]


def expect_near(name: str, backend: str, dtype: torch.dtype, case: Case) -> None:
    """As near the truth as torch's, in one run: the interpreter needs a second for each."""
    operator = OPERATORS[name]
    yardstick = measure_torch(operator, make_problem(operator, case.sizes, dtype, CPU))
    with fastseq.use_backend(backend):
        ratios = yardstick.ratios(run(operator.ours, yardstick.problem))
    bad = {result: pair for result, pair in ratios.items() if max(pair) > BOUND}
    assert not bad, (name, case.name, bad)


#: By the interpreter in every test run: each feature together with some others, and in bf16 those
#: that change the way through a kernel. The rest of the pairwise cover is slow.
INTERPRETED = [
    *(
        ("attention", torch.float32, case)
        for case in [c for c in cases("attention", tiny=True) if "+" in c.name][::2]
    ),
    *(
        (name, dtype, case)
        for name, dtype, names in (
            (
                "attention",
                torch.float32,
                (
                    "plain",
                    "no keys",
                    "no batch",
                    "65 x 65",
                    "head_dim 59",
                    "one query, chunks",
                    "two queries, chunks",
                ),
            ),
            ("attention", torch.bfloat16, ("causal", "mask", "groups")),
            ("attention_bias", torch.float32, ("over heads", "over queries", "with all")),
            ("attention_bias", torch.bfloat16, ("over the batch",)),
            ("attention_packed", torch.float32, ("cross", "some are empty")),
        )
        for case in cases(name, tiny=True)
        if case.name in names
    ),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Inf - Inf in the interpreter
@pytest.mark.parametrize(
    ("name", "dtype", "case"),
    [pytest.param(*point, id=f"{point[0]}-{point[1]}-{point[2].name}") for point in INTERPRETED],
)
def test_triton_kernels_interpreted(name: str, dtype: torch.dtype, case: Case) -> None:
    expect_near(name, "triton", dtype, case)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_kernels_keep_the_contract() -> None:
    """The same to the bit in two runs, in poisoned memory, and without half the batch."""
    names = ("causal", "over the batch", "causal")
    for name, wanted in zip(NAMES, names, strict=False):
        expect_pass(
            name, "triton", torch.float32, [c for c in cases(name, tiny=True) if c.name == wanted]
        )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_triton_kernels_interpreted_all(name: str, dtype: torch.dtype) -> None:
    expect_pass(name, "triton", dtype, cases(name, tiny=True))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.slow
def test_every_instruction_set(instruction_set: str) -> None:
    expect_verified(instruction_set, "attention", "--quick")


def small(*, length: int = 9, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 2, length, 8, dtype=dtype) for _ in range(3)]


# --- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_blocks_of_queries_give_what_the_whole_gives(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into blocks of 16 queries and a head at a time."""
    q = torch.randn(2, 4, 70, 8, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, 2, 50, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, 4, 70, 50, dtype=dtype, requires_grad=True)
    seed = torch.tensor([77])
    grad = torch.randn(2, 4, 70, 8, dtype=dtype)

    def several() -> list[Tensor]:
        results = []
        for options in (
            {"window": (20, 5), "causal_alignment": "bottom_right"},
            {"causal": True, "mask": torch.ones(2, 1, 1, 50).bool(), "softcap": 3.0},
            {"key_lengths": torch.tensor([50, 13]), "sinks": torch.ones(4)},
        ):
            output = attention(q, k, v, bias=bias, dropout_p=0.2, seed=seed, **options)
            results += [output, *torch.autograd.grad(output, (q, k, v, bias), grad)]
        return results

    with fastseq.use_backend("torch"):
        whole = several()
        monkeypatch.setitem(blockwise.BLOCK_ELEMENTS, "cpu", 16 * 50)
        blocks = several()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(blocks, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


#: Of heads, lengths, widths: more than a task of queries and two tiles of keys, a few beyond; more
#: than four tiles; widths of one, some and no whole panels.
TILED = [(4, 2, 583, 515, 40, 24), (1, 1, 97, 1030, 17, 130), (2, 2, 300, 257, 64, 64)]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("sizes", TILED, ids=str)
def test_tiles_give_what_the_products_of_the_library_give(
    sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """At the edges of tiles, blocks and tasks, which short rows do not reach."""
    heads, key_heads, queries, keys, width, value_width = sizes
    q = torch.randn(2, heads, queries, width)
    k = torch.randn(2, key_heads, keys, width)
    v = torch.randn(2, key_heads, keys, value_width)
    bias = torch.randn(1, 1, queries, keys)
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v, bias)]
    grad = torch.randn(2, heads, queries, value_width).to(dtype)
    seed = torch.tensor([77])
    for options in (
        {},
        {"window": (130, 70), "causal_alignment": "bottom_right", "softcap": 3.0},
        {"causal": True, "dropout_p": 0.2, "seed": seed, "sinks": torch.ones(heads)},
        {"mask": torch.rand(2, 1, 1, keys) < 0.6, "alibi_slopes": torch.rand(heads) / 50},
    ):
        made = []
        for backend in ("cpu", "torch"):
            with fastseq.use_backend(backend):
                output, lse = attention(*leaves[:3], bias=leaves[3], return_lse=True, **options)
                made.append((output, lse, *torch.autograd.grad(output, leaves, grad)))
        for ours, theirs in zip(*made, strict=True):
            seen = theirs.isfinite()
            assert torch.equal(ours.isfinite(), seen)
            off = (ours - theirs)[seen].double().norm() / theirs[seen].double().norm()
            assert off <= (1e-5 if dtype == torch.float32 else 2e-2)


def test_memory_does_not_grow_with_the_square() -> None:
    """Of 1 x 4 x 2048 the scores alone would be 67 MB; fastseq's largest tensor is a block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.elements = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes() // 4)
            return result

    q, k, v = (torch.randn(1, 4, 2048, 16, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        sdpa(q, k, v, dropout_p=0.1).sum().backward()
    assert largest.elements <= blockwise.BLOCK_ELEMENTS["cpu"]


def test_results_do_not_depend_on_threads() -> None:
    q, k, v = (torch.randn(2, 4, 600, 32, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 1, 600, 600, requires_grad=True)
    seed, grad = torch.tensor([5]), torch.randn(2, 4, 600, 32)

    def call() -> list[Tensor]:
        with torch.no_grad():
            few = attention(q[:, :, :1], k, v)
        output = attention(q, k, v, bias=bias, dropout_p=0.2, seed=seed, causal=True)
        return [few, output, *torch.autograd.grad(output, (q, k, v, bias), grad)]

    with fastseq.use_backend("cpu"):
        expect_same_bits(by_threads(call))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_large_delta_costs_no_precision(backend: str) -> None:
    """Where all values and gradients have a mean, ds is a small difference of large numbers, and
    probabilities that add up to 1 but for lse's rounding would show in it."""
    torch.manual_seed(1)
    tensors = [torch.randn(2, 4, 200, 16) * 0.1 for _ in range(2)]
    tensors += [torch.randn(2, 4, 200, 16) + 3]
    grad = torch.randn(2, 4, 200, 16) + 1

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        found = torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))
        return [tensor.double() for tensor in found]

    def probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / 4, -1) @ v

    exact = gradients(probabilities, torch.float64)
    theirs = gradients(probabilities, torch.float32)
    with fastseq.use_backend(backend):
        ours = gradients(sdpa, torch.float32)
    for our, their, truth in list(zip(ours, theirs, exact, strict=True))[:2]:
        assert (our - truth).norm() <= 1.5 * (their - truth).norm()


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("backend", ["auto", *KERNELS])
@pytest.mark.parametrize("kind", ["mask", "bias", "causal", "key_lengths", "packed"])
def test_what_is_not_seen_leaks_nothing(backend: str, kind: str) -> None:
    """NaN and Inf in keys and values that are not seen, and in gradients of those that see none."""
    q, k, v = small(length=20)
    poisoned = [t.clone() for t in (q, k, v)]
    grad = torch.randn(2, 2, 20, 8)
    options: dict[str, Any] = {}
    seen = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    if kind in ("mask", "bias"):
        seen = seen & (torch.rand(2, 1, 1, 20) < 0.7)
        seen[..., 0], seen[..., 3], seen[..., 4] = True, False, False
        seen[0, :, 7] = False  # this query sees nothing
        options["mask"] = seen
        if kind == "bias":
            options = {"bias": torch.zeros(seen.shape).masked_fill(~seen, -math.inf)}
        poisoned[1][:, :, 3] = math.nan
        poisoned[2][:, :, 4, 2] = math.inf
    elif kind == "causal":
        seen = seen.tril()
        options["causal"] = True
        poisoned[1][:, :, 15] = math.inf
        poisoned[2][:, :, 12, 3] = math.nan
    elif kind == "key_lengths":
        lengths = torch.tensor([13, 0])
        seen = (torch.arange(20) < lengths[:, None, None, None]).expand(2, 1, 20, 20)
        options["key_lengths"] = lengths
        for tensor in poisoned[1:]:
            tensor[0, :, 13:], tensor[1] = math.nan, math.inf
    else:
        q, k, v, grad = (t[0].transpose(0, 1) for t in (q, k, v, grad))
        poisoned = [t[0].transpose(0, 1).clone() for t in poisoned]
        options["cu_seqlens_q"] = torch.tensor([0, 9, 18])
        options["cu_seqlens_k"] = torch.tensor([0, 12, 15])
        for tensor in poisoned[1:]:
            tensor[15:] = math.nan
    leaves = [t.requires_grad_() for t in poisoned]
    clean = [t.clone().requires_grad_() for t in (q, k, v)]

    def both(tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        with fastseq.use_backend(backend):
            output = attention(*tensors, **options)
            assert isinstance(output, Tensor)
            return (output, *torch.autograd.grad(output, tensors, grad))

    expected, result = both(clean, grad), both(leaves, grad)
    if backend == "auto":  # without gradients torch's own may serve
        inputs = [leaf.detach() for leaf in leaves]
        torch.testing.assert_close(attention(*inputs, **options), result[0], equal_nan=True)
    if kind == "causal":  # queries from 12 on see the NaN
        first = (slice(None), slice(None), slice(0, 12))
        for name, mine, theirs in zip("oq", result, expected, strict=False):
            torch.testing.assert_close(mine[first], theirs[first], msg=name)
        assert result[0][:, :, 12:, 3].isnan().all()
        return
    for mine, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    if kind in ("mask", "bias"):
        assert torch.equal(result[0][0, :, 7], torch.zeros(2, 8))
        assert torch.equal(result[1][0, :, 7], torch.zeros(2, 8))
        spoiled = grad.clone()
        spoiled[0, :, 7] = math.nan
        if backend != "reference":
            for mine, theirs in zip(both(leaves, spoiled), expected, strict=True):
                torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("backend", ["auto", *KERNELS])
def test_a_query_that_sees_nothing_has_no_part_in_itself(backend: str) -> None:
    q, k, v = small()
    q[0, :, 7] = math.nan
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[0, :, 7] = False
    with fastseq.use_backend(backend):
        output = attention(q, k, v, mask=mask)
        assert torch.equal(output[0, :, 7], torch.zeros(2, 8))
        assert torch.equal(sdpa(q, k, v, mask), output)


@pytest.mark.parametrize("backend", KERNELS)
def test_lse_of_nothing(backend: str) -> None:
    q, k, v = small()
    mask = torch.zeros(9, 9, dtype=torch.bool)
    with fastseq.use_backend(backend):
        output, lse = attention(q, k, v, mask=mask, return_lse=True)
        assert torch.equal(output, torch.zeros_like(output))
        assert torch.equal(lse, torch.full((2, 2, 9), -math.inf))
        sinks = torch.tensor([1.5, -math.inf])
        output, lse = attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)
        assert torch.equal(output, torch.zeros_like(output))
        torch.testing.assert_close(lse, sinks[None, :, None].expand(2, 2, 9))


def test_mask_together_with_is_causal_is_both() -> None:
    q, k, v = small()
    mask = torch.rand(2, 1, 9, 9) < 0.6
    both = mask & torch.ones(9, 9, dtype=torch.bool).tril()
    expected = sdpa(q, k, v, attn_mask=both)
    for backend in ("auto", "cpu"):
        with fastseq.use_backend(backend):
            torch.testing.assert_close(sdpa(q, k, v, attn_mask=mask, is_causal=True), expected)


def test_row_of_one_key_has_no_gradient_to_its_score() -> None:
    """Its weight is 1 whatever the score is: 0, not rounding noise, where rows are whole."""
    q, k, v = (t.to(torch.bfloat16).requires_grad_() for t in small(length=1))
    output = attention(q, k, v)
    assert isinstance(output, Tensor)
    for grad in torch.autograd.grad(output, (q, k), torch.randn(2, 2, 1, 8).bfloat16()):
        assert torch.equal(grad, torch.zeros_like(grad))


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
def test_dropout_mask_is_the_python_twins(backend: str) -> None:
    """Values of a unit basis and equal scores: the output is the mask itself."""
    from fastseq.random import keep_mask

    q = k = torch.zeros(2, 3, 20, 4)
    v = torch.eye(20).expand(2, 3, 20, 20)
    seed = torch.tensor([987654321987])
    with fastseq.use_backend(backend):
        output = attention(q, k, v, dropout_p=0.4, seed=seed)
    assert isinstance(output, Tensor)
    assert torch.equal(output != 0, keep_mask(seed, (2, 3, 20, 20), 0.4))
    torch.testing.assert_close(output.max(), torch.tensor(1 / 20 / 0.6))


def test_dropout_goes_by_torchs_generator() -> None:
    q, k, v = small(length=40)
    torch.manual_seed(3)
    first = sdpa(q, k, v, dropout_p=0.5)
    second = sdpa(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(sdpa(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    assert torch.equal(sdpa(q, k, v, dropout_p=1.0), torch.zeros_like(q))


# --- autograd ------------------------------------------------------------------------------------


def test_gradients_are_derivatives() -> None:
    q, k, v = (t[:1].double().requires_grad_() for t in small(length=5))
    bias = torch.randn(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, 5) < 0.7
    mask[2] = False

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=True)

    def rich(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        output, lse = attention(
            q, k, v, bias=bias, sinks=sinks, mask=mask, softcap=2.0, dropout_p=0.3,
            seed=torch.tensor([4]), return_lse=True,
        )  # fmt: skip
        return output, lse

    for backend in ("torch", "reference"):
        with fastseq.use_backend(backend):
            for function, inputs in ((plain, (q, k, v)), (rich, (q, k, v, bias, sinks))):
                assert torch.autograd.gradcheck(
                    function, inputs, check_forward_ad=function is plain
                )
                assert torch.autograd.gradgradcheck(function, inputs)


def test_func_transforms() -> None:
    """grad, vmap, jvp and their compositions give what torch's own function gives."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (t[0] for t in small())
    tangent = torch.randn_like(q)

    def values(function: Callable[..., Tensor]) -> list[Tensor]:
        def loss(q: Tensor) -> Tensor:
            return function(q, k, v).pow(2).sum()

        return [
            torch.func.vmap(lambda q: function(q[None], k[:1], v[:1]))(q),
            torch.func.grad(loss)(q),
            torch.func.jvp(lambda q: function(q, k, v), (q,), (tangent,))[1],
            torch.func.jvp(torch.func.grad(loss), (q,), (tangent,))[1],
            torch.func.hessian(lambda q: function(q, k[:, :2], v[:, :2]).pow(2).sum())(q[:, :2]),
        ]

    mine = values(sdpa)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = values(F.scaled_dot_product_attention)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_torchs_own_samples() -> None:
    """torch's sample inputs for this function, outputs and gradients."""
    from torch.testing._internal.common_methods_invocations import op_db

    (op,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
    seen = 0
    for dtype in (torch.float32, torch.float64):
        for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
            if sample.kwargs.get("dropout_p"):
                continue  # another mask
            theirs = F.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
            leaves = [sample.input, *(t for t in sample.args[:2] if isinstance(t, Tensor))]
            grad = torch.randn_like(theirs)
            expected = torch.autograd.grad(theirs, leaves, grad)
            for backend in ("auto", "torch", "reference"):
                with fastseq.use_backend(backend):
                    ours = sdpa(sample.input, *sample.args, **sample.kwargs)
                    mine = torch.autograd.grad(ours, leaves, grad)
                # Samples go up to 9: scores of some 200 make e^s 1e-5 off; dp, a sum of 8 products
                # up to 81, is some 7e-5 off, and its gradients 9 times that.
                atol = 2e-3 if dtype == torch.float32 else 1e-10
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=atol / 10)
                for a, b in zip(mine, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)
            seen += 1
    assert seen > 10


# --- bad input -----------------------------------------------------------------------------------

X = torch.randn(2, 4, 5, 8)
P = torch.randn(7, 2, 8)
STARTS = torch.tensor([0, 3, 7])
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: sdpa(X, X[..., :7], X), RuntimeError, "key.*head_dim 8, got 7"),
    (lambda: sdpa(X, X, X[:, :, :4]), RuntimeError, "value.*length 5, got 4"),
    (lambda: sdpa(X, X[:, :2], X[:, :2]), RuntimeError, "key.*4 heads, got 2.*enable_gqa"),
    (lambda: sdpa(X, X[:, :3], X[:, :3], enable_gqa=True), RuntimeError, "multiple.*3, got 4"),
    (lambda: sdpa(X, X[:, :2], X, enable_gqa=True), RuntimeError, "value.*2 heads, got 4"),
    (lambda: sdpa(X, X[[0, 1, 0]], X[[0, 1, 0]]), RuntimeError, r"key.*batch \[2\], got \[3\]"),
    (lambda: attention(X, X[:1], X[:1]), RuntimeError, r"key.*batch \[2\], got \[1\]"),
    (lambda: attention(X, X[0], X), RuntimeError, "key must be"),
    (lambda: sdpa(X, X.double(), X), RuntimeError, "key.*dtype.*float64"),
    (lambda: sdpa(X, X, X.to("meta")), RuntimeError, "value.*device"),
    (lambda: sdpa(X.long(), X.long(), X.long()), NotImplementedError, "query.*int64"),
    (lambda: sdpa(X, X, X, dropout_p=1.5), ValueError, "dropout_p.*1.5"),
    (lambda: sdpa(X, X, X, X[:1, :1, :, :4]), RuntimeError, r"attn_mask of shape \[1, 1, 5, 4\]"),
    (lambda: sdpa(X, X, X, torch.ones(5, 5).long()), RuntimeError, "attn_mask.*int64"),
    (lambda: attention(X, X, X, mask=torch.ones(5, 5)), RuntimeError, "mask must be boolean"),
    (lambda: attention(X, X, X, bias=torch.ones(5, 5).bool()), RuntimeError, "bias.*floating"),
    (lambda: attention(X, X, X, bias=torch.ones(5, 4)), RuntimeError, r"bias of shape \[5, 4\]"),
    (lambda: attention(X, X, X, window=(-1, 0)), ValueError, "window.*negative"),
    (lambda: attention(X, X, X, softcap=0.0), ValueError, "softcap.*0.0"),
    (lambda: attention(X, X, X, softcap=-1.0), ValueError, "softcap.*-1.0"),
    (lambda: attention(X, X, X, causal_alignment="left"), ValueError, "causal_alignment.*'left'"),
    (lambda: attention(X, X, X, alibi_slopes=torch.ones(3)), RuntimeError, r"alibi_slopes.*\[3\]"),
    (
        lambda: attention(X, X, X, alibi_slopes=torch.ones(4, requires_grad=True)),
        RuntimeError,
        "alibi_slopes takes no gradient",
    ),
    (lambda: attention(X, X, X, sinks=torch.ones(2, 4)), RuntimeError, r"sinks.*\[2, 4\]"),
    (lambda: attention(X, X, X, key_lengths=torch.ones(2)), RuntimeError, "key_lengths.*int"),
    (lambda: attention(X, X, X, key_lengths=torch.ones(3).int()), RuntimeError, "key_lengths"),
    (
        lambda: attention(X, X, X, dropout_p=0.1, seed=torch.tensor(1)),
        RuntimeError,
        r"seed.*\[1\].*\[\]",
    ),
    (lambda: functional.attention_weights(X, X, reduce="mean"), ValueError, "reduce.*'mean'"),
    (lambda: functional.attention_weights(X, X, reduce="top_k", k=6), ValueError, "k must.*6"),
    (lambda: attention(P, P, P, cu_seqlens_q=STARTS), RuntimeError, "cu_seqlens_k is None"),
    (
        lambda: attention(X, X, X, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS),
        RuntimeError,
        r"query must be \[total, H, D\]",
    ),
    (
        lambda: attention(P, P, P, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS + 1),
        ValueError,
        r"cu_seqlens_k.*7 at most, got \[1, 4, 8\]",
    ),
    (
        lambda: attention(P, P, P, cu_seqlens_q=STARTS.flip(0), cu_seqlens_k=STARTS),
        ValueError,
        "cu_seqlens_q must ascend",
    ),
    (
        lambda: attention(P, P, P, cu_seqlens_q=STARTS[:2], cu_seqlens_k=STARTS),
        RuntimeError,
        "cu_seqlens_k.*shape",
    ),
    (
        lambda: attention(P, P, P, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS.float()),
        RuntimeError,
        "cu_seqlens_k.*float32",
    ),
    (
        lambda: attention(
            P, P, P, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS, mask=torch.ones(7) > 0
        ),
        RuntimeError,
        "mask must be None",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch", "reference"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("which", [1, 2])
def test_few_queries_see_nothing_of_what_a_mask_hides(backend, poison, which):
    """The CPU's decoding kernel multiplies hidden values by 0."""
    tensors = [torch.randn(2, 4, length, 16) for length in (3, 5, 5)]
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[:, 4] = False
    with fastseq.use_backend(backend):
        expected = functional.scaled_dot_product_attention(*tensors, mask)
        tensors[which][:, :, 4] = poison
        torch.testing.assert_close(
            functional.scaled_dot_product_attention(*tensors, mask), expected
        )


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("queries", [300, 3], ids=["tiles", "decoding"])
def test_nan_scores_are_not_hidden_ones(queries: int, dtype: torch.dtype) -> None:
    """What is NaN comes out as NaN, and not as the zeros of a query that sees nothing."""
    q = torch.randn(1, 2, queries, 16, dtype=dtype)
    k, v = (torch.randn(1, 2, 700, 16, dtype=dtype) for _ in range(2))
    q[0, 0, 1] = math.nan
    k[0, 1, 690] = math.nan
    mask = torch.ones(queries, 700, dtype=torch.bool)
    mask[2] = False
    mask[2, 690] = True  # nothing but NaN, among keys that are hidden
    mask[0, 690] = False
    expected = torch.zeros(1, 2, queries, dtype=torch.bool)
    expected[0, 0, 1] = True
    expected[0, 1] = mask[:, 690]
    with fastseq.use_backend("cpu"):
        output = attention(q, k, v, mask=mask)
        everywhere = attention(q, k, v)
        assert attention(q, torch.full_like(k, math.nan), v).isnan().all()
    assert torch.equal(output.isnan().any(-1), expected)
    expected[0, 1] = True
    assert torch.equal(everywhere.isnan().any(-1), expected)


BESIDE = """
import torch
import fastseq
from fastseq.functional import attention

q, k, v = (torch.randn(1, 1, 384, 64).bfloat16().requires_grad_() for _ in range(3))
with fastseq.use_backend("cpu"):
    attention(q, k, v, window=(100, 0)).sum().backward()
others = [torch.randn(100000) for _ in range(50)]
"""


def test_backward_of_a_window_writes_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block's keys begin inside a tile: with memory that has neighbours on the heap, whose
    books malloc checks when it is freed."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    in_a_process(BESIDE, "")


@pytest.mark.parametrize("queries", [17, 2], ids=["tiles", "decoding"])
def test_a_window_as_large_as_integers_get(queries: int) -> None:
    q, k, v = torch.randn(1, 1, queries, 8), *torch.randn(2, 1, 1, 17, 8)
    most = (1 << 63) - 1
    for backend in ("cpu", "torch", "reference"):
        with fastseq.use_backend(backend):
            expected = attention(q, k, v)
            assert torch.equal(attention(q, k, v, window=(most, most)), expected), backend
