"""scaled_dot_product_attention as torch has it: shapes, masks, autocast, subclasses, nesting."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from fastseq import functional
from fastseq.backends import recorded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
attention, sdpa = functional.attention, functional.scaled_dot_product_attention


def small(*, length: int = 9, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 2, length, 8, dtype=dtype) for _ in range(3)]


def test_leading_dimensions_broadcast_as_torchs() -> None:
    q = torch.randn(2, 3, 9, 8)
    for k in (torch.randn(7, 8), torch.randn(3, 7, 8), torch.randn(2, 1, 7, 8)):
        with fastseq.use_backend("cpu"):
            torch.testing.assert_close(sdpa(q, k, k), F.scaled_dot_product_attention(q, k, k))
            torch.testing.assert_close(
                sdpa(q[0, 0], k, k), F.scaled_dot_product_attention(q[0, 0], k, k)
            )


def test_leading_dimensions() -> None:
    for leading in ((), (3,), (2, 3)):
        q, k, v = (torch.randn(*leading, 2, 9, 8) for _ in range(3))
        mask = torch.rand(*leading, 1, 9, 9) < 0.8
        for given in (None, mask, torch.rand(9, 9) < 0.8):
            expected = F.scaled_dot_product_attention(q, k, v, given)
            with fastseq.use_backend("cpu"):
                torch.testing.assert_close(sdpa(q, k, v, given), expected)


def test_masks_of_fewer_dimensions() -> None:
    q, k, v = small()
    for shape in ((9,), (1, 9), (9, 1), (2, 1, 1), (2, 1, 1, 9), ()):
        mask = torch.rand(shape) < 0.7
        expected = F.scaled_dot_product_attention(q, k, v, mask.expand(2, 2, 9, 9))
        with fastseq.use_backend("cpu"):
            torch.testing.assert_close(sdpa(q, k, v, mask), expected)


def test_output_is_laid_out_as_the_query() -> None:
    q, k, v = (torch.randn(2, 9, 4, 8).transpose(1, 2) for _ in range(3))
    for backend in ("cpu", "torch", "reference", "triton"):
        with fastseq.use_backend(backend):
            assert sdpa(q, k, v).transpose(1, 2).is_contiguous()


def test_plain_calls_go_to_torchs_flash_kernel() -> None:
    q, k, v = small(length=40)
    with recorded() as decisions:
        sdpa(q, k, v, is_causal=True)
        sdpa(q, k, v, dropout_p=0.5)
        sdpa(q[:, :, :1], k.repeat(1, 1, 200, 1), v.repeat(1, 1, 200, 1))
    names = [(decision.op, decision.backend) for decision in decisions]
    assert names == [
        ("scaled_dot_product_attention", "torch"),
        ("_attention_fwd", "cpu"),
        ("_attention_fwd", "cpu"),
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gives_the_dtypes_torch_gives(device: str, dtype: torch.dtype) -> None:
    """On fake tensors, so that CUDA's rule is tested without one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    enabled, half = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    try:
        with FakeTensorMode():
            q = torch.empty(2, 2, 9, 8, device=device, dtype=dtype)
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.bfloat16)
            theirs = F.scaled_dot_product_attention(q, q, q)
            assert sdpa(q, q, q).dtype == theirs.dtype
            assert attention(q, q, q, causal=True).dtype == theirs.dtype  # type: ignore[union-attr]
    finally:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, half)


def test_subclasses_go_to_torch() -> None:
    class Tagged(Tensor):
        pass

    q = torch.randn(2, 2, 9, 8).as_subclass(Tagged)
    with recorded() as decisions:
        assert type(sdpa(q, q, q)) is Tagged
    assert [d.backend for d in decisions] == ["torch"]


# --- jagged nested tensors -----------------------------------------------------------------------


def jagged(values: Tensor, *lengths: int, offsets: Tensor | None = None) -> Tensor:
    """Nested ``[B, H, L*, D]`` of ``[total, H, D]``, as a projection and a transpose leave it."""
    if offsets is None:
        offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_lengths", [None, (3, 6, 1)])
def test_jagged_tensors_attend_within_their_sequences(
    causal: bool, key_lengths: tuple[int, ...] | None
) -> None:
    keys = sum(key_lengths or (5, 1, 9))
    leaves = [torch.randn(15, 4, 8), torch.randn(keys, 2, 8), torch.randn(keys, 2, 8)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    query = jagged(leaves[0], 5, 1, 9)
    offsets = query.offsets() if key_lengths is None else torch.tensor([0, 3, 9, 10])
    key, value = (jagged(leaf, offsets=offsets) for leaf in leaves[1:])
    with recorded() as decisions:
        output = sdpa(query, key, value, is_causal=causal, enable_gqa=True)
    assert [decision.op for decision in decisions] == ["_attention_fwd"]
    parts = zip(*(t.unbind() for t in (query, key, value)), strict=True)
    expected = [
        F.scaled_dot_product_attention(*part, is_causal=causal, enable_gqa=True) for part in parts
    ]
    for ours, theirs in zip(output.unbind(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    grads = torch.autograd.grad(output.transpose(1, 2).values().square().sum(), leaves)
    total = sum(part.square().sum() for part in expected)
    for ours, theirs in zip(grads, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_jagged_output_goes_on_with_its_query() -> None:
    """It has the query's ragged size, so that the residual can be added."""
    stream = jagged(torch.randn(11, 2, 8), 4, 0, 7).transpose(1, 2)
    query = stream.transpose(1, 2)
    output = sdpa(query, query, query).transpose(1, 2)
    assert (stream + output).shape == stream.shape
    assert output.is_contiguous()


def test_gaps_in_jagged_tensors_go_to_torch() -> None:
    values, lengths = torch.randn(9, 2, 8), torch.tensor([2, 3])
    query = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 4, 9]), lengths)
    query = query.transpose(1, 2)
    with recorded() as decisions, pytest.raises((ValueError, RuntimeError)):
        sdpa(query, query, query)
    assert [decision.backend for decision in decisions] == ["torch"]
