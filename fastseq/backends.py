"""Which kernel runs a call, and why.

Every op has an ordered list of candidates. ``auto`` takes the first that does not reject the
arguments; a forced backend that rejects them raises with its reason. The choice is made inside the
op's implementation, on real tensors, so a compiled graph holds one opaque node whatever is chosen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from . import _extension

#: In no order of preference: that is each op's own.
NAMES = ("triton", "cuda", "cpu", "torch", "reference")
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Candidate:
    """One way to run an op.

    Whether a backend runs on the device at all is decided here; ``rejects`` adds what this kernel
    cannot take, as a reason, or None.
    """

    backend: str
    run: Callable[[Any], Any]
    rejects: Callable[[Any], str | None] = lambda arguments: None


@dataclass(frozen=True)
class Decision:
    """What one call ran on: the backend, and why those before it were passed over."""

    op: str
    backend: str
    reasons: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        passed = "".join(f"\n    not {name}: {reason}" for name, reason in self.reasons)
        return f"{self.op}: {self.backend}{passed}"


class BackendError(RuntimeError):
    """A forced backend cannot serve the call; the message says why."""


def _checked(name: str, source: str) -> str:
    if name not in ("auto", *NAMES):
        raise ValueError(f"{source}: unknown backend {name!r}; expected auto, {', '.join(NAMES)}")
    return name


# Process-wide, as torch.backends flags are: autograd runs backward on threads of its own, which
# would not see a context-local choice.
_forced: str = _checked(os.environ.get("FASTSEQ_BACKEND") or "auto", "FASTSEQ_BACKEND")
_record: list[Decision] | None = None


class use_backend:  # noqa: N801 - reads as a function, like torch.set_grad_enabled
    """Force one backend for every op of the process, or return to ``"auto"``.

    As a call it lasts until the next one; as a context manager until the block ends. It also
    governs backward passes that run inside. A backend that cannot serve a call raises
    :class:`BackendError` with the reason, never something else in its place.

    Args:
        name: ``"auto"``, ``"triton"``, ``"cuda"``, ``"cpu"``, ``"torch"`` or ``"reference"``.

    Raises:
        ValueError: the name is none of these.
    """

    def __init__(self, name: str) -> None:
        global _forced
        self._previous = _forced
        _forced = _checked(name, "use_backend")

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _forced
        _forced = self._previous


def current_backend() -> str:
    """The backend forced by :func:`use_backend` or ``FASTSEQ_BACKEND``, or ``"auto"``."""
    return _forced


@contextmanager
def recorded() -> Iterator[list[Decision]]:
    """Collects the decisions of every fastseq call inside the block."""
    global _record
    outer, _record = _record, []
    try:
        yield _record
    finally:
        _record = outer


def note(op: str, backend: str, reason: str = "") -> None:
    """Record a decision made before any op was reached (a call handed to torch, say)."""
    if _record is not None:
        _record.append(Decision(op, backend, (("fastseq kernels", reason),) if reason else ()))


def select(op: str, candidates: tuple[Candidate, ...], arguments: Any) -> Candidate:
    """The candidate that runs ``op`` on ``arguments``, whose first field is a tensor.

    Raises:
        BackendError: a forced backend rejects the arguments, or the op has no kernel of that kind.
    """
    tensor = arguments[0]
    reasons: list[tuple[str, str]] = []
    for candidate in candidates:
        backend = candidate.backend
        if _forced not in ("auto", backend):
            continue
        reason = _DEVICE_REJECTS[backend](tensor) or candidate.rejects(arguments)
        if reason is None:
            if _record is not None:
                _record.append(Decision(op, backend, tuple(reasons)))
            return candidate
        reasons.append((backend, reason))
    if _forced == "auto":
        raise AssertionError(f"{op}: every candidate rejects, the reference included: {reasons}")
    why = reasons[0][1] if reasons else "it has no such kernel"
    raise BackendError(f"fastseq.{op}: backend {_forced!r} cannot serve: {why}")


def _triton_rejects(tensor: torch.Tensor) -> str | None:
    if tensor.is_cuda:
        return _extension.TRITON_UNAVAILABLE or _capability_rejects(tensor)
    if not tensor.is_cpu:
        return f"no Triton kernels for {tensor.device.type}"
    if not _INTERPRETED:
        return "CPU tensor (Triton kernels run there only under TRITON_INTERPRET=1)"
    if _forced != "triton":
        return "the Triton interpreter is for tests: only when forced by use_backend('triton')"
    return _extension.TRITON_UNAVAILABLE


def _cuda_rejects(tensor: torch.Tensor) -> str | None:
    if tensor.is_cuda:
        return _extension.CUDA_UNAVAILABLE or _capability_rejects(tensor)
    return "not a CUDA tensor"


def _cpu_rejects(tensor: torch.Tensor) -> str | None:
    return _extension.UNAVAILABLE if tensor.is_cpu else "not a CPU tensor"


def _never_rejects(tensor: torch.Tensor) -> str | None:
    return None


#: Why a backend cannot run on a tensor's device, or None.
_DEVICE_REJECTS: dict[str, Callable[[torch.Tensor], str | None]] = {
    "triton": _triton_rejects,
    "cuda": _cuda_rejects,
    "cpu": _cpu_rejects,
    "torch": _never_rejects,
    "reference": _never_rejects,
}

_capability: dict[int, tuple[int, int]] = {}


def _capability_rejects(tensor: torch.Tensor) -> str | None:
    index = tensor.get_device()
    if index not in _capability:
        _capability[index] = torch.cuda.get_device_capability(index)
    major, minor = _capability[index]
    return None if major >= 8 else f"sm_{major}{minor} is older than sm_80"


def backends() -> dict[str, str]:
    """What can run on this machine: each backend with ``"available"`` or the reason why not.

    Example:
        >>> import fastseq
        >>> fastseq.backends()["reference"]
        'available'
    """
    no_gpu = None if torch.cuda.is_available() else "torch sees no CUDA device"
    triton = _extension.TRITON_UNAVAILABLE or (None if _INTERPRETED else no_gpu)
    cuda = _extension.CUDA_UNAVAILABLE or no_gpu
    cpu = _extension.UNAVAILABLE
    return {
        "triton": triton or ("available (interpreted on CPU)" if _INTERPRETED else "available"),
        "cuda": cuda or "available",
        "cpu": cpu or f"available ({_extension.cpu_instruction_set()})",
        "torch": "available",
        "reference": "available",
    }
