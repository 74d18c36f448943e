"""The rotary_embedding family's operators and cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .operators import FLOATING, Case, Operator, Problem


def make(
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    shape: Sequence[int],
    rotated: int | None = None,
    positions: str | None = None,
    layout: str = "contiguous",
    **options: Any,
) -> Problem:
    """A problem of rotary_embedding.

    Args:
        shape: the input's, ``[*, L, D]``.
        rotated: R, by default D.
        positions: ``shared`` (``[1, L]``), ``each`` (``[B, L]``) or None.
        layout: ``contiguous``; ``transposed`` (length before heads, as from a projection);
            ``strided`` (elements apart).
    """

    def tensor() -> Tensor:
        size = list(shape)
        if layout == "transposed":
            size[-2], size[-3] = size[-3], size[-2]
        if layout == "strided":
            size[-1] *= 2
        drawn = torch.randn(size, generator=generator, device=device).to(dtype)
        drawn = drawn.transpose(-2, -3) if layout == "transposed" else drawn
        return drawn[..., ::2] if layout == "strided" else drawn

    limit = 2 * shape[-2] + 8
    half = (shape[-1] if rotated is None else rotated) // 2
    angles = torch.randn(limit, half, generator=generator, device=device)
    batch = 1 if positions == "shared" else shape[0]
    chosen = torch.randint(0, limit, (batch, shape[-2]), generator=generator, device=device)
    return Problem(
        {
            "input": tensor(),
            "cos": angles.cos(),
            "sin": angles.sin(),
            "positions": chosen if positions else None,
        },
        {"output": tensor()},
        options=options,
        differentiable=("input",),
    )


def torch_rotary_embedding(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    offset: int = 0,
    interleaved: bool = False,
) -> Tensor:
    """As complex numbers are multiplied, in the input's dtype."""
    length, half = input.shape[-2], cos.shape[1]
    if positions is None:
        cos, sin = cos[offset : offset + length], sin[offset : offset + length]
    else:
        cos, sin = cos[positions], sin[positions]
        while cos.dim() < input.dim():
            cos, sin = cos[:, None], sin[:, None]
    cos, sin = cos.to(input.dtype), sin.to(input.dtype)
    x = input[..., : 2 * half]
    pairs = x.unflatten(-1, (half, 2)) if interleaved else x.unflatten(-1, (2, half)).mT
    first, second = pairs.unbind(-1)
    y = torch.stack((first * cos - second * sin, second * cos + first * sin), -1)
    y = y.flatten(-2) if interleaved else y.mT.flatten(-2)
    return torch.cat((y, input[..., 2 * half :]), -1)


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


_SHAPES: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    ("plain", (2, 3, 9, 16), {}),
    ("odd pairs", (2, 2, 5, 34), {}),
    ("one pair", (3, 4, 2), {}),
    ("part", (2, 3, 7, 24), {"rotated": 10}),
    ("offset", (2, 3, 5, 8), {"offset": 6}),
    ("shared positions", (2, 3, 6, 8), {"positions": "shared"}),
    ("positions of each", (3, 2, 6, 8), {"positions": "each"}),
    ("transposed", (2, 3, 9, 64), {"layout": "transposed"}),
    ("elements apart", (2, 3, 5, 12), {"layout": "strided"}),
    ("nothing", (0, 3, 5, 12), {}),
)
_QUICK = ("plain", "part", "positions of each")
_CASES = (
    *(_case(name, shape, quick=name in _QUICK, tiny=True, **more) for name, shape, more in _SHAPES),
    *(
        _case(
            f"{name}, interleaved", shape, interleaved=True, quick=name in _QUICK, tiny=True, **more
        )
        for name, shape, more in _SHAPES
    ),
    _case("2 x 8 x 512 x 64", (2, 8, 512, 64)),
    _case("4 x 32 x 2048 x 128", (4, 32, 2048, 128), large=True),
)

OPERATORS = (
    Operator(
        "rotary_embedding",
        "rotary_embedding",
        "_rotary_embedding_fwd",
        make,
        lambda **arguments: {"output": functional.rotary_embedding(**arguments)},
        lambda **arguments: {"output": torch_rotary_embedding(**arguments)},
        _CASES,
        ("input", "positions", "output"),
    ),
)
