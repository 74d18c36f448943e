"""The gate: what computes something wrong gets no time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import fastseq
from fastseq.backends import BackendError
from fastseq.testing import BOUND, MismatchError, Problem, Yardstick, measure_torch, run
from fastseq.testing.check import device_works
from fastseq.testing.operators import Function, Ratios

from .points import Point
from .providers import BASELINE
from .registry import Provider


@dataclass(frozen=True)
class Admitted:
    """A provider's function, its errors, and why it gets no time, or None."""

    provider: Provider
    function: Function
    ratios: Ratios
    wrong: str | None


@dataclass
class Gate:
    """Holds providers against torch in fp64 on the inputs they are timed with, once each."""

    device: torch.device
    _verdicts: dict[tuple[object, ...], tuple[Ratios, str | None]] = field(default_factory=dict)

    def pass_through(
        self, point: Point, problem: Problem, wanted: Sequence[Provider], probe: Probe
    ) -> list[Admitted]:
        """Every provider with its verdict.

        Raises:
            torch.AcceleratorError: the device itself failed; nothing after it would be true.
        """
        yardstick: Yardstick | None = None
        gated = []
        for provider in wanted:
            function = provider.setup(provider.function) if provider.setup else provider.function
            key = point.name, point.label, point.dtype, provider.name, probe.gradients
            # torch, by whose error the others are measured, is held to nothing: it runs.
            itself = provider.name == BASELINE and probe.results is not None
            if not provider.checked or len(wanted) == 1 or itself:
                self._verdicts[key] = {}, None
            if key not in self._verdicts:
                try:
                    yardstick = yardstick or measure_torch(
                        point.benchmark.operator,
                        problem,
                        gradients=probe.gradients,
                        theirs=probe.results,
                    )
                    self._verdicts[key] = _judge(
                        provider, function, problem, yardstick, probe.gradients
                    )
                except Exception as error:  # one that cannot run must not end the run
                    raise_if_lost(error, self.device)
                    self._verdicts[key] = {}, in_a_line(error)
            gated.append(Admitted(provider, function, *self._verdicts[key]))
        return gated


def _judge(
    provider: Provider,
    function: Function,
    problem: Problem,
    yardstick: Yardstick,
    gradients: bool,
) -> tuple[Ratios, str | None]:
    """The provider's ratios, and what is wrong, or None."""
    try:
        with fastseq.use_backend(provider.backend or "auto"):
            ratios = yardstick.ratios(_results(function, problem, gradients))
    except MismatchError as mismatch:
        return {}, f"wrong: {mismatch}"
    except BackendError as error:
        return {}, skipped(error)
    bad = {name: pair for name, pair in ratios.items() if not max(pair) <= BOUND}
    if not bad:
        return ratios, None
    name, pair = max(bad.items(), key=lambda item: item[1][0])
    return ratios, f"wrong: {name} {pair[0]:.3g}x torch's error ({pair[1]:.3g}x RMS)"


def _results(function: Function, problem: Problem, gradients: bool) -> dict[str, Any]:
    """Outputs and gradients; outputs alone where a forced backend has no backward."""
    if not gradients:
        return run(function, problem, gradients=False)
    try:
        return run(function, problem)
    except BackendError:
        return run(function, problem, gradients=False)


@dataclass(frozen=True)
class Probe:
    """One run of torch's: its results, for the gate, and how long it took, for the budget."""

    results: dict[str, torch.Tensor] | None
    seconds: float
    gradients: bool

    @classmethod
    def of(
        cls, point: Point, problem: Problem, modes: Sequence[str], device: torch.device
    ) -> Probe:
        gradients = any(mode in ("bwd", "fwd+bwd") for mode in modes)
        started = time.perf_counter()
        try:
            results = run(point.benchmark.operator.torch, problem, gradients=gradients)
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # out of memory, say: the gate will tell
            raise_if_lost(error, device)
            results = None
        return cls(results, time.perf_counter() - started, gradients)


def skipped(error: BackendError) -> str:
    return f"skipped: {str(error).split('cannot serve: ')[-1]}"


def in_a_line(error: Exception) -> str:
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]


def raise_if_lost(error: Exception, device: torch.device) -> None:
    """Pass on what broke the device: nothing after it would be true."""
    if isinstance(error, torch.AcceleratorError) and not device_works(device):
        raise error
