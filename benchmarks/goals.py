"""What was asked beside what was seen: one line for every ratio that an operator is to reach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .points import Point
from .providers import BASELINE

if TYPE_CHECKING:
    from .results import Row

OURS = "fastseq"


@dataclass
class Goal:
    """One figure to reach, of one operator at one size, dtype, mode and number of threads.

    Attributes:
        what: ``speedup`` over torch (at least), ``memory`` as a part of torch's peak (at most), or
            ``time`` in units of fastseq's own at the sizes ``beside`` (at most).
        wanted: the figure asked for; ``seen`` the one measured, None where there was no time.
        noise: how far a speedup can be off, relative.
    """

    operator: str
    label: str
    dtype: str
    mode: str
    threads: int
    what: str
    wanted: float
    beside: str = ""
    seen: float | None = None
    noise: float = 0.0

    @property
    def reached(self) -> bool | None:
        """Whether it was; None where it was not measured."""
        if self.seen is None:
            return None
        return self.seen >= self.wanted if self.what == "speedup" else self.seen <= self.wanted

    @property
    def in_doubt(self) -> bool:
        """Missed by less than the noise."""
        return (
            self.reached is False
            and self.seen is not None
            and (
                self.seen * (1 + self.noise) >= self.wanted
                if self.what == "speedup"
                else self.seen <= self.wanted * (1 + self.noise)
            )
        )

    @property
    def place(self) -> tuple[str, str, str, str, int]:
        return self.operator, self.label, self.dtype, self.mode, self.threads

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"{self.operator} {self.label} {self.dtype} {self.mode}, {threads}: {self.words}"

    @property
    def words(self) -> str:
        """What is asked, in words."""
        if self.what == "speedup":
            return f"{self.wanted:g}x torch's speed"
        if self.what == "memory":
            return f"{self.wanted:.3g} of torch's peak memory"
        return f"{self.wanted:g}x the time of {self.beside}"


def goals_of(points: Iterable[Point], threads: Sequence[int]) -> list[Goal]:
    """Everything asked at these points, with every number of threads."""
    found = []
    for point in points:
        for asked in point.asked:
            figures = {"speedup": asked.speedup, "memory": asked.memory, "time": asked.times}
            beside = "" if asked.beside is None else point.benchmark.label(asked.beside)
            found += [
                Goal(
                    point.name,
                    point.label,
                    point.dtype,
                    asked.mode,
                    count,
                    what,
                    wanted,
                    beside if what == "time" else "",
                )
                for what, wanted in figures.items()
                if wanted is not None
                for count in threads
            ]
    return found


def look(goals: Iterable[Goal], rows: Iterable[Row]) -> None:
    """Fill in what the rows show. Only memory reused counts: fresh pages cost everyone the same."""
    known = {
        (r.operator, r.label, r.dtype, r.mode, r.threads, r.provider): r
        for r in rows
        if r.policy == "reused" and r.milliseconds is not None
    }
    for goal in goals:
        ours = known.get((*goal.place, OURS))
        theirs = known.get((*goal.place, BASELINE))
        beside = (goal.operator, goal.beside, goal.dtype, goal.mode, goal.threads, OURS)
        other = known.get(beside)
        goal.seen = None
        if ours is None:
            continue
        goal.noise = ours.noise or 0.0
        if goal.what == "speedup":
            goal.seen = ours.speedup
        elif goal.what == "memory" and theirs is not None and theirs.peak_bytes:
            goal.noise, goal.seen = 0.0, (ours.peak_bytes or 0) / theirs.peak_bytes
        elif goal.what == "time" and other is not None:
            goal.seen = ours.milliseconds / other.milliseconds
