"""What a benchmark is: an operator, the sizes to sweep, the least a call can cost, and rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastseq.testing import Operator, Problem
from fastseq.testing.operators import Function

#: inference: no gradient recorded; fwd: recorded; bwd: the gradients alone; fwd+bwd: both.
MODES = ("inference", "fwd", "bwd", "fwd+bwd")
SUITES = ("smoke", "cpu", "gpu", "baselines", "all")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
Sizes = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """The least a call can do: bytes to and from memory, floating-point operations.

    ``matmul`` says whether the operations are matrix products, to be held to that ceiling; others
    are only reported.
    """

    bytes: int
    flops: int = 0
    matmul: bool = False


@dataclass(frozen=True)
class Provider:
    """Something that can serve an operator.

    Attributes:
        name: as in tables and ``--providers``.
        function: called as the operator's own functions are.
        backend: the fastseq backend forced around it, or None.
        setup: wraps the function before use (``torch.compile``); called anew for every problem.
        checked: False for what cannot be held against the oracle: torch's op draws a dropout mask
            of its own. Only the baseline may be that.
    """

    name: str
    function: Function
    backend: str | None = None
    setup: Callable[[Function], Function] | None = None
    checked: bool = True


@dataclass(frozen=True)
class Asked:
    """What fastseq is meant to reach somewhere; the tables print it beside what it does reach.

    Attributes:
        sizes, mode, dtype: where.
        speedup: over torch, at least.
        memory: peak memory, at most this part of torch's.
        beside, times: the time, at most so many ``times`` fastseq's own at sizes ``beside``.
    """

    sizes: Sizes
    mode: str
    dtype: str
    speedup: float | None = None
    memory: float | None = None
    beside: Sizes | None = None
    times: float | None = None


def asked(
    points: Iterable[Sizes], *modes: str, memory: float | None = None, **speedups: float
) -> tuple[Asked, ...]:
    """The same of several sizes and modes: ``asked(_LARGE, "bwd", fp32=1.1, bf16=2.5)``."""
    return tuple(
        Asked(sizes, mode, dtype, speedup, memory)
        for sizes in points
        for mode in modes
        for dtype, speedup in speedups.items()
    )


@dataclass(frozen=True)
class Benchmark:
    """One row of the registry.

    Attributes:
        operator: from ``fastseq.testing``: makes problems, has torch's equivalent and the oracle.
        sweeps: the sizes of each suite, passed to ``operator.make``. ``all`` has those of the
            device's suite and its own; ``baselines`` those of ``gpu`` where it has none.
        label: names a point, ``"8192x1024"``.
        cost: of a problem in mode ``fwd`` (``inference`` likewise) or ``bwd``.
        rivals: third-party providers; called once, returns those that can be imported.
        asked: what is to be reached on a CPU with one thread and with two, memory reused.
        baseline: torch's own function where it is not the one that defines what is right.
        slow: a call takes seconds on a CPU: what is asked of it comes after the others'.
        modes: those of :data:`MODES` that the operator has; without gradients, inference.
    """

    operator: Operator
    sweeps: Mapping[str, tuple[Sizes, ...]]
    label: Callable[[Sizes], str]
    cost: Callable[[Problem, str], Cost]
    rivals: Callable[[], tuple[Provider, ...]] = field(default=tuple)
    asked: tuple[Asked, ...] = ()
    baseline: Callable[[Sizes], Function | None] = lambda sizes: None
    slow: bool = False
    modes: tuple[str, ...] = MODES

    def cost_of(self, problem: Problem, mode: str) -> Cost:
        """The cost in any mode: forward and backward add up."""
        if mode != "fwd+bwd":
            return self.cost(problem, "bwd" if mode == "bwd" else "fwd")
        forward, backward = self.cost(problem, "fwd"), self.cost(problem, "bwd")
        return Cost(forward.bytes + backward.bytes, forward.flops + backward.flops, forward.matmul)

    def sizes_of(self, suite: str, device: str) -> tuple[Sizes, ...]:
        """The sizes a suite sweeps on a device."""
        if suite == "baselines" and suite not in self.sweeps:
            suite = "gpu"
        if suite != "all":
            return self.sweeps.get(suite, ())
        return (*self.sweeps.get("gpu" if device == "cuda" else "cpu", ()), *self.sweeps["all"])


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of these tensors' elements (an expanded tensor counts in full)."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
