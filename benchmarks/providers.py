"""Who is measured: fastseq, torch, torch.compile, others; and their calls in every mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import fastseq
from fastseq.backends import recorded
from fastseq.ops._op import REGISTRY
from fastseq.testing import Problem, run
from fastseq.testing.operators import Function

from .registry import Benchmark, Provider, Sizes
from .timing import Variant

BASELINE = "torch"
#: In suite ``all`` or by name only.
ON_REQUEST = (
    *("fastseq:torch", "fastseq:reference", "torch.compile", "flex", "torch native", "flashrnn"),
)
#: The families whose operators a compiler can fuse.
_COMPILED = ("layer_norm", "softmax", "cross_entropy", "rotary_embedding", "feed_forward")


def providers_of(
    benchmark: Benchmark, sizes: Sizes, wanted: Sequence[str] | None, suite: str, device: str
) -> list[Provider]:
    """The providers to measure at these sizes, the baseline first.

    By default fastseq as it chooses itself, every kernel of ours that this device can run (the
    runner leaves out one that is the choice itself), torch, and third parties that are installed;
    in suite ``all`` also ``torch.compile`` and others that take long, and the backends ``torch``
    and ``reference``; in suite ``baselines`` all but fastseq. A list asks for some by name; the
    baseline always comes.
    """
    operator = benchmark.operator
    own = benchmark.baseline(sizes)
    available = {n for n, state in fastseq.backends().items() if state.startswith("available")}
    available -= {"cpu"} if device == "cuda" else {"cuda", "triton"}
    backends = [c.backend for c in REGISTRY[operator.op] if c.backend in available]
    everything = [
        Provider(BASELINE, own or operator.torch, checked=own is None),
        Provider("fastseq", operator.ours),
        *(Provider(f"fastseq:{backend}", operator.ours, backend) for backend in backends),
        Provider("torch.compile", own or operator.torch, setup=_compiled, checked=own is None),
        *benchmark.rivals(),
    ]
    if wanted is not None:
        return [p for p in everything if p.name == BASELINE or p.name in wanted]
    if suite == "all":
        return everything
    if suite == "baselines":
        slow = () if operator.family in _COMPILED else ("torch.compile", "torch native", "flashrnn")
        return [p for p in everything if not p.name.startswith("fastseq") and p.name not in slow]
    return [provider for provider in everything if provider.name not in ON_REQUEST]


def _compiled(function: Function) -> Function:
    """Compiled anew: not a graph that an earlier size made dynamic."""
    import torch._functorch.config

    torch._dynamo.reset()
    # A donated buffer is gone after one backward; timing needs many of the same graph.
    torch._functorch.config.donated_buffer = False
    compiled: Function = torch.compile(function, dynamic=False)
    return compiled


def backends_used(provider: Provider, problem: Problem) -> str:
    """What served forward and backward: ``"cpu"``, or ``"cpu, torch"`` where the ops differ."""
    with fastseq.use_backend(provider.backend or "auto"), recorded() as decisions:
        run(provider.function, problem)
    return ", ".join(dict.fromkeys(decision.backend for decision in decisions))


def make_variant(
    provider: Provider, function: Function, problems: Sequence[Problem], mode: str
) -> Variant:
    """The provider's call in this mode, one for each copy of the problem.

    Raises:
        BackendError: a forced backend cannot serve the forward that ``bwd`` starts from.
    """
    backend = provider.backend or "auto"
    with fastseq.use_backend(backend):
        calls = [_call(function, problem, mode) for problem in problems]
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
