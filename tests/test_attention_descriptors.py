"""Attention's tiles through tensor descriptors: interpreted, the same bits as through pointers.

What they compile to is in ``tests/codegen``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import fastseq
from fastseq import functional
from fastseq.kernels import attention, attention_backward, attention_launch, common
from fastseq.testing import OPERATORS, Case, make_problem, run
from fastseq.testing.operators import identical

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Inf - Inf


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Turns descriptors on in every launch, and says of each whether its rows allowed them."""
    found: list[bool] = []
    describable = attention_launch.describable

    def asked(*tensors: Tensor) -> bool:
        found.append(describable(*tensors))
        return found[-1]

    monkeypatch.setattr(attention_launch, "describable", asked)
    for module, name in (
        (attention, "forward_launch"),
        (attention_backward, "kv_launch"),
        (attention_backward, "q_launch"),
    ):
        launch = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, launch=launch: replace(launch(*a), descriptors=True)
        )
    return found


def by_pointers_and_by_descriptors(
    name: str, case: Case, dtype: torch.dtype, request: pytest.FixtureRequest
) -> list[bool]:
    problem = make_problem(OPERATORS[name], case.sizes, dtype, CPU)
    with fastseq.use_backend("triton"):
        pointers = run(OPERATORS[name].ours, problem)
        found: list[bool] = request.getfixturevalue("described")
        descriptors = run(OPERATORS[name].ours, problem)
    assert identical(pointers, descriptors) is None
    return found


GROUPS = Case(
    "groups, causal",
    {"batch": 1, "heads": 2, "key_heads": 1, "lengths": (40, 17), "causal": True},
)
EMPTY = next(c for c in OPERATORS["attention_packed"].cases if c.name == "some are empty")


@pytest.mark.parametrize(
    ("name", "case", "dtype"),
    [
        pytest.param("attention", GROUPS, torch.bfloat16, id="groups"),
        pytest.param("attention_packed", EMPTY, torch.float32, id="packed"),
    ],
)
def test_the_same_to_the_bit(
    name: str, case: Case, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    found = by_pointers_and_by_descriptors(name, case, dtype, request)
    assert found == [True, True, True]  # forward, keys and values, queries


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.name}")
        for name in ("attention", "attention_bias", "attention_packed")
        for case in OPERATORS[name].cases
        if case.tiny
    ],
)
def test_the_same_to_the_bit_in_every_case(
    name: str, case: Case, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if dtype not in case.dtypes:
        pytest.skip("not a case of this dtype")
    by_pointers_and_by_descriptors(name, case, dtype, request)


@pytest.mark.parametrize("layout", ["sliced", "odd stride"])
def test_rows_that_the_engine_does_not_take_go_by_pointers(
    layout: str, request: pytest.FixtureRequest
) -> None:
    """Rows 48 bytes apart are taken, with gaps between; rows 34 bytes apart are not."""
    wide = {"head_dim": 17} if layout == "odd stride" else {"head_dim": 16, "layout": "sliced"}
    case = Case(layout, {"batch": 1, "lengths": (5, 20), "differentiable": (), **wide})
    found = by_pointers_and_by_descriptors("attention", case, torch.bfloat16, request)
    assert set(found) == {layout == "sliced"}


def test_rows_of_the_next_sequence_do_not_leak(described: list[bool]) -> None:
    """A tile at a sequence's end must not read on into rows that are another's, or nobody's."""
    starts = torch.tensor([0, 9, 21])
    leaves = [torch.randn(30, 2, 16) for _ in range(3)]
    for leaf in leaves:
        leaf[21:] = math.nan
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with fastseq.use_backend("triton"):
        output = functional.attention(*leaves, cu_seqlens_q=starts, cu_seqlens_k=starts)
        assert isinstance(output, Tensor)
        grads = torch.autograd.grad(output[:21].square().sum(), leaves)
    assert described == [True, True, True]
    for b, (start, stop) in enumerate(((0, 9), (9, 21))):
        alone = [
            leaf.detach()[start:stop].transpose(0, 1)[None].requires_grad_() for leaf in leaves
        ]
        expected = torch.nn.functional.scaled_dot_product_attention(*alone)
        torch.testing.assert_close(output[start:stop], expected[0].transpose(0, 1), msg=str(b))
        theirs = torch.autograd.grad(expected.square().sum(), alone)
        for ours, their in zip(grads, theirs, strict=True):
            torch.testing.assert_close(ours[start:stop], their[0].transpose(0, 1))


def test_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off, but for the environment variable; older architectures have no engine."""
    assert (
        attention.forward_launch(64, 64, 2, False, 90).descriptors == attention_launch.DESCRIPTORS
    )
    tensor = torch.empty(1, 1, 4, 64)
    assert attention_launch.describable(tensor)
    monkeypatch.setattr(attention_launch, "device_of", lambda t: common.Device(80, 108))
    assert not attention_launch.describable(tensor)


def test_triton_has_the_callers_allocator_again() -> None:
    """Launches bring memory for descriptors of their own, on whatever thread."""
    allocation = attention_launch._allocation
    before = allocation._allocator.get()
    with attention_launch.descriptor_memory(torch.empty(1)):
        made = allocation._allocator.get()(256, 128, None)
        assert (made.numel(), made.dtype) == (256, torch.int8)
    assert allocation._allocator.get() is before
