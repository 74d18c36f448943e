"""A private dispatcher op: schema, fake, and the candidates that can serve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..backends import Candidate, select

_LIBRARY = torch.library.Library("fastseq", "DEF")

#: op name -> its candidates, for ``fastseq verify``, ``doctor`` and the tests.
REGISTRY: dict[str, tuple[Candidate, ...]] = {}


def define_op(
    schema: str,
    arguments: type[Any],
    fake: Callable[[Any], Any],
    candidates: tuple[Candidate, ...],
) -> Callable[..., Any]:
    """Register ``fastseq::<schema>`` and return it as something to call with positional arguments.

    ``Library.define/impl`` rather than ``torch.library.custom_op``: 3 against 10 us a call.
    The implementation serves every device: where none of our kernels runs there, a torch or
    reference candidate does.

    Args:
        schema: the op's schema without namespace or defaults (the dispatcher would drop those).
        arguments: a NamedTuple class with the schema's arguments in its order; fake and candidates
            take one of it.
        fake: what the op returns on fake tensors: the allocations of the launcher.
        candidates: in order of preference. The last never rejects.
    """
    name = schema[: schema.index("(")]
    assert name not in REGISTRY, f"{name} is defined twice"
    REGISTRY[name] = candidates

    def implementation(*args: Any) -> Any:
        given = arguments(*args)
        return select(name, candidates, given).run(given)

    def fake_implementation(*args: Any) -> Any:
        return fake(arguments(*args))

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastseq::{name}", fake_implementation, lib=_LIBRARY)
    op = getattr(torch.ops.fastseq, name).default

    def call(*args: Any) -> Any:
        return implementation(*args) if _is_plain(args[0]) else op(*args)

    return call


def extension_op(name: str) -> Callable[..., Any]:
    """The C++ op ``fastseq_C::name``; one that must not be called where there is no extension."""
    if _extension.UNAVAILABLE:
        return _no_extension
    if not hasattr(torch.ops.fastseq_C, name):  # after a pull, most of the time
        raise ImportError(
            f"fastseq._C is older than fastseq's Python files: it has no {name}. Build it again "
            "(make, or pip install --no-build-isolation -e .)"
        )
    # _op: the bound C function under OpOverload.__call__, which only forwards to it.
    op: Callable[..., Any] = getattr(torch.ops.fastseq_C, name).default._op
    return op


def _no_extension(*args: Any) -> Any:
    raise AssertionError(f"selected without the extension: {_extension.UNAVAILABLE}")


def _is_plain(tensor: Tensor) -> bool:
    """Whether nobody listens to the dispatcher, so that the way through it (4 us) can be saved.

    Compilers, dispatch modes (fake tensors, FLOP counters, tracers) and subclasses listen; so does
    the meta device, which has the fake only.
    """
    return (
        type(tensor) in _PLAIN_TYPES
        and not torch.compiler.is_compiling()
        and not tensor.is_meta
        and not torch._C._len_torch_dispatch_stack()
    )


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


Backward = Callable[..., tuple[Any, ...]]


def function_backward(backward: Backward) -> Backward:
    """What a Function's ``backward`` is decorated with, below ``staticmethod``.

    The caller's ``backward()`` may run in autocast, which would cast some operands of a product
    and not others: it is off in here. And with ``is_grads_batched`` (what ``vectorize=True`` of
    ``torch.autograd.functional`` asks for) gradients are batches that hardly a function of torch
    takes: each is then taken by itself.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return backward(ctx, *grads)
        device = given.device.type
        if not given.is_meta and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return run(ctx, *grads)
        if not torch.compiler.is_compiling() and any(
            grad is not None and _is_batch(grad) for grad in grads
        ):
            return _one_by_one(backward, ctx, grads)
        return backward(ctx, *grads)

    return run


_is_batch: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def _one_by_one(backward: Backward, ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    level = torch._C._vmapmode_increment_nesting() - 1  # nobody tells it without
    torch._C._vmapmode_decrement_nesting()
    batches = [
        None if grad is None or not _is_batch(grad) else torch._remove_batch_dim(grad, level, 1, 0)
        for grad in grads
    ]
    size = next(len(batch) for batch in batches if batch is not None)
    made = []
    for i in range(size):
        pairs = zip(grads, batches, strict=True)
        made.append(backward(ctx, *(g if batch is None else batch[i] for g, batch in pairs)))
    return tuple(
        None if each[0] is None else torch._add_batch_dim(torch.stack(each), 0, level)
        for each in zip(*made, strict=True)
    )


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
    chosen = [
        alias for alias, want in zip(aliases, wanted, strict=True) if want and alias is not None
    ]
    grads = iter(
        torch.autograd.grad(
            function(*aliases), chosen, grad_output, create_graph=True, allow_unused=True
        )
    )
    return tuple(next(grads) if want else None for want in wanted)
