"""A private dispatcher op: schema, fake, and the candidates that can serve it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import Candidate, select

_LIBRARY = torch.library.Library("fastseq", "DEF")

#: op name -> its candidates, for ``fastseq verify``, ``doctor`` and the tests.
REGISTRY: dict[str, tuple[Candidate, ...]] = {}


def define_op(
    schema: str, fake: Callable[..., Any], candidates: tuple[Candidate, ...]
) -> Callable[..., Any]:
    """Register ``fastseq::<schema>`` and return it as something to call with positional arguments.

    ``Library.define/impl`` rather than ``torch.library.custom_op``: 3 against 10 microseconds a call.
    The implementation serves every device: where none of our kernels runs there, a torch or
    reference candidate does.

    Args:
        schema: the op's schema without namespace, no default values (the dispatcher would drop them).
        fake: what the op returns on fake tensors: the allocations of the launcher.
        candidates: in order of preference; all take the op's arguments. The last never rejects.
    """
    name = schema[: schema.index("(")]
    assert name not in REGISTRY, f"{name} is defined twice"
    REGISTRY[name] = candidates

    def implementation(*args: Any) -> Any:
        return select(name, candidates, args).run(*args)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastseq::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.fastseq, name).default
    return op


def differentiable_gradients(
    function: Callable[..., Tensor],
    inputs: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    grad_output: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``function(*inputs)`` that can be differentiated again (double backward).

    Args:
        function: a differentiable reference.
        inputs: what the Function saved; None where an argument was not given.
        wanted: which gradients to compute; the others come back as None.
        grad_output: the gradient of the function's result.
    """
    # Aliases: one tensor given twice still gets one gradient per argument, not their sum twice.
    aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    chosen = [alias for alias, want in zip(aliases, wanted, strict=True) if want]
    grads = iter(
        torch.autograd.grad(
            function(*aliases), chosen, grad_output, create_graph=True, allow_unused=True
        )
    )
    return tuple(next(grads) if want else None for want in wanted)
