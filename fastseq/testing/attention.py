"""The attention family's operators and cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import functional
from ..random import keep_mask, keep_scale
from . import append_to_cache
from .operators import FLOATING, Case, Operator, Problem

#: fp64 has no better oracle than torch's own fp64, so it has the features alone, not the shapes.
_HALVES = (torch.bfloat16, torch.float16)
_KERNELS = (torch.float32, *_HALVES)


def _laid_out(
    shape: Sequence[int],
    layout: str,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:
    """Normal numbers: ``contiguous``, ``transposed`` (``[B, L, H, D]`` in memory), ``sliced`` (rows
    apart) or ``strided`` (elements apart)."""

    def tensor(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    batch, heads, length, width = shape
    if layout == "transposed":
        return tensor(batch, length, heads, width).transpose(1, 2)
    if layout == "sliced":
        return tensor(batch, heads, length, width + 8)[..., :width]
    if layout == "strided":
        return tensor(batch, heads, length, 2 * width)[..., ::2]
    return tensor(batch, heads, length, width)


def _steepness(query: Tensor, key: Tensor, scale: float | None) -> float:
    """How many times 4 the largest score is, 1 at least."""
    if not query.numel() or not key.numel():
        return 1.0
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return max(1.0, float((query.float() @ key.float().mT).abs().max()) * scale / 4)


def make(
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    batch: int = 2,
    heads: int = 2,
    key_heads: int | None = None,
    lengths: tuple[int, int] = (17, 17),
    head_dim: int = 16,
    value_dim: int | None = None,
    layout: str = "contiguous",
    values: str = "normal",
    mask: str | None = None,
    bias: Sequence[int] | None = None,
    alibi: bool = False,
    sinks: bool = False,
    key_lengths: Sequence[int] | None = None,
    packed: tuple[Sequence[int], Sequence[int]] | None = None,
    drop_in: bool = False,
    expanded_gradient: bool = False,
    differentiable: Sequence[str] = ("query", "key", "value"),
    **options: Any,
) -> Problem:
    """A problem of attention.

    Args:
        lengths: of queries and keys.
        values: ``normal``; ``wide`` (queries times 5, keys times 3); ``dominant`` (one key is far
            above all others); ``large`` (logits of about 1e4).
        mask: ``full`` (two thirds take part; the first query of the first batch sees nothing),
            ``padding`` (the first keys of each sequence, of the first one only one).
        bias: its shape, broadcast over what is 1.
        packed: lengths of the sequences' queries and keys, instead of a batch.
        drop_in: arguments for scaled_dot_product_attention.
        expanded_gradient: the gradient is one number, expanded (as from ``output.sum()``).
        differentiable: of the first three arguments those whose gradients are wanted. A gradient
            that is 0 but for rounding cannot be measured.
    """
    queries, keys = lengths
    if packed is not None:
        batch, queries, keys = 1, sum(packed[0]), sum(packed[1])
    key_heads = key_heads or heads
    value_dim = value_dim or head_dim

    def tensor(heads: int, length: int, width: int) -> Tensor:
        return _laid_out((batch, heads, length, width), layout, dtype, device, generator)

    query = tensor(heads, queries, head_dim)
    key = tensor(key_heads, keys, head_dim)
    value = tensor(key_heads, keys, value_dim)
    if values == "wide":
        query, key = query * 5, key * 3
    elif values == "large":
        query, key = query * 100, key * 100
    elif values == "dominant" and keys:
        key[:, :, keys // 2] = query.mean((1, 2))[:, None] * 100
    grad = tensor(heads, queries, value_dim)
    if expanded_gradient:
        grad = grad.flatten()[:1].expand(grad.shape)
    arguments: dict[str, Tensor | None] = {"query": query, "key": key, "value": value}
    differentiable = list(differentiable)
    # Products that are added up, those of which the factors themselves are made among them. e^s is
    # as many ulps off as s is large, which shows in gradients from scores of 4 on.
    group = heads // key_heads
    steep = _steepness(query, key, options.get("scale"))
    summed = {
        "query": round(keys * value_dim * steep**2),
        "key": round(queries * group * value_dim * steep**2),
        "value": round(queries * group * head_dim * steep**2),
        "sinks": batch * queries * value_dim,
    }
    shape = (batch, heads, queries, keys)
    name = "attn_mask" if drop_in else "mask"
    if mask == "full":
        arguments[name] = (
            torch.rand((batch, 1, queries, keys), generator=generator, device=device) < 2 / 3
        )
        arguments[name][0, 0, 0] = False  # type: ignore[index]
    elif mask == "padding":
        there = torch.randint(1, keys + 1, (batch, 1, 1, 1), generator=generator, device=device)
        there[0] = 1
        arguments[name] = torch.arange(keys, device=device) < there
    if bias is not None:
        name = "attn_mask" if drop_in else "bias"
        arguments[name] = torch.randn(tuple(bias), generator=generator, device=device).to(dtype)
        differentiable.append(name)
        summed[name] = math.prod(shape) // max(math.prod(bias), 1)
    if alibi:
        slopes = torch.rand((batch, heads), generator=generator, device=device)
        arguments["alibi_slopes"] = slopes
    if sinks:
        arguments["sinks"] = torch.randn(heads, generator=generator, device=device).to(dtype)
        differentiable.append("sinks")
    if key_lengths is not None:
        arguments["key_lengths"] = torch.tensor(key_lengths, device=device)
    if options.get("dropout_p"):
        arguments["seed"] = torch.tensor([0x123456789ABCDEF], device=device)
    grads = {"output": grad}
    if packed is not None:
        for name in ("query", "key", "value"):
            arguments[name] = arguments[name][0].transpose(0, 1)  # type: ignore[index]
        grads["output"] = grad[0].transpose(0, 1)
        for name, of in zip(("cu_seqlens_q", "cu_seqlens_k"), packed, strict=True):
            starts = [0, *torch.tensor(list(of), dtype=torch.int64).cumsum(0).tolist()]
            arguments[name] = torch.tensor(starts, device=device, dtype=torch.int32)
    elif not drop_in and layout != "strided" and "query" in differentiable:
        statistics = torch.promote_types(dtype, torch.float32)
        drawn = torch.randn(shape[:3], generator=generator, device=device)
        grads["lse"] = drawn.to(statistics)
    return Problem(arguments, grads, options, tuple(differentiable), summed)


def attention(**arguments: Any) -> dict[str, Tensor]:
    """Ours, its results by name."""
    if "alibi_slopes" in arguments:
        arguments["alibi_slopes"] = arguments["alibi_slopes"].detach()
    output, lse = functional.attention(**arguments, return_lse=True)
    return {"output": output, "lse": lse}


def torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_lengths: Tensor | None = None,
    **arguments: Any,
) -> dict[str, Tensor]:
    """The formula by torch's operations in the dtype: ``exp(q @ k.mT - max) @ v / sum``.

    That, not torch's fused op, is the yardstick: it has every option, in 16 bits it rounds as often
    as a kernel with 16-bit products has to, and with the division at the end its gradient is, as
    every flash attention's, a difference from the product of the rounded output.
    """
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        starts = zip(*(c.tolist() for c in (cu_seqlens_q, cu_seqlens_k)), strict=True)
        empty = slice(0, 0)
        parts, before = [_dense(q[:, :, empty], k[:, :, empty], v[:, :, empty])], (0, 0)
        for number, after in enumerate(starts):
            i, j = (slice(*pair) for pair in zip(before, after, strict=True))
            if number:
                # The seed draws a row of the mask for every query of the whole.
                arguments["drawn"] = (q.shape[2], i, slice(0, k.shape[2]))
                parts.append(_dense(q[:, :, i], k[:, :, j], v[:, :, j], **arguments))
            before = after
        output, lse = (torch.cat(results, 2) for results in zip(*parts, strict=True))
        return {"output": output[0].transpose(0, 1), "lse": lse[0]}
    if key_lengths is not None:
        there = torch.arange(key.shape[2], device=key.device) < key_lengths[:, None, None, None]
        mask = arguments.pop("mask", None)
        arguments["mask"] = there if mask is None else mask & there
        arguments["shifts"] = key_lengths - query.shape[2]
    output, lse = _dense(query, key, value, **arguments)
    return {"output": output, "lse": lse}


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seed: Tensor | None = None,
    causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    shifts: Tensor | None = None,
    drawn: tuple[int, slice, slice] | None = None,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = query.shape
    key_heads, keys = key.shape[1:3]
    if heads != key_heads:
        key, value = (t.repeat_interleave(heads // key_heads, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    device = query.device
    shift = torch.zeros((), dtype=torch.int64, device=device)
    if causal_alignment == "bottom_right":
        shift = shift + (keys - queries) if shifts is None else shifts[:, None, None, None]
    relative = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
    relative = relative - shift
    if alibi_slopes is not None:
        scores = scores - (alibi_slopes[:, :, None, None] * relative.abs()).to(scores.dtype)
    keep = torch.ones(scores.shape, dtype=torch.bool, device=device)
    left, right = window or (None, None)
    if causal:
        right = 0
    if right is not None:
        keep = keep & (relative <= right)
    if left is not None:
        keep = keep & (relative >= -left)
    if mask is not None:
        keep = keep & mask
    compute = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.masked_fill(~keep, -math.inf)
    nothing = ~keep.any(-1, keepdim=True)
    if keys:
        largest = scores.detach().amax(-1, keepdim=True)
    else:
        largest = scores.new_full((batch, heads, queries, 1), -math.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[None, :, None, None]
        largest = torch.maximum(largest, sink.detach())
        nothing = torch.zeros_like(nothing)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights = torch.exp(scores - largest).masked_fill(~keep, 0.0)
    total = weights.to(compute).sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - largest).to(compute)
    total = total.masked_fill(nothing, 1.0)
    lse = (largest.to(compute) + total.log()).masked_fill(nothing, -math.inf)
    if seed is not None:
        rows, i, j = drawn or (queries, slice(None), slice(0, keys))
        kept = keep_mask(seed, (batch, heads, rows, j.stop), dropout_p)[:, :, i, :keys]
        weights = weights.masked_fill(~kept, 0.0) * keep_scale(dropout_p)
    return (weights @ value) / total.to(weights.dtype), lse.squeeze(-1)


def _sdpa(**arguments: Any) -> dict[str, Tensor]:
    return {"output": functional.scaled_dot_product_attention(**arguments)}


#: fp64 scores beyond which the oracle goes head by head: 2 GiB.
_MANY = 2**28


def _torch_sdpa(**arguments: Any) -> dict[str, Tensor]:
    """By its fused kernel: where elements are apart torch has none, and takes 16 bits to fp32 for
    the whole, which is no yardstick for kernels with 16-bit products."""
    for name in ("query", "key", "value"):
        if arguments[name].stride(-1) != 1:
            arguments[name] = arguments[name].contiguous()
    query, key = arguments["query"], arguments["key"]
    scores = math.prod(query.shape[:3]) * key.shape[2]
    plain = not arguments.get("enable_gqa") and not arguments.get("dropout_p")
    if query.dtype == torch.float64 and scores > _MANY and query.dim() == 4 and plain:
        return {"output": _head_by_head(**arguments)}
    return {"output": F.scaled_dot_product_attention(**arguments)}


def _head_by_head(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Scaled dot-product attention with one head's scores in memory at a time, backward too."""
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])

    def one(*tensors: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, **options)  # type: ignore[arg-type]

    def of_batch(b: int) -> list[Tensor]:
        return [
            checkpoint(
                one,
                *(t[b : b + 1, h : h + 1] for t in (query, key, value)),
                None if attn_mask is None else attn_mask[b : b + 1, h : h + 1],
                use_reentrant=False,
            )
            for h in range(query.shape[1])
        ]

    return torch.cat([torch.cat(of_batch(b), 1) for b in range(query.shape[0])])


# --- cases ---------------------------------------------------------------------------------------


def _case(
    name: str,
    *,
    dtypes: tuple[torch.dtype, ...] = _KERNELS,
    quick: bool = False,
    tiny: bool = True,
    large: bool = False,
    **sizes: Any,
) -> Case:
    return Case(name, sizes, dtypes, quick, tiny and not large, large)


#: What there is to combine, alone and in pairs.
_FEATURES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "bottom right": {"causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (5, 3)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.3},
    "mask": {"mask": "full"},
    "padding": {"mask": "padding"},
    "groups": {"heads": 4, "key_heads": 2},
    "cross": {"lengths": (9, 40)},
    "value_dim": {"value_dim": 24},
    "transposed": {"layout": "transposed"},
    "key_lengths": {"key_lengths": (7, 0)},
    "scale": {"scale": 0.7},
}
#: Rows of a pairwise cover: each pair of features that can be had together is in one of them.
_COVER = (
    ("causal", "softcap", "alibi", "sinks", "dropout"),
    ("bottom right", "mask", "groups", "cross", "value_dim"),
    ("window", "dropout", "padding", "groups", "transposed"),
    ("causal", "mask", "groups", "key_lengths", "scale"),
    ("window", "softcap", "mask", "cross", "key_lengths"),
    ("bottom right", "alibi", "dropout", "cross", "key_lengths"),
    ("window", "alibi", "sinks", "value_dim", "scale"),
    ("softcap", "groups", "cross", "transposed", "scale", "sinks"),
    ("causal", "cross", "padding", "value_dim", "transposed"),
    ("bottom right", "softcap", "padding", "sinks", "scale"),
    ("alibi", "mask", "transposed", "dropout", "value_dim", "softcap"),
    ("sinks", "mask", "cross", "dropout", "scale"),
    ("alibi", "padding", "groups", "cross"),
    ("sinks", "key_lengths", "transposed", "value_dim", "groups"),
    ("bottom right", "window", "sinks", "transposed", "padding", "key_lengths"),
)


def _combined(names: Sequence[str]) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for name in names:
        sizes.update(_FEATURES[name])
    return sizes


_PLAIN = (
    _case("plain", quick=True, dtypes=FLOATING),
    *(_case(name, quick=True, dtypes=FLOATING, **sizes) for name, sizes in _FEATURES.items()),
    *(_case(" + ".join(names), **_combined(names)) for names in _COVER),
    _case("rows apart", layout="sliced"),
    _case("elements apart", layout="strided"),
    _case("expanded gradient", expanded_gradient=True, lengths=(9, 12)),
    _case("no batch", batch=0, quick=True),
    _case("no queries", lengths=(0, 9)),
    _case("no keys", lengths=(5, 0), quick=True),
    _case("one of each", lengths=(1, 1), batch=1, heads=1, differentiable=("value",)),
    *(_case(f"head_dim {d}", lengths=(5, 33), head_dim=d) for d in (1, 8, 40, 59)),
    *(
        _case(f"head_dim {d}", lengths=(33, 65), head_dim=d, tiny=False)
        for d in (64, 80, 96, 111, 128, 160, 192, 256)
    ),
    *(
        _case(f"{m} x {n}", lengths=(m, n), causal=m > 5, batch=1)
        for m, n in ((63, 64), (64, 63), (65, 65), (3, 113), (1, 128), (128, 9))
    ),
    *(
        _case(f"{m} x {n}", lengths=(m, n), causal=True, tiny=False, head_dim=40)
        for m, n in ((113, 203), (239, 9), (256, 512), (799, 5), (512, 256))
    ),
    _case("q times 5, k times 3", values="wide", lengths=(17, 40)),
    _case("one key dominates", values="dominant", lengths=(17, 40)),
    _case("logits of 1e4", values="large", lengths=(17, 40), dtypes=(torch.float32,),
          differentiable=()),
    _case("far below, masked", values="wide", lengths=(20, 192), mask="full"),
    _case("one query, chunks", lengths=(1, 70), heads=4, key_heads=2, sinks=True, alibi=True,
          key_lengths=(70, 13), causal=True, causal_alignment="bottom_right", quick=True),
    _case("two queries, chunks", lengths=(2, 40), causal=True, causal_alignment="bottom_right",
          softcap=2.0, window=(20, None)),
    _case("decode", lengths=(1, 300), heads=4, key_heads=2, key_lengths=(300, 77), tiny=False),
    _case("decode, several splits", lengths=(2, 1300), causal=True, tiny=False,
          causal_alignment="bottom_right", sinks=True),
    *(
        _case(f"{n} x {d}, {name}", lengths=(n, n), head_dim=d, large=True, dtypes=_HALVES, **s)
        for n, d in ((1024, 64), (2048, 128))
        for name, s in (("plain", {}), ("causal", {"causal": True}), ("mask", {"mask": "padding"}))
    ),
)  # fmt: skip
_BIASED = (
    _case("full", bias=(2, 2, 17, 17), quick=True),
    _case("over the batch", bias=(1, 2, 17, 17), quick=True, causal=True),
    _case("over heads", bias=(2, 1, 17, 17), heads=4, key_heads=2),
    _case("over queries", bias=(2, 2, 1, 33), lengths=(40, 33), quick=True),
    _case("over keys", bias=(2, 2, 40, 1), lengths=(40, 33)),
    _case("over all but keys", bias=(1, 1, 1, 33), lengths=(9, 33)),
    _case("with softcap", bias=(1, 2, 17, 17), softcap=2.0),
    _case("with dropout", bias=(1, 2, 17, 17), dropout_p=0.3, quick=True),
    _case("with all", bias=(1, 2, 17, 40), lengths=(17, 40), mask="full", window=(9, None),
          alibi=True, sinks=True, dropout_p=0.2, value_dim=24),
    _case("with lengths", bias=(2, 1, 9, 20), lengths=(9, 20), key_lengths=(13, 20)),
    _case("512", bias=(1, 8, 512, 512), lengths=(512, 512), heads=8, head_dim=64, large=True,
          dtypes=_HALVES),
)  # fmt: skip
_PACKED = (
    _case("sequences", packed=((5, 40, 1), (5, 40, 1)), quick=True),
    _case("causal", packed=((17, 33), (17, 33)), causal=True, quick=True),
    _case("cross", packed=((17, 3, 9), (5, 40, 33)), causal=True, causal_alignment="bottom_right"),
    _case("some are empty", packed=((0, 9, 4, 0), (3, 20, 0, 0)), quick=True),
    _case("none", packed=((), ())),
    _case("with groups and dropout", packed=((9, 20), (20, 9)), heads=4, key_heads=2,
          dropout_p=0.3),
    _case("with all", packed=((9, 20), (20, 33)), window=(9, 2), softcap=3.0, sinks=True,
          value_dim=24),
    _case("4 of 1000", packed=((1000, 700, 1, 1200),) * 2, head_dim=64, large=True, causal=True,
          dtypes=_HALVES),
)  # fmt: skip
_DROP_IN = (
    _case("plain", drop_in=True, quick=True),
    _case("causal", drop_in=True, is_causal=True, quick=True),
    _case("mask", drop_in=True, mask="full", quick=True),
    _case("padding", drop_in=True, mask="padding", lengths=(9, 33)),
    _case("bias", drop_in=True, bias=(1, 2, 17, 17), quick=True),
    _case("groups", drop_in=True, heads=4, key_heads=2, enable_gqa=True, quick=True),
    _case("value_dim", drop_in=True, value_dim=24, lengths=(9, 33), scale=0.3),
    _case("transposed", drop_in=True, layout="transposed"),
    _case("elements apart", drop_in=True, layout="strided"),
)

_ROWS = ("query", "key", "value", "mask", "key_lengths", "alibi_slopes", "output", "lse")

#: A bias and packed sequences apart from the rest: there a batch cannot be cut in two.
OPERATORS = (
    *(
        Operator(name, "attention", "_attention_fwd", make, ours, theirs, cases, rows)
        for name, ours, theirs, cases, rows in (
            ("attention", attention, torch_attention, _PLAIN, _ROWS),
            ("attention_bias", attention, torch_attention, _BIASED, ()),
            ("attention_packed", attention, torch_attention, _PACKED, ()),
            ("scaled_dot_product_attention", _sdpa, _torch_sdpa, _DROP_IN, ()),
        )
    ),
    append_to_cache.OPERATOR,
)
