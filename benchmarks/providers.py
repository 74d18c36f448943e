"""Who is measured: fastseq, torch, torch.compile, others; and their calls in every mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import fastseq
from fastseq.backends import recorded
from fastseq.ops._op import REGISTRY
from fastseq.testing import Problem, run
from fastseq.testing.operators import Function

from .registry import Benchmark, Provider
from .timing import Variant

BASELINE = "torch"


def providers_of(
    benchmark: Benchmark, wanted: Sequence[str] | None, suite: str, device: str
) -> list[Provider]:
    """The providers to measure, the baseline first.

    By default fastseq as it chooses itself, every kernel of ours that this device can run (the
    runner leaves out one that is the choice itself), torch, and third parties that are installed;
    in suite ``all`` also ``torch.compile`` and the backends ``torch`` and ``reference``. A list
    asks for some by name; the baseline always comes.
    """
    operator = benchmark.operator
    available = {n for n, state in fastseq.backends().items() if state.startswith("available")}
    available -= {"cpu"} if device == "cuda" else {"cuda", "triton"}
    backends = [c.backend for c in REGISTRY[operator.op] if c.backend in available]
    everything = [
        Provider(BASELINE, operator.torch),
        Provider("fastseq", operator.ours),
        *(Provider(f"fastseq:{backend}", operator.ours, backend) for backend in backends),
        Provider("torch.compile", operator.torch, setup=_compiled),
        *benchmark.rivals(),
    ]
    if wanted is not None:
        return [p for p in everything if p.name == BASELINE or p.name in wanted]
    if suite == "all":
        return everything
    plain = ("fastseq:torch", "fastseq:reference", "torch.compile")
    return [provider for provider in everything if provider.name not in plain]


def _compiled(function: Function) -> Function:
    """Compiled anew: not a graph that an earlier size made dynamic."""
    import torch._functorch.config

    torch._dynamo.reset()
    # A donated buffer is gone after one backward; timing needs many of the same graph.
    torch._functorch.config.donated_buffer = False
    compiled: Function = torch.compile(function, dynamic=False)
    return compiled


def backends_used(provider: Provider, problem: Problem, mode: str) -> str:
    """The backends that served the call: ``"cpu"``, or ``"cpu, torch"`` where ops differ."""
    with fastseq.use_backend(provider.backend or "auto"), recorded() as decisions:
        run(provider.function, problem, gradients=mode != "inference")
    return ", ".join(dict.fromkeys(decision.backend for decision in decisions))


def make_variant(
    provider: Provider, function: Function, problems: Sequence[Problem], mode: str
) -> Variant:
    """The provider's call in this mode, one for each copy of the problem.

    Raises:
        BackendError: a forced backend cannot serve this mode.
    """
    backend = provider.backend or "auto"
    with fastseq.use_backend(backend):
        calls = [_call(function, problem, mode) for problem in problems]
        with torch.set_grad_enabled(mode != "inference"):
            calls[0]()
    return Variant(provider.name, calls, backend, mode != "inference")


def _call(function: Function, problem: Problem, mode: str) -> Callable[[], object]:
    options = problem.options
    if mode == "inference":
        return lambda: function(**problem.arguments, **options)
    leaves = problem.leaves()
    if mode == "fwd":
        return lambda: function(**leaves, **options)
    inputs = [leaf for leaf in leaves.values() if leaf is not None and leaf.requires_grad]

    def backward(outputs: list[torch.Tensor], retain: bool) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, grads, retain_graph=retain)

    named = function(**leaves, **options)
    order = [name for name in named if name in problem.grad_outputs]
    grads = [problem.grad_outputs[name] for name in order]
    if mode == "bwd":
        outputs = [named[name] for name in order]
        return lambda: backward(outputs, True)

    def both() -> tuple[torch.Tensor, ...]:
        made = function(**leaves, **options)
        return backward([made[name] for name in order], False)

    return both
