"""The cross_entropy family's operators and cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from .operators import FLOATING, Case, Operator, Problem

_HALVES = (torch.bfloat16, torch.float16)
#: fp64 has no better oracle than torch's own fp64, which errs by some ulps itself (it sums the
#: smoothed target's gradient over all classes): where there are many classes it sits out.
_MEASURABLE = (torch.float32, *_HALVES)
_IGNORED = -100


def make(
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    leading: Sequence[int],
    classes: int,
    inner: Sequence[int] = (),
    weighted: bool = False,
    ignored: float = 0.2,
    layout: str = "contiguous",
    values: str = "normal",
    **options: Any,
) -> Problem:
    """A problem of cross_entropy.

    Args:
        leading, classes, inner: the logits are ``[*leading, classes, *inner]``.
        weighted: whether there are class weights.
        ignored: the share of targets that are ignored.
        layout: of the logits: ``contiguous``, ``sliced`` (rows apart), ``strided`` (elements
            apart), ``classes last`` (a view of ``[*leading, *inner, classes]``).
        values: ``normal``; ``offset``: 1000 more; ``large``: a thousandfold; ``special``: a row
            with -Inf in it, one of -Inf alone, one with +Inf and one with NaN.
        options: what else the function takes.
    """

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    shape = (*leading, classes, *inner)
    if layout == "sliced":
        logits = tensor(*shape[:-1], shape[-1] + 3)[..., :-3]
    elif layout == "strided":
        logits = tensor(*shape[:-1], 2 * shape[-1])[..., ::2]
    elif layout == "classes last":
        logits = tensor(*leading, *inner, classes).movedim(-1, 1)
    else:
        logits = tensor(*shape)
    if values == "offset":
        logits += 1000.0
    elif values == "large":
        logits *= 1000.0
    targets = (*leading, *inner)
    target = torch.randint(0, classes, targets, generator=generator, device=device)
    if ignored:
        drawn = torch.rand(targets, generator=generator, device=device)
        target = torch.where(drawn < ignored, options.get("ignore_index", _IGNORED), target)
    if values == "special":
        target[:4] = 1
        logits[0, ::2] = -math.inf
        logits[1] = -math.inf
        logits[2, 0] = math.inf
        logits[3, 0] = math.nan
    weight = None
    if weighted:
        weight = torch.rand(classes, generator=generator, device=device).to(dtype) + 0.5
    none = options.get("reduction") == "none"
    grad_outputs = {"loss": tensor(*(targets if none else ()))}
    if options.get("return_lse"):
        grad_outputs["lse"] = tensor(*targets).to(torch.promote_types(dtype, torch.float32))
    return Problem(
        {"input": logits, "target": target, "weight": weight},
        grad_outputs,
        options=options,
        differentiable=("input",),
        summed={} if none else {"loss": math.prod(targets)},
    )


def cross_entropy(**arguments: Any) -> dict[str, Tensor]:
    """Ours, its results by name."""
    made = functional.cross_entropy(**arguments)
    return {"loss": made[0], "lse": made[1]} if arguments.get("return_lse") else {"loss": made}


def torch_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    return_lse: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """``F.cross_entropy``; what it lacks by torch's own operations around it, in fp32."""
    if softcap is None and not z_loss and not return_lse:
        return {"loss": F.cross_entropy(input, target, weight, **options)}
    compute = torch.promote_types(input.dtype, torch.float32)
    z = input.to(compute)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    weights = z.new_ones(z.shape[1]) if weight is None else weight.to(compute)
    reduction = options.pop("reduction", "mean")
    losses = F.cross_entropy(z, target, weights, reduction="none", **options)
    kept = target != options.get("ignore_index", _IGNORED)
    counts = torch.where(kept, weights[torch.where(kept, target, 0)], 0.0)
    lse = torch.logsumexp(z, 1)
    losses = losses + z_loss * counts * lse.square()
    if reduction == "mean":
        loss = losses.sum() / counts.sum()
    else:
        loss = losses if reduction == "none" else losses.sum()
    results = {"loss": loss.to(input.dtype)}
    return {**results, "lse": lse} if return_lse else results


def _case(
    name: str,
    leading: Sequence[int],
    classes: int,
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    quick: bool = False,
    tiny: bool = False,
    large: bool = False,
    **more: Any,
) -> Case:
    sizes = {"leading": leading, "classes": classes, **more}
    return Case(name, sizes, dtypes, quick, tiny, large)


_EVERYTHING: dict[str, Any] = {"weighted": True, "label_smoothing": 0.1, "z_loss": 0.01}
_CASES = (
    _case("plain", (64,), 1000, dtypes=_MEASURABLE, quick=True),
    _case("one row", (1,), 100, ignored=0.0, quick=True, tiny=True),
    _case("no batch", (), 65, ignored=0.0, tiny=True),
    _case("no rows, sum", (0,), 64, reduction="sum", quick=True, tiny=True),
    _case("no rows, none", (0,), 64, reduction="none", tiny=True),
    *(_case(f"{n} classes", (9,), n, reduction="none", tiny=True) for n in (1, 63, 127)),
    *(_case(f"{n} classes", (17,), n, reduction="none") for n in (2, 64, 255, 768, 4096)),
    _case("9001 classes", (5,), 9001, reduction="none", quick=True, tiny=True),
    _case("50257 classes", (7,), 50257, label_smoothing=0.1, dtypes=_MEASURABLE),
    _case("many rows", (3000,), 33, reduction="sum", quick=True),
    _case("past the cache", (525,), 8005, dtypes=(torch.float32,)),
    _case("past the cache, 16 bits", (1050,), 8005, dtypes=(torch.bfloat16,)),
    _case("none", (12,), 65, reduction="none", quick=True, tiny=True),
    _case("sum", (12,), 65, reduction="sum", quick=True, tiny=True),
    _case("weights", (40,), 65, weighted=True, quick=True, tiny=True),
    _case("smoothing", (12,), 130, label_smoothing=0.1, quick=True, tiny=True),
    _case("smoothing alone", (12,), 65, label_smoothing=1.0, reduction="none", tiny=True),
    _case("weights and smoothing", (12,), 65, weighted=True, label_smoothing=0.3, tiny=True),
    _case("a class is ignored", (20,), 5, ignore_index=2, reduction="none", tiny=True),
    _case("a class is ignored, mean", (20,), 5, ignore_index=2, weighted=True, tiny=True),
    _case("all ignored, sum", (6,), 65, ignored=1.1, reduction="sum", tiny=True),
    _case("softcap", (20,), 130, softcap=2.0, reduction="none", quick=True, tiny=True),
    _case("softcap of 30", (20,), 1000, softcap=30.0),
    _case("z_loss", (20,), 65, z_loss=0.1, quick=True, tiny=True),
    _case("lse", (20,), 65, return_lse=True, reduction="none", quick=True, tiny=True),
    _case(
        "everything", (20,), 130, softcap=5.0, return_lse=True, quick=True, tiny=True, **_EVERYTHING
    ),
    _case("rows apart", (9,), 65, layout="sliced", quick=True, tiny=True),
    _case("elements apart", (9,), 65, layout="strided", tiny=True),
    _case("classes last", (3,), 65, inner=(7,), layout="classes last", quick=True, tiny=True),
    _case("classes first", (3,), 65, inner=(7,), reduction="none", quick=True, tiny=True),
    _case("two inner dimensions", (2,), 9, inner=(3, 5), tiny=True, **_EVERYTHING),
    _case("offset", (20,), 300, values="offset", dtypes=(torch.float32,), reduction="none"),
    _case("large", (20,), 300, values="large", reduction="none", dtypes=_MEASURABLE),
    _case(
        "NaN and Inf",
        (8,),
        100,
        values="special",
        ignored=0.0,
        reduction="none",
        quick=True,
        tiny=True,
    ),
    *(
        _case(f"{m} x {n}", (m,), n, large=True)
        for m, n in ((65536, 1000), (8192, 32000), (8192, 50257), (4096, 128256))
    ),
)

# --- linear_cross_entropy ------------------------------------------------------------------------


def make_linear(
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    leading: Sequence[int],
    features: int,
    classes: int,
    bias: bool = False,
    weighted: bool = False,
    ignored: float = 0.2,
    **options: Any,
) -> Problem:
    """A problem of linear_cross_entropy: hidden states ``[*leading, features]``."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    target = torch.randint(0, classes, tuple(leading), generator=generator, device=device)
    if ignored:
        drawn = torch.rand(tuple(leading), generator=generator, device=device)
        target = torch.where(drawn < ignored, _IGNORED, target)
    weight = None
    if weighted:
        weight = torch.rand(classes, generator=generator, device=device).to(dtype) + 0.5
    none = options.get("reduction") == "none"
    terms = math.prod(leading)
    return Problem(
        {
            "input": tensor(*leading, features),
            "linear_weight": tensor(classes, features) / features**0.5,
            "target": target,
            "linear_bias": tensor(classes) if bias else None,
            "weight": weight,
        },
        {"loss": tensor(*(leading if none else ()))},
        options=options,
        differentiable=("input", "linear_weight", "linear_bias"),
        summed={
            "input": classes,
            "linear_weight": terms,
            "linear_bias": terms,
            "loss": features if none else terms + features,
        },
    )


def linear_cross_entropy(**arguments: Any) -> dict[str, Tensor]:
    """Ours, its result by name."""
    return {"loss": functional.linear_cross_entropy(**arguments)}


def torch_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The plain pair: ``F.linear``, then ``F.cross_entropy``."""
    logits = F.linear(input, linear_weight, linear_bias).reshape(-1, linear_weight.shape[0])
    results = torch_cross_entropy(logits, target.reshape(-1), weight, **options)
    loss = results["loss"]
    return {"loss": loss.reshape(target.shape) if loss.dim() else loss}


def _linear_case(
    name: str, leading: Sequence[int], features: int, classes: int, **more: Any
) -> Case:
    flags = {flag: more.pop(flag, False) for flag in ("quick", "tiny", "large")}
    dtypes = more.pop("dtypes", FLOATING)
    sizes = {"leading": leading, "features": features, "classes": classes, **more}
    return Case(name, sizes, dtypes, **flags)


_LINEAR_CASES = (
    _linear_case("plain", (33,), 32, 300, quick=True, tiny=True),
    _linear_case("bias", (20,), 17, 65, bias=True, quick=True, tiny=True),
    _linear_case("sum", (20,), 17, 65, bias=True, reduction="sum", tiny=True),
    _linear_case("none", (20,), 17, 65, bias=True, reduction="none", quick=True, tiny=True),
    _linear_case("two leading dimensions", (3, 5), 16, 64, reduction="none", tiny=True),
    _linear_case("no tokens", (0,), 16, 64, reduction="sum", quick=True, tiny=True),
    _linear_case("everything", (20,), 16, 130, bias=True, softcap=5.0, tiny=True, **_EVERYTHING),
    _linear_case("several chunks", (700,), 8, 30011, dtypes=(torch.float32,), bias=True),
    _linear_case("several chunks, 16 bits", (1400,), 8, 30011, dtypes=(torch.bfloat16,)),
    *(
        _linear_case(f"{m} x {h} x {n}", (m,), h, n, large=True, dtypes=_MEASURABLE)
        for m, h, n in ((8192, 4096, 32000), (4096, 2048, 128256))
    ),
)

OPERATORS = (
    Operator(
        "cross_entropy",
        "cross_entropy",
        "_cross_entropy_fwd",
        make,
        cross_entropy,
        torch_cross_entropy,
        _CASES,
    ),
    Operator(
        "linear_cross_entropy",
        "cross_entropy",
        "_linear_cross_entropy_fwd",
        make_linear,
        linear_cross_entropy,
        torch_linear_cross_entropy,
        _LINEAR_CASES,
    ),
)
