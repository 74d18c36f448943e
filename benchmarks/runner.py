"""The run: for every point the gate, then every group of variants timed against each other."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

import fastseq
from fastseq.backends import BackendError, Decision, recorded
from fastseq.testing import Problem, make_problem

from . import ceilings, latency, memory
from .gate import Admitted, Gate, Probe, in_a_line, raise_if_lost, skipped
from .points import Point
from .providers import BASELINE, backends_used, make_variant, providers_of
from .registry import DTYPES, Cost, Provider
from .results import Results, Row
from .statistics import Samples, noise, ratio, summarise
from .timing import (
    CpuTimer,
    GpuTimer,
    Run,
    Timer,
    interleave,
    least_rounds,
    wall_seconds,
)

#: Sampling time of a group: usual; under a budget at what is asked; and the least.
GROUP_SECONDS, ASKED_SECONDS, LEAST_GROUP_SECONDS = 1.0, 0.2, 0.1
#: The part of the budget that comes before what is asked: fresh memory, which must be first.
BEFORE_ASKED = 0.03
AGAIN = f"{BASELINE} again"
#: About what a call takes of a forward and backward.
_PARTS = {"inference": 0.4, "fwd": 0.4, "bwd": 0.6, "fwd+bwd": 1.0}


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
class _Phase:
    """Points that share a deadline, and what has been learnt of what they take.

    Attributes:
        overhead: seconds taken beside sampling, by ``groups`` groups.
    """

    deadline: float | None
    groups_left: int
    seconds: float
    overhead: float = 0.0
    groups: int = 0

    def share(self) -> float:
        """Sampling seconds for each of the next groups."""
        if self.deadline is None:
            return self.seconds
        usual = self.overhead / self.groups if self.groups else 0.0
        fair = (self.deadline - time.perf_counter()) / max(1, self.groups_left) - usual
        return min(self.seconds, max(LEAST_GROUP_SECONDS, fair))

    def has_time(self, seconds: float = 0.0) -> bool:
        return self.deadline is None or time.perf_counter() + seconds < self.deadline


@dataclass(frozen=True)
class _FirstCall:
    """What a variant's first call shows, with the most threads that are measured."""

    peak_bytes: int | None
    backend: str
    seconds: float


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

    def __post_init__(self) -> None:
        self._gate = Gate(self.settings.device)
        self._first_calls: dict[tuple[str, ...], _FirstCall] = {}

    def run(self, phases: Sequence[Sequence[Point]]) -> None:
        """Measure all points, or those that the budget has time for."""
        # What is there already is no garbage: to look through it all after every group takes long.
        gc.freeze()
        try:
            self._run(phases)
        finally:
            gc.unfreeze()

    def _run(self, phases: Sequence[Sequence[Point]]) -> None:
        settings = self.settings
        started = time.perf_counter()
        timer: Timer = GpuTimer() if settings.device.type == "cuda" else CpuTimer()
        self._measure_ceilings(phases)
        done = 0
        for phase, points in zip(self._phases(phases, started), phases, strict=True):
            if settings.device.type == "cpu" and points:
                memory.set_allocation(points[0].policies[0])
            for point in points:
                self.tell(str(point), done)
                self._point(point, timer, phase)
                done += 1
                self.save()
        self.tell("", done)

    def _phases(self, phases: Sequence[Sequence[Point]], started: float) -> list[_Phase]:
        """Each with an equal share of the budget; what one leaves over, the next one has.

        Where something is asked it has all but BEFORE_ASKED, which goes to what must come before.
        """
        found = []
        asks = [any(point.asked for point in points) for points in phases]
        first = asks.index(True) if any(asks) else None
        for index, points in enumerate(phases):
            deadline, seconds = None, self.settings.group_seconds
            if self.settings.budget is not None:
                part = (index + 1) / len(phases)
                if first is not None:
                    part = 1.0 if index >= first else BEFORE_ASKED * (index + 1) / first
                    seconds = min(seconds, ASKED_SECONDS)
                deadline = started + self.settings.budget * part
            groups = sum(len(self._groups(point)) for point in points)
            found.append(_Phase(deadline, groups, seconds))
        return found

    def _measure_ceilings(self, phases: Sequence[Sequence[Point]]) -> None:
        dtypes = {p.dtype: DTYPES[p.dtype] for phase in phases for p in phase}
        for count in self._thread_counts():
            missing = dtypes.keys() - self.results.ceilings.get(str(count), {}).get("matmul", {})
            if not missing:
                continue
            self.tell(f"ceilings, {count} threads", 0)
            torch.set_num_threads(count)
            usual = 0.5 if self.settings.budget is None else ASKED_SECONDS
            seconds = min(usual, self.settings.group_seconds)
            found = ceilings.measure(self.settings.device, dtypes, seconds)
            if self.settings.device.type == "cuda" and self.settings.suite != "smoke":
                capability = torch.cuda.get_device_capability(self.settings.device)
                found["latency"] = latency.measure(latency.architecture_of(capability))
            self.results.ceilings[str(count)] = found

    def _thread_counts(self) -> Sequence[int]:
        """The most first: a variant's first call, of which one does, is quickest there."""
        on_gpu = self.settings.device.type == "cuda"
        return [torch.get_num_threads()] if on_gpu else sorted(self.settings.threads, reverse=True)

    # --- one point -------------------------------------------------------------------------------

    def _groups(self, point: Point) -> list[Row]:
        """The point's groups, as rows to be filled."""
        operator = point.benchmark.operator
        where = (operator.family, operator.name, point.label, point.dtype)
        blank = Row(
            *where, mode="", device=self.settings.device.type, threads=0, policy="", provider=""
        )
        return [
            replace(blank, mode=mode, threads=threads, policy=policy)
            for threads in self._thread_counts()
            for mode in point.modes
            for policy in point.policies
        ]

    def _wanted(self, point: Point) -> list[Provider]:
        asked = [BASELINE, "fastseq"] if point.asked else None
        return providers_of(
            point.benchmark,
            point.sizes,
            self.settings.providers or asked,
            self.settings.suite,
            self.settings.device.type,
        )

    def _point(self, point: Point, timer: Timer, phase: _Phase) -> None:
        groups = self._groups(point)
        phase.groups_left -= len(groups)
        known = {row.group for row in self.results.rows}
        groups = [group for group in groups if group.group not in known]
        if not groups:
            return
        if not phase.has_time():
            self.results.dropped.append(str(point))
            return

        started = time.perf_counter()
        if self.settings.device.type == "cpu":
            torch.set_num_threads(max(self.settings.threads))  # nothing is timed before a group
        problem = make_problem(
            point.benchmark.operator, point.sizes, DTYPES[point.dtype], self.settings.device
        )
        modes = tuple(dict.fromkeys(group.mode for group in groups))
        probe = Probe.of(point, problem, modes, self.settings.device)
        if not phase.has_time(self._expected(probe, groups)):
            self.results.dropped.append(str(point))
            return
        wanted = self._without_doubles(self._wanted(point), problem)
        admitted = self._gate.pass_through(point, problem, wanted, probe)
        problems = [problem, *self._copies(point, problem)]
        phase.groups_left += len(groups)
        sampled = 0.0
        for group in groups:
            # A group is measured whole or not at all: ratios are of one measurement.
            self.results.rows = [row for row in self.results.rows if row.group != group.group]
            torch.set_num_threads(group.threads)
            begin, seconds = time.perf_counter(), phase.share()
            self.results.rows += self._group(point, group, problems, admitted, timer, seconds)
            sampled += min(seconds, time.perf_counter() - begin)
            phase.groups_left -= 1
            gc.collect()
        phase.overhead += time.perf_counter() - started - sampled
        phase.groups += len(groups)

    def _expected(self, probe: Probe, groups: Sequence[Row]) -> float:
        """Seconds a point takes at the least: the oracle, a run of ours, first calls, rounds.

        The probe had the most threads; with fewer what takes long takes as many times longer.
        """
        most = max(group.threads for group in groups)
        part = 1.0 if probe.gradients else _PARTS["inference"]
        first = sum(_PARTS[mode] for mode in {group.mode for group in groups})
        rounds = least_rounds(2 * probe.seconds)
        sampled = sum(rounds * _PARTS[group.mode] * most / group.threads for group in groups)
        return probe.seconds * (3 + 2 * (first + sampled) / part)

    def _without_doubles(self, wanted: list[Provider], problem: Problem) -> list[Provider]:
        """Without the forced backends that are what fastseq chooses anyway, unless asked for."""
        ours = next((p for p in wanted if p.name == "fastseq"), None)
        forced = any(p.backend for p in wanted)
        if ours is None or not forced or self.settings.providers or self.settings.suite == "all":
            return wanted
        try:
            chosen = backends_used(ours, problem)
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

    # --- one group -------------------------------------------------------------------------------

    def _group(
        self,
        point: Point,
        group: Row,
        problems: Sequence[Problem],
        admitted: Sequence[Admitted],
        timer: Timer,
        seconds: float,
    ) -> list[Row]:
        """Time all providers against each other, the baseline twice."""
        rows: list[Row] = []
        runs: dict[str, Run] = {}
        for one in admitted:
            errors = {name: list(pair) for name, pair in one.ratios.items()}
            row = replace(group, provider=one.provider.name, errors=errors)
            rows.append(row)
            wrong = one.wrong
            try:
                if wrong is None:
                    runs[row.provider] = self._prepared(one, row, problems, timer)
            except BackendError as error:
                wrong = skipped(error)
            except Exception as error:  # an operation that a graph cannot capture, for one
                raise_if_lost(error, self.settings.device)
                wrong = in_a_line(error)
            if wrong is not None and wrong.startswith("skipped: "):
                row.skipped = wrong.removeprefix("skipped: ")
            else:
                row.failure = wrong
        if BASELINE in runs:
            timed, repeated = _timed(timer, runs, seconds)
            cost = point.benchmark.cost_of(problems[0], group.mode)
            for row in rows:
                if row.provider in timed:
                    self._fill(row, timed[row.provider], timed[BASELINE], repeated, cost)
                    self._fill_in_the_rest(row, runs[row.provider])
        fastseq.use_backend("auto")
        torch.set_grad_enabled(True)
        return rows

    def _prepared(self, one: Admitted, row: Row, problems: Sequence[Problem], timer: Timer) -> Run:
        """The provider's run, its first call made: what that shows is known of the row then."""
        device = self.settings.device
        where = (row.operator, row.label, row.dtype, row.mode, row.provider)
        with timer.building(), recorded() as decisions:
            variant = make_variant(one.provider, one.function, problems, row.mode)
            known = self._first_calls.get(where)
            if known is None or device.type == "cuda" or one.provider.setup:
                variant.enter()
                call = variant.calls[0]
                if device.type == "cuda" or one.provider.setup:
                    call()  # what is compiled or set up once is no call's memory
                started = time.perf_counter()
                peak = memory.peak_bytes(call, device)
                seconds = time.perf_counter() - started
                known = _FirstCall(peak, _backends(decisions), seconds)
                self._first_calls[where] = known
                variant.counts = device.type == "cpu" and not one.provider.setup
            if device.type == "cpu":
                variant.first = known.seconds
            ready = timer.prepare(variant, row.policy)
        row.peak_bytes = known.peak_bytes
        # What serves a small problem depends on the threads; a slow one has not been called again.
        row.backend = known.backend if ready.slow else _backends(decisions)
        return ready

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

    def _fill_in_the_rest(self, row: Row, run: Run) -> None:
        if self.settings.device.type == "cuda":
            expected = (row.milliseconds or 0.0) * 1e-3
            taken = wall_seconds(run.variant, self.settings.device, expected)
            row.wall_milliseconds = taken * 1e3
        else:
            row.page_faults = run.faults // run.calls


def _backends(decisions: Sequence[Decision]) -> str:
    return ", ".join(dict.fromkeys(decision.backend for decision in decisions))


def _timed(
    timer: Timer, runs: dict[str, Run], seconds: float
) -> tuple[dict[str, Samples], Samples]:
    """Samples of all runs by name, and the baseline's once more."""
    baseline = runs[BASELINE]
    if baseline.slow and isinstance(timer, CpuTimer):
        # It is its own second timing: one round's against the next one's.
        samples = interleave(timer, list(runs.values()), seconds)
        timed = dict(zip(runs, samples, strict=True))
        return timed, timed[BASELINE].roll(1)
    again = replace(baseline, variant=replace(baseline.variant, name=AGAIN))
    *samples, repeated = interleave(timer, [*runs.values(), again], seconds)
    return dict(zip(runs, samples, strict=True)), repeated
