"""The feed_forward family's operators and cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..random import draw_seed, keep_mask, keep_scale
from ..reference.feed_forward import ACTIVATIONS
from .operators import FLOATING, Case, Operator, Problem


def make(
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    leading: Sequence[int],
    size: int,
    wide: int,
    activation: str,
    output_size: int | None = None,
    given: Sequence[str] = ("bias1", "bias2"),
    frozen: Sequence[str] = (),
    layout: str = "contiguous",
    values: str = "normal",
    dropout_p: float = 0.0,
) -> Problem:
    """A problem of feed_forward.

    Args:
        leading, size: the input is ``[*leading, size]``.
        wide: F; the first weight has twice as many rows for SwiGLU.
        output_size: E, by default ``size``.
        given: the biases the call has.
        frozen: arguments that want no gradient.
        layout: of input and gradient: ``contiguous``; ``sliced`` (rows apart); ``transposed`` (the
            two leading dimensions swapped); ``expanded`` (a gradient of one row for all).
        values: ``normal``; ``large`` (activations far out); ``special`` (one row with a NaN, one
            with an Inf).
    """
    output_size = size if output_size is None else output_size

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    def laid_out(last: int) -> Tensor:
        if layout == "sliced":
            return tensor(*leading, last + 3)[..., :last]
        if layout == "transposed":
            return tensor(leading[1], leading[0], last).transpose(0, 1)
        return tensor(*leading, last)

    length = 2 * wide if activation == "swiglu" else wide
    scale = 30.0 if values == "large" else 1.5
    input = laid_out(size)
    if values == "special":
        flat = input.view(-1, size)
        flat[0, 0], flat[-1, -1] = math.nan, math.inf
    arguments: dict[str, Tensor | None] = {
        "input": input,
        "weight1": tensor(length, size, scale=scale / math.sqrt(max(size, 1))),
        "bias1": tensor(length) if "bias1" in given else None,
        "weight2": tensor(output_size, wide, scale=1 / math.sqrt(max(wide, 1))),
        "bias2": tensor(output_size) if "bias2" in given else None,
    }
    grad = laid_out(output_size)
    if layout == "expanded":
        grad = tensor(output_size).expand(*leading, output_size)
    options = {"dropout_p": dropout_p, "training": True} if dropout_p else {}
    rows = math.prod(leading)
    return Problem(
        arguments,
        {"output": grad},
        options={"activation": activation, **options},
        differentiable=tuple(
            name for name, value in arguments.items() if value is not None and name not in frozen
        ),
        summed={
            "input": output_size * length,
            **dict.fromkeys(("weight1", "bias1"), rows * output_size),
            **dict.fromkeys(("weight2", "bias2"), rows),
        },
    )


def torch_feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """By torch's functions, with the dropout mask that our kernels draw from the same generator."""
    hidden = F.linear(input, weight1, bias1)
    if activation == "swiglu":
        hidden = F.silu(hidden[..., : weight2.shape[1]]) * hidden[..., weight2.shape[1] :]
    elif activation in ("gelu", "gelu_tanh"):
        hidden = F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
    else:
        hidden = {"relu": F.relu, "silu": F.silu}[activation](hidden)
    if dropout_p and training:
        keep = keep_mask(draw_seed(input.device), tuple(hidden.shape), dropout_p)
        hidden = hidden * keep * keep_scale(dropout_p)
    return F.linear(hidden, weight2, bias2)


def _case(
    name: str,
    leading: Sequence[int],
    size: int,
    wide: int,
    activation: str,
    *,
    quick: bool = False,
    tiny: bool = False,
    large: bool = False,
    **more: Any,
) -> Case:
    sizes = {"leading": leading, "size": size, "wide": wide, "activation": activation}
    return Case(name, {**sizes, **more}, FLOATING, quick, tiny, large)


_CASES = (
    *(_case(f"{a}, dropout", (5, 9), 7, 35, a, dropout_p=0.3, tiny=True) for a in ACTIVATIONS),
    _case("dropout of all", (2, 9), 7, 16, "gelu", dropout_p=1.0, tiny=True),
    *(_case(a, (3, 21), 24, 40, a, quick=True, tiny=True) for a in ACTIVATIONS),
    _case("no biases", (3, 11), 8, 24, "gelu", given=(), tiny=True),
    _case("no biases, gated", (3, 11), 8, 24, "swiglu", given=(), quick=True, tiny=True),
    _case("second bias alone", (3, 11), 8, 24, "relu", given=("bias2",), tiny=True),
    _case("another size out", (9,), 8, 24, "silu", output_size=5, quick=True, tiny=True),
    _case("one row", (), 8, 24, "gelu", tiny=True),
    _case("one column", (4,), 3, 1, "swiglu", tiny=True),
    *(_case(f"{n} wide", (2, 3), 5, n, "gelu", tiny=True) for n in (31, 32, 33, 127, 130)),
    *(_case(f"{n} rows", (n,), 5, 17, "silu", tiny=True) for n in (63, 64, 65)),
    _case("no rows", (0, 4), 5, 8, "gelu", tiny=True),
    _case("nothing between", (2, 4), 5, 0, "swiglu", tiny=True),
    _case("nothing in", (2, 4), 0, 6, "gelu", output_size=3, tiny=True),
    _case("sliced", (3, 5), 6, 24, "gelu", layout="sliced", tiny=True),
    _case("transposed", (3, 5), 6, 24, "swiglu", layout="transposed", quick=True, tiny=True),
    _case("expanded gradient", (3, 5), 6, 24, "gelu", layout="expanded", tiny=True),
    *(_case(f"{a}, far out", (4, 19), 24, 40, a, values="large", tiny=True) for a in ACTIVATIONS),
    *(_case(f"{a}, NaN, Inf", (8, 9), 24, 40, a, values="special", tiny=True) for a in ACTIVATIONS),
    *(
        _case(f"{' '.join(f)} frozen", (4, 3), 8, 24, "gelu", frozen=f, tiny=True)
        for f in (
            ("weight1", "bias1", "weight2", "bias2"),
            ("weight2", "bias2"),
            ("input", "weight1"),
            ("input", "weight1", "bias1"),
        )
    ),
    _case("128 x 256 x 1024", (128,), 256, 1024, "gelu"),
    _case("3 x 700 x 64 x 384, dropout", (3, 700), 64, 384, "swiglu", dropout_p=0.1),
    _case("8192 x 1024 x 4096", (8192,), 1024, 4096, "gelu", large=True),
    _case("8192 x 1024 x 2816, dropout", (8192,), 1024, 2816, "swiglu", dropout_p=0.1, large=True),
)

OPERATORS = (
    Operator(
        "feed_forward",
        "feed_forward",
        "_feed_forward_fwd",
        make,
        lambda **arguments: {"output": functional.feed_forward(**arguments)},
        lambda **arguments: {"output": torch_feed_forward(**arguments)},
        _CASES,
        # No rows to compare to the bit: the products are a library's.
    ),
)
