"""The layer_norm family's operators and cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..random import draw_seed, keep_mask, keep_scale
from .operators import FLOATING, Case, Operator, Problem

_HALVES = (torch.bfloat16, torch.float16)
#: fp64 has no better oracle than torch's own fp64, so it sits out where conditioning decides.
_CONDITIONED = (torch.float32, *_HALVES)


def make(
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    *,
    leading: Sequence[int],
    normalized: Sequence[int],
    outputs: Sequence[str] = ("output",),
    parameters: Sequence[str] = ("weight", "bias"),
    given: Sequence[str] | None = None,
    parameter_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    values: str = "normal",
    expanded_gradient: bool = False,
    **options: Any,
) -> Problem:
    """A problem of any operator of the family.

    Args:
        leading, normalized: the input is ``[*leading, *normalized]``.
        outputs: ``("output", "new_residual")`` with a residual.
        parameters: the parameters the operator has; ``given`` those the call has (default: all).
        parameter_dtype: the parameters' dtype where it is not the input's.
        layout: of input, residual and gradients: ``contiguous``, ``sliced`` (rows apart),
            ``strided`` (elements apart), ``transposed`` (the two leading dimensions swapped).
        values: ``normal``; ``offset`` (a mean of 1000 standard deviations); ``constant`` (no
            variance); ``special`` (one row with a NaN, one with an Inf).
        expanded_gradient: the output's gradient is one row, expanded (as from ``output.sum()``).
    """
    shape = (*leading, *normalized)

    def tensor(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    def laid_out() -> Tensor:
        if layout == "sliced":
            return tensor(*shape[:-1], shape[-1] + 3)[..., : shape[-1]]
        if layout == "transposed":
            return tensor(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        if layout == "strided":
            return tensor(*shape[:-1], 2 * shape[-1])[..., ::2]
        return tensor(*shape)

    input = laid_out()
    if values == "offset":
        input += 1000.0
    elif values == "constant":
        input.fill_(3.0)
    elif values == "special":
        flat = input.view(-1, math.prod(normalized))
        flat[0, 0], flat[-1, -1] = math.nan, math.inf
    arguments: dict[str, Tensor | None] = {"input": input}
    if "new_residual" in outputs:
        wide = bool(options.get("residual_in_fp32"))
        arguments["residual"] = laid_out().to(torch.float32 if wide else dtype)
    for name in parameters:
        centre = 1.0 if name == "weight" else 0.0
        parameter = centre + 0.5 * torch.randn(*normalized, generator=generator, device=device)
        is_given = given is None or name in given
        arguments[name] = parameter.to(parameter_dtype or dtype) if is_given else None
    grad_outputs = {name: laid_out() for name in outputs}
    if "new_residual" in grad_outputs and options.get("residual_in_fp32"):
        grad_outputs["new_residual"] = grad_outputs["new_residual"].float()
    if expanded_gradient:
        grad_outputs["output"] = tensor(*normalized).expand(shape)
    return Problem(
        arguments,
        grad_outputs,
        options={"normalized_shape": tuple(normalized), **options},
        differentiable=tuple(name for name, value in arguments.items() if value is not None),
        summed=dict.fromkeys(parameters, math.prod(leading)),
    )


# --- ours and torch's ----------------------------------------------------------------------------


def _one(function: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    return lambda **arguments: {"output": function(**arguments)}


def _two(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    def named(**arguments: Any) -> dict[str, Tensor]:
        return dict(zip(("output", "new_residual"), function(**arguments), strict=True))

    return named


def torch_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm``; parameters of another dtype in fp32 where it does not take them so."""
    shape = list(normalized_shape)
    mixed = any(p is not None and p.dtype != input.dtype for p in (weight, bias))
    if mixed and (input.is_cuda or input.dtype == torch.float32):
        weight, bias = (None if p is None else p.float() for p in (weight, bias))
        return F.layer_norm(input.float(), shape, weight, bias, eps).to(input.dtype)
    return F.layer_norm(input, shape, weight, bias, eps)


def torch_rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``F.rms_norm``, with a weight of another dtype in fp32.

    Without ``eps`` it is fp32's for every dtype but fp64, as torch takes it, and for the oracle of
    such a problem too: that is why it is always written out here.
    """
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    shape = list(normalized_shape)
    if weight is not None and weight.dtype != input.dtype:
        return F.rms_norm(input.float(), shape, weight.float(), eps).to(input.dtype)
    return F.rms_norm(input, shape, weight, eps)


def _torch_add(input: Tensor, residual: Tensor, dropout_p: float, residual_in_fp32: bool) -> Tensor:
    """``residual + dropout(input)`` with the mask our kernels draw from the same generator."""
    if residual_in_fp32 and input.dtype != torch.float64:
        input, residual = input.float(), residual.float()
    if dropout_p:
        keep = keep_mask(draw_seed(input.device), tuple(input.shape), dropout_p)
        input = input * keep * keep_scale(dropout_p)
    return residual + input


def torch_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    residual_in_fp32: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add, then ``F.layer_norm``."""
    new_residual = _torch_add(input, residual, dropout_p, residual_in_fp32)
    output = torch_layer_norm(new_residual, normalized_shape, weight, bias, eps)
    return output.to(input.dtype), new_residual


def torch_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    residual_in_fp32: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add, then ``F.rms_norm``."""
    new_residual = _torch_add(input, residual, dropout_p, residual_in_fp32)
    output = torch_rms_norm(new_residual, normalized_shape, weight, eps)
    return output.to(input.dtype), new_residual


# --- cases ---------------------------------------------------------------------------------------


def _case(
    name: str,
    leading: Sequence[int],
    normalized: Sequence[int],
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    quick: bool = False,
    tiny: bool = False,
    large: bool = False,
    **more: Any,
) -> Case:
    return Case(
        name, {"leading": leading, "normalized": normalized, **more}, dtypes, quick, tiny, large
    )


_COMMON = (
    _case("plain", (64,), (256,), quick=True),
    _case("one row", (1,), (1024,)),
    _case("no rows", (0,), (64,), quick=True, tiny=True),
    _case("no leading dimension", (), (64,), tiny=True),
    _case("three dimensions", (2, 3), (65,), quick=True, tiny=True),
    *(_case(f"length {n}", (5,), (n,), dtypes=_CONDITIONED, tiny=True) for n in (1, 2)),
    *(_case(f"length {n}", (5,), (n,), tiny=True) for n in (63, 64, 127)),
    *(_case(f"length {n}", (17,), (n,)) for n in (255, 768, 1000, 4096)),
    _case("length 12289", (4,), (12289,), quick=True),
    _case("length 65537", (3,), (65537,)),
    _case("length 262144", (2,), (262144,)),
    _case("many rows", (5000,), (96,), quick=True),
    _case("many short rows", (9001,), (7,)),
    _case("two normalized dimensions", (6,), (5, 13), tiny=True),
    _case("no parameters", (7,), (65,), given=(), tiny=True),
    _case("weight alone", (7,), (130,), given=("weight",), tiny=True),
    _case("fp32 parameters", (33,), (192,), dtypes=_HALVES, parameter_dtype=torch.float32),
    _case("rows apart", (9,), (65,), layout="sliced", quick=True, tiny=True),
    _case("transposed", (5, 7), (64,), layout="transposed", quick=True, tiny=True),
    _case("elements apart", (9,), (65,), layout="strided", tiny=True),
    _case("expanded gradient", (40,), (128,), expanded_gradient=True, quick=True, tiny=True),
    _case("mean of 1000 deviations", (32,), (512,), dtypes=_CONDITIONED, values="offset"),
    _case("no variance", (8,), (128,), dtypes=_CONDITIONED, values="constant"),
    _case("NaN and Inf", (4,), (100,), values="special", quick=True, tiny=True),
    _case("large eps", (8,), (64,), eps=0.1),
    *(
        _case(f"{m} x {n}", (m,), (n,), large=True)
        for m, n in ((65536, 256), (16384, 1024), (8192, 4096), (2048, 16384), (64, 131072))
    ),
    _case("4093 x 5003", (4093,), (5003,), large=True),
)
_ADD = (
    *_COMMON,
    _case("dropout", (40,), (130,), dropout_p=0.3, quick=True, tiny=True),
    _case("everything dropped", (6,), (64,), dropout_p=1.0),
    _case("residual in fp32", (30,), (129,), dtypes=_HALVES, residual_in_fp32=True, tiny=True),
    _case("dropout, fp32", (20,), (65,), dtypes=_HALVES, residual_in_fp32=True, dropout_p=0.1),
)


def _make_with(outputs: Sequence[str], parameters: Sequence[str]) -> Callable[..., Problem]:
    def make_one(
        dtype: torch.dtype, device: torch.device, generator: torch.Generator, **sizes: Any
    ) -> Problem:
        if "bias" not in parameters:  # RMSNorm: torch's eps would be another for the fp64 oracle
            sizes.setdefault("eps", torch.finfo(torch.float32).eps)
        return make(dtype, device, generator, outputs=outputs, parameters=parameters, **sizes)

    return make_one


_ROWS = ("input", "residual", "output", "new_residual")
_OP = "_layer_norm_fwd"

OPERATORS = (
    Operator(
        "layer_norm",
        "layer_norm",
        _OP,
        _make_with(("output",), ("weight", "bias")),
        _one(functional.layer_norm),
        _one(torch_layer_norm),
        _COMMON,
        _ROWS,
    ),
    Operator(
        "rms_norm",
        "layer_norm",
        _OP,
        _make_with(("output",), ("weight",)),
        _one(functional.rms_norm),
        _one(torch_rms_norm),
        _COMMON,
        _ROWS,
    ),
    Operator(
        "add_layer_norm",
        "layer_norm",
        _OP,
        _make_with(("output", "new_residual"), ("weight", "bias")),
        _two(functional.add_layer_norm),
        _two(torch_add_layer_norm),
        _ADD,
        _ROWS,
    ),
    Operator(
        "add_rms_norm",
        "layer_norm",
        _OP,
        _make_with(("output", "new_residual"), ("weight",)),
        _two(functional.add_rms_norm),
        _two(torch_add_rms_norm),
        _ADD,
        _ROWS,
    ),
)
