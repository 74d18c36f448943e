"""Norms that are not torch's own classes but compute what :mod:`fastseq.functional` computes.

Libraries and models written from scratch have their own: ``LlamaRMSNorm``, ``T5LayerNorm``,
Gemma's with ``1 + weight``, a LayerNorm without a bias. One is recognised by what it is, not by
its name: a module without children and buffers, with at most a ``weight`` and a ``bias`` of one
dimension and an epsilon, whose ``forward`` takes one tensor and, tried on numbers, gives the
results and gradients of one of the formulas here. It then becomes an instance of a subclass of its
own class that calls our kernel and keeps to the dtypes that were seen.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import functional
from ..functional._dispatch import FLOATING
from ..reference import layer_norm as reference

#: The formulas: with the mean taken out or not, by the weight or by one more than it.
LAYER, LAYER_PLUS_ONE = "layer_norm", "layer_norm by 1 + weight"
RMS, RMS_PLUS_ONE = "rms_norm", "rms_norm by 1 + weight"

#: What autocast does to a forward: nothing that its dtypes do not show; what it does to torch's
#: function; or something between, for which the forward itself has to run.
OWN, TORCHS, MIXED = "own", "torch's", "mixed"


@dataclass(frozen=True)
class Recipe:
    """What a norm computes.

    Attributes:
        formula: one of this file's constants.
        eps: the name of the attribute that holds it, or the number that stands in the code.
        dtypes: of the input, of the weight (the input's, where there is none), of the result.
        autocast: one of this file's constants.
    """

    formula: str
    eps: str | float
    dtypes: tuple[tuple[torch.dtype, torch.dtype, torch.dtype], ...]
    autocast: str


class AdaptedNorm(nn.Module):
    """What the adapters are instances of, beside the class that each was made for."""

    original: type[nn.Module]
    recipe: Recipe
    results: dict[tuple[torch.dtype, torch.dtype], torch.dtype]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        (input,) = (*args, *kwargs.values())  # it has one parameter, by a name of its own
        recipe = self.recipe
        weight: Tensor | None = getattr(self, "weight", None)
        output_dtype = self.results.get((input.dtype, (input if weight is None else weight).dtype))
        under_autocast = not input.is_meta and torch.is_autocast_enabled(input.device.type)
        if output_dtype is None or (recipe.autocast == MIXED and under_autocast):
            return cast(Tensor, self.original.forward(self, input))
        if output_dtype.itemsize > input.dtype.itemsize:
            input = input.to(output_dtype)
        eps = recipe.eps if isinstance(recipe.eps, float) else getattr(self, recipe.eps)
        if recipe.formula in (LAYER_PLUS_ONE, RMS_PLUS_ONE) and weight is not None:
            weight = 1.0 + weight.to(torch.promote_types(weight.dtype, torch.float32))
        shape = input.shape[-1:]
        if recipe.formula in (LAYER, LAYER_PLUS_ONE):
            bias = getattr(self, "bias", None)
            output = functional.layer_norm(input, shape, weight, bias, eps)
        else:
            output = functional.rms_norm(input, shape, weight, eps)
        if recipe.autocast == TORCHS and under_autocast:
            return output
        return output.to(output_dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """By what the class was made of: no import finds it under a name."""
        return _blank, (self.original, self.recipe), super().__reduce_ex__(protocol)[2]


_ADAPTERS: dict[tuple[type[nn.Module], Recipe], type[AdaptedNorm]] = {}


def adapter(original: type[nn.Module], recipe: Recipe) -> type[AdaptedNorm]:
    """The subclass of a norm's class that runs the recipe on our kernels; always the same one."""
    body = {
        "__doc__": f"{original.__name__} on fastseq's {recipe.formula}.",
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "original": original,
        "recipe": recipe,
        "results": {(x, weight): result for x, weight, result in recipe.dtypes},
    }
    if (original, recipe) not in _ADAPTERS:
        _ADAPTERS[original, recipe] = types.new_class(
            original.__name__, (AdaptedNorm, original), exec_body=lambda space: space.update(body)
        )
    return _ADAPTERS[original, recipe]


def _blank(original: type[nn.Module], recipe: Recipe) -> AdaptedNorm:
    kind = adapter(original, recipe)
    return kind.__new__(kind)


def is_adapted(module: nn.Module) -> bool:
    """Whether :func:`fastseq.accelerate` has made it one of the adapters, and nothing on top."""
    kind = type(module)
    return isinstance(module, AdaptedNorm) and "recipe" in vars(kind)


def looks_like_norm(module: nn.Module) -> bool:
    """Whether it is a norm, by its name or by what it derives from."""
    kind = type(module)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    # weight_norm's and spectral_norm's own modules; not what parametrize makes of a norm.
    of_weights = kind.__module__.startswith("torch.nn.utils") and kind.__mro__[1] is nn.Module
    return "norm" in kind.__name__.lower() and not of_weights


# --- what a norm computes ------------------------------------------------------------------------


def recipe_of(module: nn.Module) -> Recipe | str:
    """What a norm computes, or why it is none that we have."""
    try:
        with torch.inference_mode(False), torch.device("cpu"):
            return _structure(module) or _tried(module)
    except Exception as error:  # somebody else's code, on inputs it was not made for
        return f"its forward did not take a plain tensor: {type(error).__name__}: {error}"


#: What every module has, and what hides the class's forward, which is for the caller to mind.
_BOOKKEEPING = frozenset((*vars(nn.Module()), "forward"))
_PLAIN = (type(None), bool, int, float, str, torch.dtype)


def _structure(module: nn.Module) -> str | None:
    """Why it cannot be a norm of the kind that we have, from its parts."""
    if module._modules:
        return "it has modules inside"
    if module._buffers:
        return f"it has buffers: {', '.join(module._buffers)}"
    parameters = _parameters(module)
    if parameters.keys() - {"weight", "bias"}:
        return f"it has parameters beside weight and bias: {', '.join(parameters)}"
    if "bias" in parameters and "weight" not in parameters:
        return "it has a bias without a weight"
    shapes = {tuple(p.shape) for p in parameters.values()}
    if len(shapes) > 1 or any(len(shape) != 1 or shape[0] < 2 for shape in shapes):
        return f"its parameters are not one row: {', '.join(map(str, map(list, shapes)))}"
    for name, value in _attributes(module).items():
        plain = isinstance(value, _PLAIN) or (
            isinstance(value, (tuple, list)) and all(isinstance(item, _PLAIN) for item in value)
        )
        if not plain:
            return f"it keeps a {type(value).__name__} in self.{name}"
    positional = [
        p
        for p in inspect.signature(type(module).forward).parameters.values()
        if p.kind is not inspect.Parameter.POSITIONAL_ONLY or p.name != "/"
    ][1:]
    if len(positional) != 1 or positional[0].kind not in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.POSITIONAL_ONLY,
    ):
        return f"its forward takes {len(positional)} arguments, not one tensor"
    return None


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module._parameters.items() if p is not None}


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _BOOKKEEPING}


_FOUND: dict[tuple[Any, ...], Recipe | str] = {}


def _tried(module: nn.Module) -> Recipe | str:
    """Runs the class's forward on numbers; once for all modules that are alike."""
    parameters = {name: tuple(p.shape) for name, p in _parameters(module).items()}
    attributes = sorted((name, repr(value)) for name, value in _attributes(module).items())
    key = (type(module), tuple(parameters.items()), tuple(attributes))
    if key not in _FOUND:
        normalized = getattr(module, "normalized_shape", (48,))  # of those without a weight
        row = next(iter(parameters.values()), tuple(normalized))[-1]
        _FOUND[key] = _try(module, row, set(parameters))
    return _FOUND[key]


def _try(module: nn.Module, row: int, parameters: set[str]) -> Recipe | str:
    code = _code(type(module).forward)
    sources: list[str | float] = [
        name
        for name, value in _attributes(module).items()
        if "eps" in name.lower() and isinstance(value, float)
    ]
    sources += [c for c in code.co_consts if isinstance(c, float) and 0.0 < c < 0.1]
    if not sources:
        return "it has no epsilon, neither as an attribute nor as a number in its forward"
    formulas = [LAYER, LAYER_PLUS_ONE]
    if "bias" not in parameters:
        formulas = [RMS, RMS_PLUS_ONE, *formulas]
    if "weight" not in parameters:
        formulas = [RMS, LAYER]
    for eps in sources:
        number = eps if isinstance(eps, float) else getattr(module, eps)
        for formula in formulas:
            if all(
                _agrees(module, row, parameters, formula, number, training=training)
                for training in (False, True)
            ) and _is_of_the_last_dimension(module, row, parameters, formula, number):
                dtypes = tuple(_result_dtypes(module, row, parameters, formula, number))
                return Recipe(formula, eps, dtypes, _autocast(code))
    return "tried on numbers, it computes neither a layer norm nor an RMS norm"


def _autocast(code: types.CodeType) -> str:
    names = set(code.co_names)
    if any("autocast" in name for name in names):
        return MIXED
    # torch.nn's classes call functions of these names, and `super().forward` does.
    if not names & {"layer_norm", "rms_norm", "forward"}:
        return OWN
    casts = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
    return MIXED if names & casts else TORCHS


def _code(forward: Callable[..., Any]) -> types.CodeType:
    function: Any = inspect.unwrap(forward)
    return cast(types.CodeType, function.__code__)


def _numbers(row: int, parameters: set[str], eps: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows that tell the formulas apart: with a mean, and so small that epsilon counts."""
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    x = torch.randn(2, 3, row, **draw) + 0.5  # type: ignore[call-overload]
    x *= torch.tensor([1.0, 30.0, math.sqrt(max(eps, 1e-14))], **_CPU)[:, None]
    values = {
        name: 0.7 + 0.5 * torch.randn(row, **draw)  # type: ignore[call-overload]
        for name in sorted(parameters)
    }
    return x, values


_CPU: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def _run(module: nn.Module, x: Tensor, values: dict[str, Tensor], *, training: bool) -> Tensor:
    """The class's own forward, in a module like this one with these values."""
    twin = type(module).__new__(type(module))
    given = {**vars(module), "_parameters": {**module._parameters, **values}, "training": training}
    vars(twin).update(given)
    output = type(module).forward(twin, x)
    if not isinstance(output, Tensor):
        raise TypeError(f"it returned a {type(output).__name__}")
    after = vars(twin)
    if after.keys() != given.keys() or any(after[name] is not given[name] for name in given):
        raise TypeError("it changes its own attributes")
    return output


def _formula(name: str, x: Tensor, values: dict[str, Tensor], eps: float) -> Tensor:
    weight, bias = values.get("weight"), values.get("bias")
    if name in (LAYER_PLUS_ONE, RMS_PLUS_ONE) and weight is not None:
        weight = 1.0 + weight
    rms = name in (RMS, RMS_PLUS_ONE)
    return reference.layer_norm(x, x.shape[-1:], weight, bias, eps, rms=rms, output_dtype=x.dtype)


def _agrees(
    module: nn.Module,
    row: int,
    parameters: set[str],
    formula: str,
    eps: float,
    *,
    training: bool,
) -> bool:
    """Results and gradients in fp32, against the formula in fp64."""
    x, values = _numbers(row, parameters, eps)

    def results(run: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (x, *values.values())]
        output = run(inputs[0], dict(zip(values, inputs[1:], strict=True)))
        if output.shape != x.shape:
            return []
        # Not the sum, of which a norm's gradient is zero.
        grads = torch.autograd.grad((output * x.to(dtype).flip(-1)).sum(), inputs)
        return [output.detach().double(), *(grad.double() for grad in grads)]

    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        theirs = results(lambda a, p: _run(module, a, p, training=training), torch.float32)
        wanted = results(lambda a, p: _formula(formula, a, p, eps), torch.float64)
    return bool(theirs) and all(
        bool(((their - want).abs() <= 1e-4 * want.abs().amax(-1, keepdim=True)).all())
        for their, want in zip(theirs, wanted, strict=True)
    )


def _is_of_the_last_dimension(
    module: nn.Module, row: int, parameters: set[str], formula: str, eps: float
) -> bool:
    """Whether matrices and images are rows to it, too; some take the second of four dimensions."""
    _, values = _numbers(row, parameters, eps)
    values = {name: value.float() for name, value in values.items()}
    generator = torch.Generator().manual_seed(2)
    for shape in ((3, row), (1, row if row <= 1024 else 2, 1, row)):
        x = torch.randn(shape, generator=generator)
        with torch.no_grad():
            output = _run(module, x, values, training=False)
            wanted = _formula(formula, x, values, eps)
        if output.shape != wanted.shape or not torch.allclose(output, wanted, 1e-3, 1e-3):
            return False
    return True


def _result_dtypes(
    module: nn.Module, row: int, parameters: set[str], formula: str, eps: float
) -> list[tuple[torch.dtype, torch.dtype, torch.dtype]]:
    """The dtypes it takes and what it makes of them; what it refuses is not among them."""
    x, values = _numbers(row, parameters, eps)
    wanted = _formula(formula, x, values, eps)
    found = []
    for dtype in FLOATING:
        for weight in FLOATING if "weight" in parameters else (dtype,):
            given = {name: value.to(weight) for name, value in values.items()}
            try:
                with torch.no_grad():
                    output = _run(module, x.to(dtype), given, training=False)
            except RuntimeError:
                continue
            # The row that epsilon is for has no digits left in 16 bits.
            close = torch.allclose(output[:, :2].double(), wanted[:, :2], rtol=0.05, atol=0.05)
            if close and output.dtype in FLOATING:
                found.append((dtype, weight, output.dtype))
    return found
