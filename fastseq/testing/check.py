"""One operator, one backend, one case: everything the contract says about the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backends import BackendError, recorded, use_backend
from .errors import BOUND, MismatchError
from .operators import (
    Case,
    Operator,
    Problem,
    Ratios,
    Yardstick,
    identical,
    make_problem,
    measure_torch,
    narrow,
    poisoned_memory,
    run,
)

#: Backends that are kernels of ours: they promise a row's result whatever batch it came in.
KERNELS = ("triton", "cuda", "cpu")


@dataclass
class Outcome:
    """What came of one check.

    Attributes:
        ran: the backends that served the call, by op.
        ratios: ``(max_ratio, rms_ratio)`` of every result.
        gradients: whether gradients were checked (a forced backend may have a forward only).
        skipped: why nothing was checked, or None.
        failures: what is wrong, a line each; empty where the check passed.
    """

    operator: str
    backend: str
    dtype: torch.dtype
    case: str
    ran: dict[str, str] = field(default_factory=dict)
    ratios: Ratios = field(default_factory=dict)
    gradients: bool = False
    skipped: str | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def largest(self) -> tuple[float, float]:
        """The largest max ratio and the largest RMS ratio of all results."""
        pairs = list(self.ratios.values()) or [(0.0, 0.0)]
        return max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)


def check(
    operator: Operator,
    backend: str,
    dtype: torch.dtype,
    case: Case,
    device: torch.device | str,
    yardstick: Yardstick | None = None,
) -> Outcome:
    """Run a case on a backend (or ``"auto"``) and hold everything about it to the contract.

    Results as near the truth as torch's (see :func:`fastseq.testing.error_ratio`), outputs and
    gradients; the same to the bit in a second run, in memory poisoned with NaN, and for kernels of
    ours with half the rows gone; inputs untouched, outputs in memory of their own.

    Args:
        operator, dtype, case, device: what to check, where.
        backend: a backend's name or ``"auto"``.
        yardstick: torch's results for this very case, where they are at hand already.

    Returns:
        The outcome. A backend that cannot serve is no failure: ``skipped`` has its reason. A
        kernel's exception is a failure, unless the device is lost by it: then it passes through.
    """
    outcome = Outcome(operator.name, backend, dtype, case.name)
    if yardstick is None:
        yardstick = measure_torch(operator, make_problem(operator, case.sizes, dtype, device))
    try:
        with use_backend(backend):
            _check(operator, backend, yardstick, outcome)
    except BackendError as error:
        outcome.skipped = str(error).split("cannot serve: ")[-1]
    except Exception as error:  # whatever a kernel throws is a finding, and others must follow
        if isinstance(error, torch.AcceleratorError) and not device_works(device):
            raise
        outcome.failures.append(f"{type(error).__name__}: {error}")
    return outcome


def device_works(device: torch.device | str) -> bool:
    """Whether the device still computes: after an illegal access it does not, in this process."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2.0
    except torch.AcceleratorError:
        return False


def _check(operator: Operator, backend: str, yardstick: Yardstick, outcome: Outcome) -> None:
    problem = yardstick.problem
    before = {n: t.clone() for n, t in problem.arguments.items() if t is not None}
    with recorded() as decisions:
        try:
            results = run(operator.ours, problem)
            outcome.gradients = True
        except BackendError:
            results = run(operator.ours, problem, gradients=False)
    outcome.ran = {decision.op: decision.backend for decision in decisions}
    gradients = outcome.gradients
    fail = outcome.failures.append

    try:
        outcome.ratios = yardstick.ratios(results)
    except MismatchError as mismatch:
        fail(str(mismatch))
        return
    for result, (largest, typical) in outcome.ratios.items():
        if not (largest <= BOUND and typical <= BOUND):
            fail(f"{result}: error {largest:.3g} x torch's at most, {typical:.3g} x in RMS")

    after = {n: t for n, t in problem.arguments.items() if t is not None}
    if name := identical(before, after):
        fail(f"{name}: the input was modified")
    if name := _aliased(problem, results):
        fail(f"{name}: shares memory with an input")
    if name := identical(results, run(operator.ours, problem, gradients=gradients)):
        fail(f"{name}: two runs differ")
    with poisoned_memory():
        poisoned = run(operator.ours, problem, gradients=gradients)
    if name := identical(results, poisoned):
        fail(f"{name}: not fully written, or computed from memory that was not")
    if backend in KERNELS and (name := _batch_dependent(operator, problem, results, gradients)):
        fail(f"{name}: a row depends on the batch it comes in")


def _batch_dependent(
    operator: Operator, problem: Problem, results: Mapping[str, Tensor], gradients: bool
) -> str | None:
    """The first result whose first half of rows is another when the other half is not there."""
    first = problem.arguments[operator.rows[0]] if operator.rows else None
    # A dropout mask is drawn by position, the same whatever follows, so it may stay.
    if first is None or first.dim() < 2 or first.shape[0] < 2:
        return None
    rows = first.shape[0] // 2
    half = run(operator.ours, narrow(operator, problem, rows), gradients=gradients)
    by_row = [n for n in results if n.removeprefix("grad_") in operator.rows]
    return identical({n: half[n] for n in by_row}, {n: results[n][:rows] for n in by_row})


def _aliased(problem: Problem, results: Mapping[str, Tensor]) -> str | None:
    inputs = {
        tensor.untyped_storage().data_ptr()
        for tensor in problem.arguments.values()
        if tensor is not None and tensor.numel()
    }
    for name, result in results.items():
        if name.startswith("grad_"):  # a gradient may be its output's gradient, as torch's are
            continue
        if result.numel() and result.untyped_storage().data_ptr() in inputs:
            return name
    return None
