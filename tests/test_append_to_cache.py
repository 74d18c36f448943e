"""append_to_cache: where new keys and values go, and what bad input gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import functional
from fastseq.backends import recorded

append = functional.append_to_cache


def problem(
    *, new: int = 3, dtype: torch.dtype = torch.float32, lengths: tuple[int, ...] = (0, 5, 2)
) -> list[Tensor]:
    caches = [torch.randn(3, 2, 9, size, dtype=dtype) for size in (8, 5)]
    rows = [torch.randn(3, 2, new, size) for size in (8, 5)]
    return [*caches, *rows, torch.tensor(lengths)]


def expected(cache: Tensor, rows: Tensor, lengths: Tensor) -> Tensor:
    cache = cache.clone()
    for b, length in enumerate(lengths.tolist()):
        for i in range(min(rows.shape[2], cache.shape[2] - length)):
            cache[b, :, length + i] = rows[b, :, i].to(cache.dtype)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_rows_go_behind_those_that_are_there(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no fp64 kernel")
    key_cache, value_cache, key, value, lengths = problem(dtype=dtype)
    wanted = expected(key_cache, key, lengths), expected(value_cache, value, lengths)
    versions = key_cache._version, value_cache._version
    with fastseq.use_backend(backend), recorded() as decisions:
        new = append(key_cache, value_cache, key, value, lengths)
    assert [d.backend for d in decisions] == ["torch" if backend == "auto" else "triton"]
    torch.testing.assert_close((key_cache, value_cache), wanted, rtol=0, atol=0)
    assert new.tolist() == [3, 8, 5]
    assert lengths.tolist() == [0, 5, 2]
    assert (key_cache._version, value_cache._version) > versions


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_any_strides_and_what_has_no_room(backend: str) -> None:
    """On a GPU nobody looks at the lengths: the op leaves out what is past the end."""
    from fastseq.ops.append_to_cache import append_op

    _, _, key, value, _ = problem(new=4)
    caches = [torch.randn(3, 9, 2, size).transpose(1, 2) for size in (8, 5)]
    key = key.transpose(2, 3).contiguous().transpose(2, 3)
    lengths = torch.tensor([7, 9, 5], dtype=torch.int32)
    wanted = expected(caches[0], key, lengths), expected(caches[1], value, lengths)
    with fastseq.use_backend(backend):
        new = append_op(*caches, key, value, lengths)
    torch.testing.assert_close(tuple(caches), wanted, rtol=0, atol=0)
    assert new.tolist() == [9, 9, 9]
    assert new.dtype == torch.int32


@pytest.mark.parametrize("new", [0, 3])
def test_it_decodes_as_the_whole_sequence(new: int) -> None:
    key_cache, value_cache, key, value, lengths = problem(new=new)
    query = torch.randn(3, 4, new, 8)
    filled = append(key_cache, value_cache, key, value, lengths)
    output = functional.attention(
        query,
        key_cache,
        value_cache,
        key_lengths=filled,
        causal=True,
        causal_alignment="bottom_right",
    )
    for b, length in enumerate(filled.tolist()):
        one = functional.attention(
            query[b],
            key_cache[b, :, :length],
            value_cache[b, :, :length],
            causal=True,
            causal_alignment="bottom_right",
        )
        torch.testing.assert_close(output[b], one)


def test_the_op_keeps_the_contract_and_compiles() -> None:
    arguments = problem()
    torch.library.opcheck(torch.ops.fastseq._append_to_cache.default, tuple(arguments))
    compiled = torch.compile(append, fullgraph=True, backend="aot_eager")
    eager = [tensor.clone() for tensor in arguments]
    assert torch.equal(compiled(*arguments), append(*eager))
    for ours, theirs in zip(arguments, eager, strict=True):
        assert torch.equal(ours, theirs)


BAD = [
    ({"lengths": torch.tensor([0, 7, 2])}, IndexError, "lengths must be between 0 and 6.*0 to 7"),
    ({"lengths": torch.tensor([0, -1, 2])}, IndexError, "got -1 to 2"),
    (
        {"key_cache": torch.zeros(3, 2, 0, 8), "value_cache": torch.zeros(3, 2, 0, 5)},
        IndexError,
        "key_cache has room for 0 tokens, got 3 more",
    ),
    ({"lengths": torch.tensor([0.0, 1, 2])}, RuntimeError, "lengths must be int32 or int64"),
    ({"key": torch.zeros(3, 2, 3, 7)}, RuntimeError, r"key must be \[3, 2, 3, 8\].*3, 7"),
    ({"value": torch.zeros(3, 2, 2, 5)}, RuntimeError, "value must be"),
    ({"value_cache": torch.zeros(3, 2, 8, 5)}, RuntimeError, "value_cache must be"),
    ({"key": torch.zeros(3, 2, 3, 8, requires_grad=True)}, RuntimeError, "no gradient"),
    ({"key_cache": torch.zeros(3, 2, 9, 8, dtype=torch.int64)}, RuntimeError, "floating point"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    names = ("key_cache", "value_cache", "key", "value", "lengths")
    arguments = dict(zip(names, problem(), strict=True)) | change
    with pytest.raises(error, match=message):
        append(**arguments)
