"""The softmax family's operators and cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .operators import FLOATING, Case, Operator, Problem

_HALVES = (torch.bfloat16, torch.float16)
#: fp64 has no better oracle than torch's own fp64, so it sits out where conditioning decides.
_KERNELS = (torch.float32, *_HALVES)


def _laid_out(
    shape: Sequence[int],
    layout: str,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:
    """Normal numbers: ``contiguous``, ``sliced`` (rows apart), ``strided`` (elements apart) or
    ``transposed`` (the first two dimensions swapped)."""

    def tensor(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    if layout == "sliced":
        return tensor(*shape[:-1], shape[-1] + 3)[..., : shape[-1]]
    if layout == "transposed":
        return tensor(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    if layout == "strided":
        return tensor(*shape[:-1], 2 * shape[-1])[..., ::2]
    return tensor(*shape)


def make(
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    shape: Sequence[int],
    dim: int = -1,
    output_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    values: str = "normal",
    expanded_gradient: bool = False,
) -> Problem:
    """A problem of softmax or log_softmax.

    Args:
        shape, dim: the input's, and the dimension that sums up to 1.
        output_dtype: the ``dtype`` argument.
        layout: of input and gradient, as :func:`_laid_out`.
        values: ``normal``; ``wide`` (up to 1e4 and down to -1e4); ``special`` (of the slices along
            ``dim`` one has a NaN, one +Inf, one a -Inf, one nothing but -Inf).
        expanded_gradient: the gradient is one number, expanded (as from ``output.sum()``).
    """
    input = _laid_out(shape, layout, dtype, device, generator)
    if values == "wide":
        input = (input.clamp(-3, 3) * 3333.0).to(dtype)
    elif values == "special":
        slices = input.movedim(dim, -1).unflatten(0, (-1, 1)).flatten(0, -2)
        rows = torch.zeros(slices.shape, device=device, dtype=dtype)
        rows[0, 0], rows[1, -1], rows[2, 0], rows[3] = math.nan, math.inf, -math.inf, -math.inf
        input = input + rows.view(input.movedim(dim, -1).shape).movedim(-1, dim)
    grad = _laid_out(shape, layout, output_dtype or dtype, device, generator)
    if expanded_gradient:
        grad = grad.flatten()[:1].expand(tuple(shape))
    return Problem(
        {"input": input},
        {"output": grad},
        options={"dim": dim, "dtype": output_dtype},
        differentiable=("input",),
    )


def make_masked(
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    shape: Sequence[int],
    mask: Sequence[int] | None = None,
    kind: str = "boolean",
    layout: str = "contiguous",
    poisoned: bool = False,
    differentiable_mask: bool = False,
    mask_dtype: torch.dtype | None = None,
    **options: Any,
) -> Problem:
    """A problem of masked_softmax.

    Args:
        shape: the input's.
        mask: the mask's, with as many dimensions; None: no mask.
        kind: ``boolean`` (two thirds take part; the first row none), ``padding`` (the first
            columns of each), ``additive`` (numbers, and -Inf in a third).
        layout: of input and gradient, as :func:`_laid_out`.
        poisoned: NaN in input and gradient wherever a boolean mask is False.
        differentiable_mask: the gradient of the mask is wanted.
        mask_dtype: of an additive mask, where it is not the input's.
    """
    input = _laid_out(shape, layout, dtype, device, generator)
    grad = _laid_out(shape, layout, dtype, device, generator)
    given: Tensor | None = None
    if mask is not None:
        drawn = torch.rand(*mask, generator=generator, device=device)
        if kind == "padding":
            lengths = (drawn[..., :1] * mask[-1]).long()
            given = torch.arange(mask[-1], device=device) < lengths
        else:
            given = drawn < 2 / 3
            given[(0,) * (len(mask) - 1)] = False
        if kind == "additive":
            bias = torch.randn(*mask, generator=generator, device=device)
            given = bias.masked_fill(~given, -math.inf).to(mask_dtype or dtype)
        elif poisoned:
            input, grad = (t.masked_fill(~given, math.nan) for t in (input, grad))
    return Problem(
        {"input": input, "mask": given},
        {"output": grad},
        options=options,
        differentiable=("input", "mask") if differentiable_mask else ("input",),
        summed={} if mask is None else {"mask": math.prod(shape) // math.prod(mask)},
    )


# --- ours and torch's ----------------------------------------------------------------------------


def _named(function: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    return lambda **arguments: {"output": function(**arguments)}


def _by_torch(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        # In the oracle's fp64 the dtype is left out, not followed.
        return function(input, dim, dtype=None if input.dtype == torch.float64 else dtype)

    return run


def torch_masked_softmax(
    input: Tensor,
    mask: Tensor | None,
    scale: float = 1.0,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
) -> Tensor:
    """``torch.softmax(input * scale + mask)``, 0 in what takes no part."""
    keep = torch.ones(input.shape, dtype=torch.bool, device=input.device)
    scores = input * scale
    if mask is not None and mask.dtype == torch.bool:
        keep = keep & mask
    elif mask is not None:
        keep = keep & (mask != -math.inf)
        scores = (scores + mask).to(scores.dtype)
    if is_causal:
        rows, columns = input.shape[-2:]
        keep = keep.tril(columns - rows if causal_alignment == "bottom_right" else 0)
    empty = ~keep.any(-1, keepdim=True)
    scores = scores.masked_fill(~keep, -math.inf).masked_fill(empty, 0.0)
    return torch.softmax(scores, -1).masked_fill(~keep, 0.0)


# --- cases ---------------------------------------------------------------------------------------


def _case(
    name: str,
    shape: Sequence[int],
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    quick: bool = False,
    tiny: bool = False,
    large: bool = False,
    **more: Any,
) -> Case:
    return Case(name, {"shape": shape, **more}, dtypes, quick, tiny, large)


_COMMON = (
    _case("plain", (64, 256), quick=True),
    _case("no rows", (0, 64), quick=True, tiny=True),
    _case("rows of length 0", (3, 0), tiny=True),
    _case("one dimension", (65,), tiny=True),
    *(_case(f"length {n}", (5, n), tiny=True) for n in (1, 2, 63, 64, 65, 127)),
    *(_case(f"length {n}", (9, n)) for n in (255, 768, 1000, 4096, 4097)),
    _case("length 12289", (4, 12289), quick=True),
    _case("length 262144", (2, 262144), dtypes=_KERNELS),
    _case("many short rows", (9001, 7), quick=True),
    _case("middle dimension", (3, 9, 65), dim=1, quick=True, tiny=True),
    _case("middle of four", (2, 5, 3, 7), dim=1, tiny=True),
    _case("middle, long", (2, 3000, 40), dim=1, dtypes=_KERNELS),
    _case("middle, wide", (2, 33, 1000), dim=1, quick=True),
    _case("middle of length 1", (2, 1, 9), dim=1, tiny=True),
    _case("rows apart", (9, 65), layout="sliced", quick=True, tiny=True),
    _case("transposed", (5, 7, 64), layout="transposed", quick=True, tiny=True),
    _case("transposed, middle", (5, 7, 20), dim=1, layout="transposed", quick=True, tiny=True),
    _case("elements apart", (9, 65), layout="strided", tiny=True),
    _case("elements apart, middle", (3, 9, 17), dim=1, layout="strided", tiny=True),
    _case("expanded gradient", (40, 128), expanded_gradient=True, quick=True, tiny=True),
    _case("expanded gradient, middle", (4, 8, 9), dim=1, expanded_gradient=True, tiny=True),
    _case("up to 1e4", (20, 100), values="wide", dtypes=_KERNELS, quick=True, tiny=True),
    _case("NaN and Inf", (6, 100), values="special", quick=True, tiny=True),
    _case("NaN and Inf, middle", (2, 9, 20), dim=1, values="special", quick=True, tiny=True),
    _case("fp32 result", (12, 130), dtypes=_HALVES, output_dtype=torch.float32, tiny=True),
    _case("fp32, middle", (2, 9, 65), dim=1, dtypes=_HALVES, output_dtype=torch.float32, tiny=True),
    _case("bf16 result", (12, 130), dtypes=_KERNELS, output_dtype=torch.bfloat16, tiny=True),
    *(
        _case(f"{m} x {n}", (m, n), large=True)
        for m, n in ((65536, 256), (16384, 1024), (8192, 4096), (2048, 16384), (64, 131072))
    ),
    _case("4093 x 5003", (4093, 5003), large=True),
    _case("64 x 512 x 1024, middle", (64, 512, 1024), dim=1, large=True),
)
_FIRST = (
    _case("plain", (256, 64), dim=0, quick=True),
    _case("tiny", (9, 20), dim=0, quick=True, tiny=True),
    _case("narrow", (130, 3), dim=0, quick=True, tiny=True),
    _case("wide", (40, 1001), dim=0),
    _case("long", (5000, 33), dim=0, dtypes=_KERNELS, quick=True),
    _case("length 70000", (70000, 5), dim=0, dtypes=_KERNELS),
    _case("rows apart", (65, 40), dim=0, layout="sliced", quick=True, tiny=True),
    _case("elements apart", (20, 9), dim=0, layout="strided", tiny=True),
    _case("expanded gradient", (40, 12), dim=0, expanded_gradient=True, quick=True, tiny=True),
    _case("up to 1e4", (100, 20), dim=0, values="wide", dtypes=_KERNELS, tiny=True),
    _case("NaN and Inf", (100, 20), dim=0, values="special", quick=True, tiny=True),
    _case("8192 x 1024", (8192, 1024), dim=0, large=True),
    _case("512 x 65536", (512, 65536), dim=0, large=True),
)
_MASKED = (
    _case("no mask", (3, 4, 65), scale=0.3, quick=True, tiny=True),
    _case("boolean", (2, 3, 5, 33), mask=(2, 1, 5, 33), scale=0.5, quick=True, tiny=True),
    _case("padding", (3, 2, 4, 65), mask=(3, 1, 1, 65), kind="padding", quick=True, tiny=True),
    _case("by row", (2, 3, 5, 17), mask=(2, 3, 5, 1), quick=True, tiny=True),
    _case("full mask", (2, 3, 4, 19), mask=(2, 3, 4, 19), tiny=True),
    _case("additive", (2, 3, 5, 33), mask=(1, 3, 5, 33), kind="additive", quick=True, tiny=True),
    _case("additive by row", (2, 5, 7), mask=(1, 5, 1), kind="additive", tiny=True),
    _case(
        "fp32 mask", (2, 3, 40), mask=(1, 3, 40), kind="additive", dtypes=_HALVES,
        mask_dtype=torch.float32, tiny=True,
    ),
    _case("NaN masked out", (3, 2, 4, 65), mask=(3, 1, 4, 65), poisoned=True, tiny=True),
    _case("causal", (2, 2, 17, 17), is_causal=True, scale=0.2, quick=True, tiny=True),
    _case("causal, more columns", (2, 5, 9), is_causal=True, tiny=True),
    _case("causal, more rows", (2, 9, 5), is_causal=True, tiny=True),
    _case(
        "bottom right", (2, 5, 9), is_causal=True, causal_alignment="bottom_right", quick=True,
        tiny=True,
    ),
    _case(
        "bottom right, more rows", (2, 9, 5), is_causal=True, causal_alignment="bottom_right",
        tiny=True,
    ),
    _case("causal padding", (2, 8, 8), mask=(2, 1, 8), kind="padding", is_causal=True, tiny=True),
    _case("five dimensions", (2, 2, 2, 2, 9), mask=(2, 1, 2, 1, 9), tiny=True),
    _case("transposed", (5, 7, 33), mask=(5, 1, 33), layout="transposed", tiny=True),
    _case("elements apart", (5, 7, 33), mask=(5, 1, 33), layout="strided", tiny=True),
    _case("no rows", (0, 2, 5), mask=(1, 2, 5), tiny=True),
    _case("length 5001", (2, 3, 5001), mask=(2, 1, 5001), quick=True),
    _case("4 x 8 x 512 x 512", (4, 8, 512, 512), mask=(4, 1, 1, 512), kind="padding", large=True),
)  # fmt: skip
_BIASED = (
    _case("over the batch", (3, 2, 5, 33), mask=(1, 2, 5, 33), quick=True, tiny=True, scale=0.5),
    _case("over rows", (3, 2, 9, 65), mask=(1, 2, 1, 65), quick=True, tiny=True),
    _case("of one size", (1, 4, 65), mask=(1, 4, 65), quick=True, tiny=True),
    _case("causal", (2, 3, 9, 9), mask=(1, 3, 9, 9), is_causal=True, tiny=True),
)


def _biased(*arguments: Any, **sizes: Any) -> Problem:
    return make_masked(*arguments, kind="additive", differentiable_mask=True, **sizes)


_ROWS = ("input", "output")

#: Those with ``dim0`` in their names are the same functions: over dimension 0 there are no rows
#: that could be left out. A bias is a mask whose gradient is wanted.
OPERATORS = (
    *(
        Operator(
            name + suffix,
            "softmax",
            "_softmax_fwd",
            make,
            _named(getattr(functional, name)),
            _named(_by_torch(getattr(torch, name))),
            cases,
            rows,
        )
        for name in ("softmax", "log_softmax")
        for suffix, cases, rows in (("", _COMMON, _ROWS), ("_dim0", _FIRST, ()))
    ),
    Operator(
        "masked_softmax",
        "softmax",
        "_masked_softmax_fwd",
        make_masked,
        _named(functional.masked_softmax),
        _named(torch_masked_softmax),
        _MASKED,
        (*_ROWS, "mask"),
    ),
    Operator(
        "masked_softmax_bias",
        "softmax",
        "_masked_softmax_fwd",
        _biased,
        _named(functional.masked_softmax),
        _named(torch_masked_softmax),
        _BIASED,
        _ROWS,
    ),
)
