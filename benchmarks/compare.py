"""What moved between two results files, beyond the noise of both."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .console import Console, Table, Text
from .providers import BASELINE
from .report import case_name, duration
from .results import Results, Row

#: Two processes differ by this much for reasons no run can see in itself (where memory lies, say).
LEAST = 0.05


@dataclass(frozen=True)
class Change:
    """One row in both files.

    Attributes:
        ratio: new speedup over old: what fastseq became faster by, torch's time in each run being
            the unit. Absolute times of two runs also differ by what else the machine did.
        threshold: a ratio within ``1 / (1 + threshold)`` and ``1 + threshold`` is noise.
    """

    old: Row
    new: Row
    ratio: float
    threshold: float

    @property
    def moved(self) -> bool:
        return abs(math.log(self.ratio)) > math.log1p(self.threshold)


def changes(old: Results, new: Results, least: float = LEAST) -> list[Change]:
    """Every row of both files that has a time in both, the baseline's apart."""
    before = {row.key: row for row in old.rows}
    found = []
    for row in new.rows:
        match = before.get(row.key)
        if match is None or row.provider == BASELINE or not row.speedup or not match.speedup:
            continue
        threshold = max(least, math.hypot(row.noise or 0.0, match.noise or 0.0))
        found.append(Change(match, row, row.speedup / match.speedup, threshold))
    return found


def broken(old: Results, new: Results) -> list[Row]:
    """Rows that had a time and now fail."""
    had = {row.key for row in old.rows if row.milliseconds is not None}
    return [row for row in new.rows if row.failure is not None and row.key in had]


def show(old: Results, new: Results, console: Console, least: float = LEAST) -> int:
    """Print what moved; returns how many rows became slower or broke."""
    for name in ("device", "torch", "commit"):
        if old.environment.get(name) != new.environment.get(name):
            console.print(f"{name}: {old.environment.get(name)} -> {new.environment.get(name)}")
    compared = changes(old, new, least)
    moved = sorted((c for c in compared if c.moved), key=lambda change: change.ratio)
    if moved:
        table = Table(show_edge=False)
        for column in ("operator", "case", "provider"):
            table.add_column(column)
        for column in ("before", "after", "speedup before", "after", "change", "noise"):
            table.add_column(column, justify="right")
        for change in moved:
            before, after = change.old, change.new
            style = "red" if change.ratio < 1 else "green"
            word = f"{change.ratio:.2f}x"
            table.add_row(
                after.operator,
                case_name(after),
                after.provider,
                duration(before.milliseconds or 0.0),
                duration(after.milliseconds or 0.0),
                f"{before.speedup:.2f}x",
                f"{after.speedup:.2f}x",
                Text(word, style=style),
                f"{change.threshold:.1%}",
            )
        console.print(table)
    failed = broken(old, new)
    for row in failed:
        console.print(f"{row.operator} {case_name(row)} {row.provider}: {row.failure}", style="red")
    slower = sum(change.ratio < 1 for change in moved)
    console.print(
        f"{len(compared)} rows compared: {slower} slower, {len(moved) - slower} faster, "
        f"{len(failed)} broken"
    )
    return slower + len(failed)
