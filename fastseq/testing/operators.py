"""What an operator is to a checker: its arguments, torch's equivalent, and the cases to try.

An :class:`Operator` knows how to make a :class:`Problem` (the arguments of one call and the
gradients of its outputs) and two functions to run it through, ours and torch's. The oracle is
torch's in fp64, so no kernel is judged by code of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from .errors import MismatchError, error_ratio

#: A function under test: a problem's arguments and options by name to its outputs by name.
Function = Callable[..., Mapping[str, Tensor]]
Ratios = dict[str, tuple[float, float]]

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Problem:
    """The arguments of one call.

    Attributes:
        arguments: tensors (or None) by argument name.
        options: what is not a tensor, by argument name.
        grad_outputs: the gradient of each output, by output name; an output without one is not
            differentiated.
        differentiable: the arguments whose gradients are wanted.
        summed: arguments whose gradient is a sum over that many terms (see :func:`error_ratio`).
        written: arguments that a call writes in place; :func:`run` hands out copies of them.
    """

    arguments: dict[str, Tensor | None]
    grad_outputs: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    summed: dict[str, int] = field(default_factory=dict)
    written: tuple[str, ...] = ()

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem with every floating tensor converted."""

        def convert(tensor: Tensor | None) -> Tensor | None:
            floating = tensor is not None and tensor.is_floating_point()
            return tensor.to(dtype) if tensor is not None and floating else tensor

        return replace(
            self,
            arguments={name: convert(tensor) for name, tensor in self.arguments.items()},
            grad_outputs={name: grad.to(dtype) for name, grad in self.grad_outputs.items()},
        )

    def perturbed(self) -> Problem:
        """The same problem with every floating number moved by up to an ulp, up or down."""

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or not tensor.is_floating_point():
                return tensor
            generator = torch.Generator(tensor.device).manual_seed(1 + tensor.numel())
            noise = torch.rand(tensor.shape, generator=generator, device=tensor.device) * 2 - 1
            return tensor * (1 + torch.finfo(tensor.dtype).eps * noise.to(tensor))

        return replace(
            self,
            arguments={name: move(tensor) for name, tensor in self.arguments.items()},
            grad_outputs={n: g for n, t in self.grad_outputs.items() if (g := move(t)) is not None},
        )

    def leaves(self) -> dict[str, Tensor | None]:
        """The arguments as fresh autograd leaves that share memory (and strides) with these."""
        return {
            name: tensor.detach().requires_grad_()
            if tensor is not None and name in self.differentiable
            else tensor
            for name, tensor in self.arguments.items()
        }


@dataclass(frozen=True)
class Case:
    """One point of an operator's case list.

    Attributes:
        name: what the case is about.
        sizes: what ``Operator.make`` needs to know, by name.
        dtypes: the dtypes the case makes sense in.
        quick: whether ``fastseq verify --quick`` has it.
        tiny: whether an interpreter gets through it in a second or two.
        large: whether it is a real size, for accelerators only.
    """

    name: str
    sizes: dict[str, Any]
    dtypes: tuple[torch.dtype, ...] = FLOATING
    quick: bool = False
    tiny: bool = False
    large: bool = False


@dataclass(frozen=True)
class Operator:
    """A public function, torch's equivalent, and how to try both.

    Attributes:
        name: the public function's name in ``fastseq.functional``.
        family: the family it belongs to.
        op: its forward op in ``fastseq.ops._op.REGISTRY``, which lists the backends.
        make: ``make(dtype, device, generator, **sizes)`` returns a problem.
        ours: our function.
        torch: the same from torch's own functions, in any dtype.
        cases: what ``verify`` and the tests try.
        rows: the arguments and outputs that can be cut along dimension 0 with each row's result
            unchanged to the bit; empty where rows depend on each other.
    """

    name: str
    family: str
    op: str
    make: Callable[..., Problem]
    ours: Function
    torch: Function
    cases: tuple[Case, ...]
    rows: tuple[str, ...] = ()


def make_problem(
    operator: Operator,
    sizes: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> Problem:
    """The operator's problem of these sizes; the same numbers for the same seed on a device.

    They are drawn on the device: a GPU's gigabytes would take the host's generator seconds.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return operator.make(dtype, torch.device(device), generator, **sizes)


def run(function: Function, problem: Problem, *, gradients: bool = True) -> dict[str, Tensor]:
    """Outputs of ``function`` and, as ``grad_<argument>``, its gradients.

    The torch generator is seeded first, so that a function that draws a seed draws the same one.
    """
    torch.manual_seed(0)
    if problem.written:
        copies = {name: _copy(problem.arguments[name]) for name in problem.written}
        problem = replace(problem, arguments={**problem.arguments, **copies})
    if not gradients or not problem.differentiable:
        with torch.no_grad():
            return dict(function(**problem.arguments, **problem.options))
    leaves = problem.leaves()
    outputs = dict(function(**leaves, **problem.options))
    wanted = [name for name in problem.differentiable if leaves[name] is not None]
    differentiated = [name for name in outputs if name in problem.grad_outputs]
    grads = torch.autograd.grad(
        [outputs[name] for name in differentiated],
        [leaf for name in wanted if (leaf := leaves[name]) is not None],
        [problem.grad_outputs[name] for name in differentiated],
    )
    named = {f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {**{name: output.detach() for name, output in outputs.items()}, **named}


def _copy(tensor: Tensor | None) -> Tensor | None:
    """In memory of its own, with the same strides, gaps between rows included."""
    if tensor is None:
        return None
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return copy.copy_(tensor)


@dataclass(frozen=True)
class Yardstick:
    """What a problem's results are measured with: torch's in its dtype, and the fp64 oracle's."""

    problem: Problem
    torch: dict[str, Tensor]
    oracle: dict[str, Tensor]

    def ratios(self, results: Mapping[str, Tensor]) -> Ratios:
        """``(max_ratio, rms_ratio)`` of every result.

        Raises:
            MismatchError: a shape, dtype or name differs from torch's.
        """
        unknown = results.keys() - self.torch.keys()
        if unknown:
            raise MismatchError(f"torch has no {', '.join(sorted(unknown))}")
        ratios = {}
        for name, result in results.items():
            summed = self.problem.summed.get(name.removeprefix("grad_"), 1)
            try:
                ratios[name] = error_ratio(
                    result, self.torch[name], self.oracle[name], summed=summed
                )
            except MismatchError as mismatch:
                raise MismatchError(f"{name}: {mismatch}") from None
        return ratios


def measure_torch(
    operator: Operator,
    problem: Problem,
    *,
    gradients: bool = True,
    theirs: dict[str, Tensor] | None = None,
) -> Yardstick:
    """Run torch's equivalent on the problem, as it is and in fp64.

    For fp64 problems no better arithmetic is at hand, and the oracle errs as the kernels do. There
    torch's result is taken on inputs that are moved by up to an ulp each: what that changes is the
    error no algorithm can be blamed for.

    Args:
        gradients: whether they are wanted.
        theirs: torch's results on the problem as it is, where they are at hand.
    """
    oracle = run(operator.torch, problem.to(torch.float64), gradients=gradients)
    if any(t is not None and t.dtype == torch.float64 for t in problem.arguments.values()):
        problem, theirs = problem.perturbed(), None
    if theirs is None:
        theirs = run(operator.torch, problem, gradients=gradients)
    return Yardstick(problem, theirs, oracle)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, fresh tensors are filled with NaN (integers: their largest value), not left as found.

    A result that changes in here was not fully written, or was computed from memory nobody wrote.
    """
    settings: Any = torch.utils.deterministic  # its property is not in torch's type stubs
    fill, deterministic, warn_only = (
        settings.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def identical(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> str | None:
    """The name of the first result that differs at all (NaN equals NaN), or None."""
    for name, tensor in left.items():
        other = right[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return name
        same = (tensor == other) | (tensor.isnan() & other.isnan())
        if not bool(same.all()):
            return name
    return None


def narrow(operator: Operator, problem: Problem, rows: int) -> Problem:
    """The problem's first ``rows`` rows, cut from the arguments and gradients that have rows."""

    def cut(name: str, tensor: Tensor | None) -> Tensor | None:
        return tensor[:rows] if tensor is not None and name in operator.rows else tensor

    return replace(
        problem,
        arguments={name: cut(name, tensor) for name, tensor in problem.arguments.items()},
        grad_outputs={
            name: grad[:rows] if name in operator.rows else grad
            for name, grad in problem.grad_outputs.items()
        },
    )
