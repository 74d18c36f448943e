"""``fastseq verify``: every kernel against the truth, on this machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import testing
from ..backends import NAMES, backends
from ..ops._op import REGISTRY
from ..testing.check import Outcome, check
from ..testing.operators import Case, Operator

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
_SHORT = {dtype: name for name, dtype in _DTYPES.items()}


def run(argv: list[str]) -> int:
    """The command: 0 when everything holds, 1 when something does not, 2 for wrong arguments."""
    options = _parser().parse_args(argv)
    device = _device(options.device)
    if device is None:
        print(f"verify: torch sees no device {options.device}", file=sys.stderr)
        return 2
    plan = _plan(options, device)
    if not plan:
        print("verify: nothing to check: no case is left by these options", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    stopped: str | None = None
    try:
        with _progress(len(plan)) as advance:
            for outcome in _outcomes(plan, device, advance):
                outcomes.append(outcome)
    except torch.AcceleratorError as error:
        stopped = f"the device failed, nothing can follow: {error}"
    except KeyboardInterrupt:
        stopped = "interrupted"
    finally:
        if options.json:
            _save(options.json, device, outcomes, stopped)
    failed = [outcome for outcome in outcomes if outcome.failures]
    _report(_summaries(outcomes), failed, stopped, device)
    return 1 if failed or stopped else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastseq verify",
        description="Run every operator on every backend that this machine has, against torch in "
        "fp64. Errors are given in units of torch's own error in the same dtype; at most "
        f"{testing.BOUND:g} passes. Also checked: gradients, untouched inputs, and equality to the "
        "bit of two runs, of runs in memory poisoned with NaN, and of rows in whatever batch.",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU where there is one), cpu, cuda"
    )
    parser.add_argument("--family", choices=testing.FAMILIES, action="append")
    parser.add_argument("--dtype", choices=_DTYPES, action="append")
    parser.add_argument("--backend", choices=("auto", *NAMES), action="append")
    parser.add_argument("--quick", action="store_true", help="a few cases of each operator")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome here")
    return parser


def _device(name: str) -> torch.device | None:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        return None
    usable = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
    return device if usable else None


# --- what is run ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One problem, and the backends to try on it."""

    operator: Operator
    case: Case
    dtype: torch.dtype
    backends: tuple[str, ...]


def _plan(options: argparse.Namespace, device: torch.device) -> list[_Step]:
    families = options.family or testing.FAMILIES
    dtypes = [_DTYPES[name] for name in options.dtype or _DTYPES]
    steps = []
    for operator in testing.OPERATORS.values():
        if operator.family not in families:
            continue
        names = _backends_of(operator, options.backend, device)
        for case in operator.cases:
            if (options.quick and not case.quick) or (case.large and device.type == "cpu"):
                continue
            # The interpreter takes milliseconds for what a GPU does in nanoseconds.
            interpreted = device.type == "cpu" and not case.tiny
            chosen = tuple(name for name in names if not (name == "triton" and interpreted))
            if chosen:
                steps += [_Step(operator, case, d, chosen) for d in dtypes if d in case.dtypes]
    return steps


def _backends_of(
    operator: Operator, wanted: Sequence[str] | None, device: torch.device
) -> list[str]:
    """``auto`` and the operator's own backends that this machine and device can run."""
    usable = {name for name, state in backends().items() if state.startswith("available")}
    if device.type == "cpu":
        usable.discard("cuda")
        if os.environ.get("TRITON_INTERPRET") != "1":
            usable.discard("triton")
    else:
        usable.discard("cpu")
    registered = [candidate.backend for candidate in REGISTRY[operator.op]]
    names = ["auto", *(name for name in registered if name in usable)]
    return [name for name in names if not wanted or name in wanted]


def _outcomes(
    plan: list[_Step], device: torch.device, advance: Callable[[str], None]
) -> Iterator[Outcome]:
    for step in plan:
        operator, case, dtype = step.operator, step.case, step.dtype
        advance(f"{operator.name} {_SHORT[dtype]} {case.name}")
        problem = testing.make_problem(operator, case.sizes, dtype, device)
        yardstick = testing.measure_torch(operator, problem)
        for backend in step.backends:
            # One problem for all backends: `check` sees to it that none of them changes it.
            yield check(operator, backend, dtype, case, device, yardstick)


# --- what is said --------------------------------------------------------------------------------


@dataclass
class _Summary:
    """The outcomes of one operator, backend and dtype."""

    operator: str
    backend: str
    dtype: str
    checked: int = 0
    failed: int = 0
    largest: float = 0.0
    typical: float = 0.0
    worst_case: str = ""
    ran: set[str] = field(default_factory=set)
    gradients: int = 0
    skipped: set[str] = field(default_factory=set)

    def add(self, outcome: Outcome) -> None:
        if outcome.skipped is not None:
            self.skipped.add(outcome.skipped)
            return
        self.checked += 1
        self.failed += bool(outcome.failures)
        self.gradients += outcome.gradients
        self.ran |= set(outcome.ran.values())
        largest, typical = outcome.largest
        if largest > self.largest or not self.worst_case:
            self.largest, self.worst_case = largest, outcome.case
        self.typical = max(self.typical, typical)

    def cells(self) -> list[str]:
        result = "FAILED" if self.failed else "passed" if self.checked else "skipped"
        cases = f"{self.checked - self.failed}/{self.checked}" if self.checked else "-"
        if not self.checked:
            remark = "; ".join(sorted(self.skipped))
        elif self.gradients < self.checked:
            remark = f"{self.worst_case} ({self.checked - self.gradients} without gradients)"
        else:
            remark = self.worst_case
        ran = ", ".join(sorted(self.ran)) if self.backend == "auto" else self.backend
        name = f"auto ({ran})" if self.backend == "auto" and ran else self.backend
        ratios = [f"{self.largest:.2f}", f"{self.typical:.2f}"] if self.checked else ["-", "-"]
        return [self.operator, name, self.dtype, result, cases, *ratios, remark]


_COLUMNS = ("operator", "backend", "dtype", "result", "cases", "max", "rms", "worst case or reason")


def _summaries(outcomes: list[Outcome]) -> list[_Summary]:
    table: dict[tuple[str, str, torch.dtype], _Summary] = {}
    for outcome in outcomes:
        key = outcome.operator, outcome.backend, outcome.dtype
        if key not in table:
            table[key] = _Summary(outcome.operator, outcome.backend, _SHORT[outcome.dtype])
        table[key].add(outcome)
    return list(table.values())


def _report(
    summaries: list[_Summary], failed: list[Outcome], stopped: str | None, device: torch.device
) -> None:
    title = f"fastseq verify on {_device_name(device)}: error in units of torch's own"
    rows = [summary.cells() for summary in summaries]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        print(title)
        for row in [list(_COLUMNS), *rows]:
            print("  ".join(cell.ljust(14) for cell in row).rstrip())
    else:
        table = Table(title=title, title_justify="left")
        for column in _COLUMNS:
            right = column in ("cases", "max", "rms")
            table.add_column(
                column, justify="right" if right else "left", no_wrap=column == "operator"
            )
        colours = {"passed": "green", "FAILED": "bold red", "skipped": "dim"}
        for row in rows:
            cells = [*row[:3], f"[{colours[row[3]]}]{row[3]}[/]", *row[4:]]
            table.add_row(*cells)
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    for outcome in failed:
        where = f"{outcome.operator} {outcome.backend} {_SHORT[outcome.dtype]}, {outcome.case}"
        print(f"FAILED {where}:")
        for failure in outcome.failures:
            print(f"    {failure.splitlines()[0] if failure else failure}")
    checked = sum(summary.checked for summary in summaries)
    print(f"{checked} checks, {len(failed)} failed" + (f"; {stopped}" if stopped else ""))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ModuleNotFoundError:
        yield lambda text: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=total)
        started = 0

        def advance(text: str) -> None:
            nonlocal started
            progress.update(task, completed=started, description=text)
            started += 1

        yield advance


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU ({torch.get_num_threads()} threads)"


def _save(path: Path, device: torch.device, outcomes: list[Outcome], stopped: str | None) -> None:
    from .. import __version__

    def plain(outcome: Outcome) -> dict[str, Any]:
        return {**vars(outcome), "dtype": _SHORT[outcome.dtype]}

    report = {
        "fastseq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": _device_name(device),
        "backends": backends(),
        "bound": testing.BOUND,
        "stopped": stopped,
        "passed": not stopped and not any(outcome.failures for outcome in outcomes),
        "outcomes": [plain(outcome) for outcome in outcomes],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
