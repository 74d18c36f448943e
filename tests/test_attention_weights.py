"""attention_weights: streamed block by block, and in every reduction that of the whole map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import functional
from fastseq.ops import attention_blockwise as blockwise

attention = functional.attention


@pytest.mark.parametrize("block", [1 << 19, 16 * 25])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "causal_alignment": "bottom_right"},
        {"mask": True, "softcap": 2.0, "window": (9, 4)},
        {"bias": True, "sinks": True, "scale": 0.3},
    ],
    ids=str,
)
def test_weights_are_streamed(
    block: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked for is that of the whole map, and the map times values is attention."""
    q, k, v = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 25, 8), torch.randn(2, 2, 25, 8)
    options = dict(options)
    if "mask" in options:
        options["mask"] = torch.rand(2, 1, 30, 25) < 0.5
        options["mask"][0, 0, 3] = False
    if "bias" in options:
        options |= {"bias": torch.randn(1, 4, 30, 25), "sinks": torch.randn(4)}
    monkeypatch.setitem(blockwise.BLOCK_ELEMENTS, "cpu", block)
    weights = functional.attention_weights(q, k, **options)
    assert isinstance(weights, Tensor)
    expected = attention(q, k, v, **options)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), expected)
    logarithm = torch.where(weights > 0, weights, 1.0).log()
    for reduce, whole in (
        ("heads", weights.mean(1)),
        ("keys", weights.sum(2)),
        ("entropy", -(weights * logarithm).sum(-1)),
    ):
        torch.testing.assert_close(
            functional.attention_weights(q, k, reduce=reduce, **options), whole
        )
    values, keys = functional.attention_weights(q, k, reduce="top_k", k=3, **options)
    torch.testing.assert_close(values, weights.topk(3, -1).values)
    torch.testing.assert_close(weights.gather(-1, keys), values)


def test_weights_have_gradients() -> None:
    q, k = (torch.randn(1, 2, 4, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    for reduce in ("none", "heads", "keys", "entropy"):
        assert torch.autograd.gradcheck(
            lambda q, k, r=reduce: functional.attention_weights(q, k, reduce=r, causal=True), (q, k)
        )


def test_weights_take_no_more_memory_than_they_have() -> None:
    """Of 1 x 2 x 3000 the map would be 72 MB."""
    q, k = torch.randn(1, 2, 3000, 8), torch.randn(1, 2, 3000, 8)
    sizes = []
    original = blockwise._forward_by_torch

    def spy(p: Any, products: Tensor, *rest: Any) -> Any:
        sizes.append(products.numel())
        return original(p, products, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_forward_by_torch", spy)
        functional.attention_weights(q, k, reduce="keys")
    assert max(sizes) <= blockwise.BLOCK_ELEMENTS["cpu"]
