"""Swaps torch's modules for fastseq's inside a model, and undoes it.

The swap is ``module.__class__ = fastseq.nn.LayerNorm``: the object stays, and with it its
parameters, hooks, aliases, optimizer state and place in the model. A module's class is the whole
state, so a deepcopy or a pickle of the model carries it. Norms of other libraries become subclasses
of their own class in the same way; attention of transformers' models is a setting of theirs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch

from .backends import BackendError, backends, use_backend
from .explain import (
    BYPASSES,
    FASTSEQ,
    LEFT,
    READY,
    SKIPPED,
    TORCH_CLASS,
    ModuleRow,
    counts,
    is_generated,
    original_class,
    shown,
    survey,
    swapped_class,
)
from .integrations import transformers
from .integrations.norms import AdaptedNorm
from .nn import DROP_IN

Model = TypeVar("Model", bound=torch.nn.Module)
Selection = Iterable[str | type[torch.nn.Module]] | str | type[torch.nn.Module]


def accelerate(
    model: Model,
    *,
    include: Selection | None = None,
    exclude: Selection | None = None,
    filter_fn: Callable[[torch.nn.Module, str], bool] | None = None,
    backend: str = "auto",
    strict: bool = False,
    verbose: bool = True,
) -> Model:
    """Put fastseq's kernels into a model, in place.

    Every module whose class is exactly one of torch's that fastseq has (the keys of
    ``fastseq.nn.DROP_IN``) becomes fastseq's subclass of it. So does a norm of another library or
    of your own that computes a layer norm or an RMS norm, as a trial on numbers shows. Models of
    Hugging Face transformers get their attention implementation set to ``"fastseq"``. Identity,
    parameters, hooks, ties, ``state_dict``, training flag and optimizer references stay. Calling
    it again changes nothing more; :func:`restore` undoes it; :func:`explain` shows what it does,
    before and after.

    Args:
        model: any module; wrappers (DDP, FSDP, ``torch.compile``, LoRA layers) are searched inside.
        include: swap only modules that match one of these: patterns of qualified names
            (``"encoder.*.norm1"``, as in :mod:`fnmatch`) or module classes. What matches a module
            covers all that is inside it; a shared module matches by any of its names. Attention of
            a transformers model is set for all modules of one configuration, or for none.
        exclude: leave these as they are; wins over ``include``.
        filter_fn: ``filter_fn(module, qualified_name) -> bool``, asked last.
        backend: ``"auto"`` leaves the choice of kernels as it is. Any other name is
            :func:`fastseq.use_backend` of it: for the whole process, not this model alone, since
            backward passes run on threads that belong to no module.
        strict: raise if a module that matches has to be skipped.
        verbose: print one line that says what was done.

    Returns:
        The same object.

    Raises:
        TypeError: ``model`` is no module, or ``include``/``exclude`` hold something else than
            patterns and classes.
        ValueError: no backend has this name.
        BackendError: this machine cannot run that backend.
        RuntimeError: ``strict``, and something that matched cannot be swapped.

    In every case of an error the model is unchanged.

    Example:
        >>> import torch, fastseq
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
        >>> model = fastseq.accelerate(model)
        fastseq: accelerated 1 of 1 modules (1 LayerNorm)
    """
    _check_is_module("accelerate", model)
    chosen = _choose(model, include, exclude, filter_fn)
    skipped = [row for row in chosen if row.decision == SKIPPED]
    if strict and skipped:
        each = "".join(f"\n  {shown(row.fqn)} ({row.type}): {row.reason}" for row in skipped)
        raise RuntimeError(f"accelerate: strict=True, but these cannot be swapped:{each}")
    if backend != "auto":
        _force(backend)
    attentions = []
    for row in chosen:
        if row.decision != READY:
            continue
        if kind := swapped_class(row.module):
            row.module.__class__ = kind
        else:
            attentions.append(row.module)
    transformers.set_attention(model, attentions)
    if verbose:
        print(_summary(survey(model)))
    return model


def restore(model: Model) -> Model:
    """Give every swapped module of the model its former class back, in place, and models of
    transformers their attention implementation.

    So become modules that were built as ``fastseq.nn.LayerNorm`` and the like in the first place. A
    class generated on top of a swapped one (by ``parametrize`` or ``fully_shard`` after
    :func:`accelerate`) is left with a warning. A forced backend stays: ``use_backend("auto")``.

    Args:
        model: any module.

    Returns:
        The same object.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check_is_module("restore", model)
    transformers.restore_attention(model)
    for fqn, module in model.named_modules():
        if original := original_class(module):
            module.__class__ = original
        elif isinstance(module, (*TORCH_CLASS, AdaptedNorm)) and is_generated(type(module)):
            warnings.warn(
                f"restore: left {shown(fqn)} as it is: its class {type(module).__name__} was "
                "generated on top of fastseq's; undo that (remove_parametrizations, say) first",
                stacklevel=2,
            )
    return model


def _choose(
    model: torch.nn.Module,
    include: Selection | None,
    exclude: Selection | None,
    filter_fn: Callable[[torch.nn.Module, str], bool] | None,
) -> list[ModuleRow]:
    """The modules to swap, and those to skip, that the caller's selection leaves."""
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted, unwanted = _selectors("include", include), _selectors("exclude", exclude)

    def matches(row: ModuleRow, selectors: list[str | type[torch.nn.Module]]) -> bool:
        around = {prefix for name in row.names for prefix in _prefixes(name)}
        return any(
            fnmatchcase(prefix, selector)
            if isinstance(selector, str)
            else isinstance(modules[prefix], selector)
            for selector in selectors
            for prefix in around
        )

    candidates = [row for row in survey(model) if row.decision in (READY, SKIPPED)]
    chosen = [
        row
        for row in candidates
        if (include is None or matches(row, wanted))
        and not matches(row, unwanted)
        and (filter_fn is None or filter_fn(row.module, row.fqn))
    ]
    # What has one attention implementation for all changes together or not at all.
    taken = {row.module for row in chosen}
    left = [row.module for row in candidates if row.module not in taken]
    return [row for row in chosen if not transformers.shares_configuration(row.module, left)]


def _selectors(argument: str, selection: Selection | None) -> list[str | type[torch.nn.Module]]:
    single = isinstance(selection, (str, type))
    selectors: list[Any] = [selection] if single else list(selection or ())  # type: ignore[arg-type]
    for selector in selectors:
        if not isinstance(selector, str) and not (
            isinstance(selector, type) and issubclass(selector, torch.nn.Module)
        ):
            raise TypeError(
                f"accelerate: {argument} must hold patterns of names or module classes, "
                f"got {selector!r}"
            )
    return selectors


def _prefixes(fqn: str) -> list[str]:
    """The names of a module and of those around it: ``a.b`` lies in ``a``, that in the model."""
    parts = fqn.split(".")
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]


def _force(backend: str) -> None:
    state = backends().get(backend, "available")  # an unknown name is use_backend's to refuse
    if not state.startswith("available"):
        raise BackendError(f"accelerate: backend {backend!r} cannot run here: {state}")
    use_backend(backend)


def _check_is_module(function: str, model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _summary(rows: list[ModuleRow]) -> str:
    if all(row.decision in (FASTSEQ, LEFT) for row in rows):
        names = " or ".join(theirs.__name__ for theirs in DROP_IN)
        return f"fastseq: nothing to accelerate: the model has no torch.nn {names}"
    left = sum(row.decision in (READY, SKIPPED) for row in rows)
    bypassing = sum(row.decision == BYPASSES for row in rows)
    remarks = [f"{left} left as they are"] if left else []
    remarks += [f"{bypassing} TransformerEncoderLayer bypass them in eval"] if bypassing else []
    tail = f"; {', '.join(remarks)}: fastseq.explain(model)" if remarks else ""
    return f"fastseq: accelerated {counts(rows)}{tail}"
