"""The run: for every point the gate, then every group of variants timed against each other."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import fastseq
from fastseq.backends import BackendError
from fastseq.testing import BOUND, MismatchError, Problem, make_problem, measure_torch, run
from fastseq.testing.check import device_works
from fastseq.testing.operators import Function, Ratios

from . import ceilings, memory
from .points import Point
from .providers import BASELINE, backends_used, make_variant, providers_of
from .registry import DTYPES, Cost, Provider
from .results import Results, Row
from .statistics import Samples, noise, ratio, summarise
from .timing import CpuTimer, GpuTimer, Run, Timer, Variant, interleave, wall_seconds

#: Sampling time of a group: usual, and the least before points are dropped instead.
GROUP_SECONDS, LEAST_GROUP_SECONDS = 1.0, 0.1
AGAIN = f"{BASELINE} again"


@dataclass
class Settings:
    """What a run is asked for."""

    device: torch.device
    modes: Sequence[str]
    threads: Sequence[int]
    suite: str
    providers: Sequence[str] | None = None
    budget: float | None = None
    group_seconds: float = GROUP_SECONDS


@dataclass
class Runner:
    """Fills ``results`` point by point.

    Attributes:
        save: called after every point.
        tell: called with what is being done, and how many points are done.
    """

    settings: Settings
    results: Results
    save: Callable[[], None] = lambda: None
    tell: Callable[[str, int], None] = lambda text, done: None
    _verdicts: dict[tuple[str, str, str, str], tuple[Ratios, str | None]] = field(
        default_factory=dict
    )
    #: Seconds that points of a size took beside their sampling, the longest.
    _overheads: dict[str, float] = field(default_factory=dict)

    def run(self, phases: Sequence[Sequence[Point]]) -> None:
        """Measure all points, or those that the budget has time for.

        Every phase has an equal share of the budget; what one leaves over, the next one has.
        """
        settings = self.settings
        started = time.perf_counter()
        timer: Timer = GpuTimer() if settings.device.type == "cuda" else CpuTimer()
        self._measure_ceilings(phases)
        budget = settings.budget and settings.budget - (time.perf_counter() - started)
        done = 0
        began = time.perf_counter()
        for index, phase in enumerate(phases):
            if settings.device.type == "cpu" and phase:
                memory.set_allocation(phase[0].policies[0])
            deadline = None if budget is None else began + budget * (index + 1) / len(phases)
            for number, point in enumerate(phase):
                self.tell(str(point), done)
                self._point(point, timer, self._share(deadline, len(phase) - number, point))
                done += 1
                self.save()
        self.tell("", done)

    def _groups(self, point: Point) -> int:
        threads = len(self.settings.threads) if self.settings.device.type == "cpu" else 1
        modes = sum(mode in point.benchmark.modes for mode in self.settings.modes)
        return max(1, len(point.policies) * modes * threads)

    def _share(self, deadline: float | None, points_left: int, point: Point) -> float:
        """Sampling seconds for each group of this point; 0 where there is no time for it."""
        usual = self.settings.group_seconds
        if deadline is None:
            return usual
        left = deadline - time.perf_counter()
        groups = self._groups(point)
        known = list(self._overheads.values())
        expected = self._overheads.get(point.label, max(known, default=0.0))
        if left < expected + LEAST_GROUP_SECONDS * groups:
            return 0.0
        usual_overhead = sum(known) / len(known) if known else 0.0
        fair = (left / points_left - usual_overhead) / groups
        return min(usual, max(LEAST_GROUP_SECONDS, fair))

    def _measure_ceilings(self, phases: Sequence[Sequence[Point]]) -> None:
        dtypes = {p.dtype: DTYPES[p.dtype] for phase in phases for p in phase}
        for count in self._thread_counts():
            if str(count) in self.results.ceilings or not dtypes:
                continue
            self.tell(f"ceilings, {count} threads", 0)
            torch.set_num_threads(count)
            seconds = min(0.5, self.settings.group_seconds)
            found = ceilings.measure(self.settings.device, dtypes, seconds)
            self.results.ceilings[str(count)] = found

    def _thread_counts(self) -> Sequence[int]:
        on_gpu = self.settings.device.type == "cuda"
        return [torch.get_num_threads()] if on_gpu else self.settings.threads

    # --- one point -------------------------------------------------------------------------------

    def _point(self, point: Point, timer: Timer, seconds: float) -> None:
        settings, operator = self.settings, point.benchmark.operator
        known = {row.group for row in self.results.rows}
        blank = Row(
            operator.family,
            operator.name,
            point.label,
            point.dtype,
            mode="",
            device=settings.device.type,
            threads=0,
            policy="",
            provider="",
        )
        wanted = providers_of(
            point.benchmark, settings.providers, settings.suite, settings.device.type
        )
        groups = [
            replace(blank, mode=mode, threads=threads, policy=policy)
            for threads in self._thread_counts()
            for mode in settings.modes
            if mode in point.benchmark.modes
            for policy in point.policies
        ]
        groups = [g for g in groups if g.group not in known]
        if not groups:
            return
        if not seconds:
            self.results.dropped.append(str(point))
            return

        started = time.perf_counter()
        problem = make_problem(operator, point.sizes, DTYPES[point.dtype], settings.device)
        wanted = self._without_doubles(wanted, problem)
        usable = self._gate(point, problem, wanted)
        problems = [problem, *self._copies(point, problem)]
        sampled = 0.0
        for group in groups:
            # A group is measured whole or not at all: ratios are of one measurement.
            self.results.rows = [row for row in self.results.rows if row.group != group.group]
            torch.set_num_threads(group.threads)
            begin = time.perf_counter()
            self.results.rows += self._group(point, group, problems, usable, timer, seconds)
            sampled += min(seconds, time.perf_counter() - begin)
            gc.collect()
        overhead = time.perf_counter() - started - sampled
        self._overheads[point.label] = max(overhead, self._overheads.get(point.label, 0.0))

    def _without_doubles(self, wanted: list[Provider], problem: Problem) -> list[Provider]:
        """Without the forced backends that are what fastseq chooses anyway, unless asked for."""
        ours = next((p for p in wanted if p.name == "fastseq"), None)
        if ours is None or self.settings.providers is not None or self.settings.suite == "all":
            return wanted
        try:
            chosen = backends_used(ours, problem, "fwd+bwd")
        except Exception:  # the gate, which runs it again, says what is wrong
            return wanted
        return [p for p in wanted if p.name != f"fastseq:{chosen}"]

    def _copies(self, point: Point, problem: Problem) -> list[Problem]:
        """On a GPU so many further inputs that all together are three times the L2 cache."""
        if self.settings.device.type != "cuda" or "cold" not in point.policies:
            return []
        tensors = [t for t in problem.arguments.values() if t is not None]
        size = sum(t.nbytes for t in (*tensors, *problem.grad_outputs.values()))
        cache = torch.cuda.get_device_properties(self.settings.device).L2_cache_size
        count = min(255, max(1, 3 * cache // max(1, size)))
        make, sizes = point.benchmark.operator, point.sizes
        dtype, device = DTYPES[point.dtype], self.settings.device
        return [make_problem(make, sizes, dtype, device, seed=n + 1) for n in range(count)]

    def _gate(
        self, point: Point, problem: Problem, wanted: Sequence[Provider]
    ) -> list[tuple[Provider, Function, Ratios, str | None]]:
        """Every provider with its errors, and what is wrong with it, or None.

        Raises:
            torch.AcceleratorError: the device itself failed; nothing after it would be true.
        """
        yardstick = None
        gated = []
        gradients = any(mode in ("bwd", "fwd+bwd") for mode in self.settings.modes)
        for provider in wanted:
            function = provider.setup(provider.function) if provider.setup else provider.function
            key = point.name, point.label, point.dtype, provider.name
            if key not in self._verdicts:
                if yardstick is None:
                    yardstick = measure_torch(point.benchmark.operator, problem)
                ratios: Ratios = {}
                wrong: str | None = None
                try:
                    with fastseq.use_backend(provider.backend or "auto"):
                        ratios = yardstick.ratios(_results(function, problem, gradients))
                    bad = {name: pair for name, pair in ratios.items() if not max(pair) <= BOUND}
                    if bad:
                        name, pair = max(bad.items(), key=lambda item: item[1][0])
                        wrong = f"wrong: {name} {pair[0]:.3g}x torch's error ({pair[1]:.3g}x RMS)"
                except MismatchError as mismatch:
                    wrong = f"wrong: {mismatch}"
                except BackendError as error:
                    wrong = f"skipped: {str(error).split('cannot serve: ')[-1]}"
                except Exception as error:  # a rival that cannot run must not end the run
                    self._raise_if_lost(error)
                    wrong = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self._verdicts[key] = ratios, wrong
            gated.append((provider, function, *self._verdicts[key]))
        return gated

    def _raise_if_lost(self, error: Exception) -> None:
        if isinstance(error, torch.AcceleratorError) and not device_works(self.settings.device):
            raise error

    # --- one group -------------------------------------------------------------------------------

    def _group(
        self,
        point: Point,
        group: Row,
        problems: Sequence[Problem],
        usable: Sequence[tuple[Provider, Function, Ratios, str | None]],
        timer: Timer,
        seconds: float,
    ) -> list[Row]:
        """Time all providers against each other, the baseline twice."""
        rows: list[Row] = []
        runs: list[Run] = []
        variants: list[Variant] = []
        for provider, function, ratios, verdict in usable:
            wrong = verdict
            errors = {name: list(pair) for name, pair in ratios.items()}
            row = replace(group, provider=provider.name, errors=errors)
            rows.append(row)
            try:
                if wrong is None:
                    with timer.building():
                        variant = make_variant(provider, function, problems, group.mode)
                        row.backend = backends_used(provider, problems[0], group.mode)
                    runs.append(timer.prepare(variant, group.policy))
                    variants.append(variant)
                    continue
            except BackendError as error:
                wrong = f"skipped: {str(error).split('cannot serve: ')[-1]}"
            except Exception as error:  # an operation that a graph cannot capture, for one
                self._raise_if_lost(error)
                wrong = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if wrong.startswith("skipped: "):
                row.skipped = wrong.removeprefix("skipped: ")
            else:
                row.failure = wrong
        baseline = next((r for r in runs if r.variant.name == BASELINE), None)
        if baseline is None:
            return rows
        again = replace(baseline, variant=replace(baseline.variant, name=AGAIN))
        *samples, repeated = interleave(timer, [*runs, again], seconds)
        timed = {run.variant.name: column for run, column in zip(runs, samples, strict=True)}
        cost = point.benchmark.cost_of(problems[0], group.mode)
        for row in rows:
            if row.provider in timed:
                self._fill(row, timed[row.provider], timed[BASELINE], repeated, cost)
        for variant in variants:
            self._measure_memory(next(r for r in rows if r.provider == variant.name), variant)
        fastseq.use_backend("auto")
        torch.set_grad_enabled(True)
        return rows

    def _fill(
        self, row: Row, samples: Samples, baseline: Samples, again: Samples, cost: Cost
    ) -> None:
        time_of = summarise(samples)
        paired = ratio(baseline, samples)
        if row.provider == BASELINE:
            paired = ratio(baseline, again)
        row.milliseconds, row.p20, row.p80 = (
            value * 1e3 for value in (time_of.median, time_of.p20, time_of.p80)
        )
        row.speedup, row.speedup_p20, row.speedup_p80 = paired.median, paired.p20, paired.p80
        row.noise = noise(paired, ratio(baseline, again), len(samples))
        row.rounds = len(samples)
        row.minimal_bytes = cost.bytes
        row.bytes_per_second = cost.bytes / time_of.median
        row.flops_per_second = cost.flops / time_of.median
        known = self.results.ceilings[str(row.threads)]
        matmul = cost.flops / known["matmul"][row.dtype] if cost.matmul else 0.0
        row.ceiling = max(cost.bytes / known["copy"], matmul) / time_of.median
        sheet = ceilings.datasheet(str(self.results.environment.get("device")))
        if sheet is not None:
            rate = sheet[1] if row.dtype in ("bf16", "fp16") else sheet[2]
            matmul = cost.flops / rate if cost.matmul else 0.0
            row.datasheet = max(cost.bytes / sheet[0], matmul) / time_of.median

    def _measure_memory(self, row: Row, variant: Variant) -> None:
        device, call = self.settings.device, variant.calls[0]
        if device.type == "cuda":
            row.wall_milliseconds = wall_seconds(variant, device) * 1e3
        variant.enter()
        row.peak_bytes = memory.peak_bytes(call, device)
        if device.type == "cpu":
            call()
            row.page_faults = memory.page_faults(call)


def _results(function: Function, problem: Problem, gradients: bool) -> dict[str, Any]:
    """Outputs and gradients; outputs alone where a forced backend has no backward."""
    if not gradients:
        return run(function, problem, gradients=False)
    try:
        return run(function, problem)
    except BackendError:
        return run(function, problem, gradients=False)
