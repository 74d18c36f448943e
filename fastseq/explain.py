"""Says what fastseq does with a model and why: which module is swapped, which kernel ran a call."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .backends import Decision, recorded
from .integrations import norms, transformers
from .nn import DROP_IN

SWAPPED = "swapped"  # runs on fastseq; restore() turns it back
READY = "ready"  # accelerate() would swap it
SKIPPED = "skipped"  # looks like one of ours, but swapping it would be wrong or without effect
FASTSEQ = "fastseq"  # written with fastseq.nn, or built on top of a swapped module
LEFT = "left"  # a norm of a kind that fastseq has no kernel for
BYPASSES = "bypasses"  # a container that does the work of its children without calling them

TORCH_CLASS = {ours: theirs for theirs, ours in DROP_IN.items()}


@dataclass(frozen=True)
class ModuleRow:
    """What fastseq makes of one module: ``decision`` is one of this file's constants."""

    names: tuple[str, ...]
    module: torch.nn.Module = field(repr=False)
    decision: str
    reason: str

    @property
    def fqn(self) -> str:
        """The qualified name in the model; of a shared module the first of its ``names``."""
        return self.names[0]

    @property
    def type(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`: printed it is a table.

    Attributes:
        title: what it comes to, in a line.
        modules: of a model, each module that concerns fastseq.
        calls: of a function, each fastseq call in the order in which they ran.
        result: what the function returned.
    """

    title: str
    modules: tuple[ModuleRow, ...] = ()
    calls: tuple[Decision, ...] = ()
    result: Any = None

    @property
    def rows(self) -> tuple[ModuleRow, ...] | tuple[Decision, ...]:
        """The modules or the calls, whichever it explains."""
        return self.modules or self.calls

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if self.modules:
            modules = [(shown(row.fqn), row.type, row.decision, row.reason) for row in self.modules]
            return _table(self.title, ("module", "class", "decision", "why"), modules)
        calls = []
        for call, times in Counter(self.calls).items():
            passed_over = "; ".join(f"not {name}: {reason}" for name, reason in call.reasons)
            why = passed_over or "nothing was passed over"
            calls.append((call_name(call.op), str(times), call.backend, why))
        return _table(self.title, ("call", "times", "ran on", "why"), calls)

    __repr__ = __str__


def explain(
    model_or_fn: torch.nn.Module | Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Explanation:
    """Which modules fastseq serves, or which kernel served each call, and why not another.

    ``explain(model)`` looks and runs nothing: every module that is swapped, could be, or looks as
    if it might have been, with the reason and what to do about it; before and after
    :func:`fastseq.accelerate`.

    ``explain(function, *args)``, or a model with arguments, runs it: each fastseq call that happens
    inside, backward passes included, with the backend that took it and why those before it did not.

    Args:
        model_or_fn: a module or a function.
        *args, **kwargs: its arguments.

    Returns:
        An :class:`Explanation`: print it, or read its ``modules`` and ``calls``.

    Raises:
        TypeError: the first argument is neither a module nor a function.
    """
    if isinstance(model_or_fn, torch.nn.Module) and not args and not kwargs:
        rows = tuple(survey(model_or_fn))
        return Explanation(f"{type(model_or_fn).__name__}: {counts(rows)} on fastseq", modules=rows)
    if not callable(model_or_fn) or isinstance(model_or_fn, type):
        got = repr(model_or_fn) if isinstance(model_or_fn, type) else type(model_or_fn).__name__
        raise TypeError(f"explain: model_or_fn must be a module or a function, got {got}")
    with recorded() as decisions:
        result = model_or_fn(*args, **kwargs)
    title = "1 fastseq call" if len(decisions) == 1 else f"{len(decisions)} fastseq calls"
    return Explanation(title, calls=tuple(decisions), result=result)


def counts(rows: Sequence[ModuleRow]) -> str:
    """``25 of 49 modules (24 LayerNorm, 1 RMSNorm)``: swapped, of those that might have been."""
    swapped = Counter(row.type for row in rows if row.decision == SWAPPED)
    total = sum(row.decision in (SWAPPED, READY, SKIPPED) for row in rows)
    kinds = ", ".join(f"{count} {kind}" for kind, count in swapped.items())
    return f"{swapped.total()} of {total} modules" + (f" ({kinds})" if kinds else "")


def shown(fqn: str) -> str:
    """A qualified name for a reader; that of the model itself is empty."""
    return fqn or "(the model)"


def call_name(op: str) -> str:
    """The name of an op for a reader: ``_layer_norm_fwd`` is ``layer_norm forward``."""
    return op.lstrip("_").replace("_fwd", " forward").replace("_bwd", " backward")


def _table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return title
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    widths[-1] = 0  # nothing stands to the right of the last one
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n  ".join([title, *lines])


# --- what is in a model --------------------------------------------------------------------------


def survey(model: torch.nn.Module) -> list[ModuleRow]:
    """The modules that concern us, each once, in the model's order."""
    names: dict[torch.nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    attentions = transformers.attention_modules(model)
    rows = {
        module: ModuleRow(tuple(aliases), module, *judgement)
        for module, aliases in names.items()
        if (judgement := _judge_attention(module, attentions) or _judge(module))
    }
    for layer, aliases in names.items():
        if not _has_fast_path(layer):
            continue
        inside = [module for module in layer.modules() if module is not layer and module in rows]
        # What accelerate swaps whole bypasses nothing from then on.
        waiting = layer in rows and rows[layer].decision == READY
        lost = [
            module
            for module in inside
            if rows[module].decision == SWAPPED or (rows[module].decision == READY and not waiting)
        ]
        for module in lost:
            reason = f"{rows[module].reason}; in eval {shown(aliases[0])} bypasses it"
            rows[module] = replace(rows[module], reason=reason)
        if lost:
            children = ", ".join(rows[module].fqn.rpartition(".")[2] for module in lost)
            own = f"{rows[layer].reason}; " if layer in rows else ""
            rows[layer] = ModuleRow(
                tuple(aliases),
                layer,
                READY if waiting else BYPASSES,
                f"{own}in eval without gradients torch's fast path never calls {children}; "
                "torch.backends.mha.set_fastpath_enabled(False) switches it off",
            )
    return [rows[module] for module in names if module in rows]


def _judge(module: torch.nn.Module) -> tuple[str, str] | None:
    """The decision on a module and its reason, or None if it has nothing to do with us."""
    kind = type(module)
    if kind in DROP_IN or kind in TORCH_CLASS:
        if kind in TORCH_CLASS:
            return _unless_hidden(module, SWAPPED, f"is fastseq.nn.{kind.__name__}")
        name = DROP_IN[kind].__name__
        return _unless_hidden(module, READY, f"accelerate makes it fastseq.nn.{name}")
    if norms.is_adapted(module):
        assert isinstance(module, norms.AdaptedNorm)
        return _unless_hidden(module, SWAPPED, f"computes {module.recipe.formula} on fastseq")
    if isinstance(module, torch.jit.ScriptModule):
        name = module.original_name
        if name not in {theirs.__name__ for theirs in DROP_IN}:
            return None
        return SKIPPED, f"TorchScript: this {name} is compiled; accelerate the eager model instead"
    base = next((theirs for theirs in DROP_IN if isinstance(module, theirs)), None)
    if base is None:
        return _judge_norm(module) if norms.looks_like_norm(module) else None
    ours = f"fastseq.nn.{DROP_IN[base].__name__}"
    if isinstance(module, (DROP_IN[base], norms.AdaptedNorm)):
        return FASTSEQ, f"built on {ours}"
    if kind.__module__.startswith("fastseq."):
        return FASTSEQ, "fastseq's own"
    if is_generated(kind):
        return SKIPPED, (
            f"dynamic class: {kind.__name__} was generated from {base.__name__} (by parametrize, "
            "fully_shard or the like); accelerate before that step"
        )
    if norms.looks_like_norm(module):
        recipe = norms.recipe_of(module)
        if isinstance(recipe, norms.Recipe):
            return _unless_hidden(module, READY, _computes(recipe))
        return SKIPPED, f"subclass: {recipe}; if that does not matter, derive it from {ours}"
    return SKIPPED, (
        f"subclass: it may not compute what {base.__name__} does; if it does, derive it from {ours}"
    )


def _unless_hidden(module: torch.nn.Module, decision: str, reason: str) -> tuple[str, str]:
    """The decision, for a module whose class's ``forward`` is what runs."""
    if "forward" not in vars(module):
        return decision, reason
    return SKIPPED, (
        "instance forward: a function set as module.forward hides that of the class; "
        "`del module.forward`, or accelerate before the tool that sets it"
    )


def _computes(recipe: norms.Recipe) -> str:
    return f"tried on numbers, it computes {recipe.formula}: accelerate puts it on fastseq"


def _judge_norm(module: torch.nn.Module) -> tuple[str, str] | None:
    """The decision on what is called a norm and derives from none of torch's that we have."""
    kind = type(module)
    if isinstance(module, norms.AdaptedNorm):
        return FASTSEQ, "built on a norm that runs on fastseq"
    if kind.__module__.startswith("fastseq."):
        return None
    if is_generated(kind):
        return SKIPPED, (
            f"dynamic class: {kind.__name__} was generated from {kind.__mro__[1].__name__} (by "
            "parametrize, fully_shard or the like); accelerate before that step"
        )
    if next(module.children(), None) is not None:
        return None  # a block around a norm, which has a row of its own
    if kind.__module__.startswith("torch."):
        return LEFT, f"fastseq has no {kind.__name__}: torch's runs, as before"
    recipe = norms.recipe_of(module)
    if isinstance(recipe, norms.Recipe):
        return _unless_hidden(module, READY, _computes(recipe))
    return LEFT, f"{recipe}: its own forward runs, as before"


def _judge_attention(
    module: torch.nn.Module,
    attentions: dict[torch.nn.Module, tuple[torch.nn.Module | None, str | None]],
) -> tuple[str, str] | None:
    """The decision on an attention module of transformers."""
    if module not in attentions:
        return None
    owner, refusal = attentions[module]
    name = transformers.NAME
    if refusal is not None:
        return SKIPPED, refusal
    if transformers.runs_ours(module):
        return SWAPPED, f"runs fastseq's attention: attn_implementation={name!r}"
    return READY, (
        f"accelerate sets attn_implementation={name!r} for all the attention of this "
        f"{type(owner).__name__} together"
    )


def swapped_class(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class that :func:`fastseq.accelerate` gives a module that is READY; None for attention
    whose implementation is set instead."""
    if type(module) in DROP_IN:
        return DROP_IN[type(module)]
    recipe = norms.recipe_of(module) if norms.looks_like_norm(module) else ""
    return norms.adapter(type(module), recipe) if isinstance(recipe, norms.Recipe) else None


def original_class(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class that a swapped module had before; None where nothing was swapped."""
    if norms.is_adapted(module):
        assert isinstance(module, norms.AdaptedNorm)
        return module.original
    return TORCH_CLASS.get(type(module))


def is_generated(kind: type) -> bool:
    """Whether a class was made at run time: no import finds it under its own name."""
    if "<locals>" in kind.__qualname__:
        return False
    place: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        place = getattr(place, name, None)
    return place is not kind


def _has_fast_path(layer: torch.nn.Module) -> bool:
    """Whether torch may run this encoder layer as one op in eval, by all but its input."""
    if not isinstance(layer, torch.nn.TransformerEncoderLayer) or "forward" in vars(layer):
        return False
    attention = layer.self_attn
    return bool(
        type(layer).forward is torch.nn.TransformerEncoderLayer.forward
        and torch.backends.mha.get_fastpath_enabled()
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and layer.activation_relu_or_gelu
        and layer.norm1.eps == layer.norm2.eps
        and not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
    )
