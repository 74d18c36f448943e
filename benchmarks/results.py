"""The results file: rows, ceilings, environment; saved as the run goes, and resumed from."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .environment import IDENTITY
from .goals import Goal, look

SCHEMA = 1
Key = tuple[Any, ...]


@dataclass
class Row:
    """One provider in one group.

    Attributes:
        policy: ``reused`` or ``fresh`` on a CPU, ``cold`` or ``hot`` on a GPU.
        backend: which fastseq backends ran.
        milliseconds, p20, p80: of one call, without the host on a GPU.
        wall_milliseconds: of one call with the host.
        speedup, speedup_p20, speedup_p80: the baseline's time over this one's, pair by pair.
        noise: a relative change of the speedup below this is no news.
        bytes_per_second: of the least a call must move; ``flops_per_second`` likewise.
        ceiling: the part of the measured ceiling that was reached, 1 being all of it; ``datasheet``
            likewise of the maker's figure.
        peak_bytes: the most memory held at once beyond the inputs; ``page_faults`` of a call.
        errors: ``(max_ratio, rms_ratio)`` to torch's own error, by result (the gate's evidence).
        failure: why there is no time: wrong results, an exception; ``skipped``: cannot serve.
    """

    family: str
    operator: str
    label: str
    dtype: str
    mode: str
    device: str
    threads: int
    policy: str
    provider: str
    backend: str = ""
    milliseconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    wall_milliseconds: float | None = None
    speedup: float | None = None
    speedup_p20: float | None = None
    speedup_p80: float | None = None
    noise: float | None = None
    rounds: int = 0
    minimal_bytes: int = 0
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    ceiling: float | None = None
    datasheet: float | None = None
    peak_bytes: int | None = None
    page_faults: int | None = None
    errors: dict[str, list[float]] = field(default_factory=dict)
    failure: str | None = None
    skipped: str | None = None

    @property
    def group(self) -> Key:
        """What shares one interleaved measurement."""
        return (
            self.operator,
            self.label,
            self.dtype,
            self.mode,
            self.device,
            self.threads,
            self.policy,
        )

    @property
    def key(self) -> Key:
        return (*self.group, self.provider)


@dataclass
class Results:
    """Everything a run found.

    Attributes:
        goals: what was asked; what was seen of it is filled in on saving.
        dropped: the points there was no time for.
    """

    environment: dict[str, Any]
    ceilings: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write ``results.json`` and ``results.csv``, never leaving half a file behind."""
        folder.mkdir(parents=True, exist_ok=True)
        look(self.goals, self.rows)
        content = {
            "schema": SCHEMA,
            "environment": self.environment,
            "ceilings": self.ceilings,
            "dropped": self.dropped,
            "asked": [{**asdict(goal), "reached": goal.reached} for goal in self.goals],
            "rows": [
                {name: value for name, value in asdict(row).items() if value not in (None, {}, "")}
                for row in self.rows
            ],
        }
        part = folder / "results.json.part"
        part.write_text(json.dumps(_rounded(content), indent=1) + "\n")
        os.replace(part, folder / "results.json")
        names = [f.name for f in fields(Row) if f.name != "errors"]
        part = folder / "results.csv.part"
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*names, "max_error", "rms_error"], restval="")
            writer.writeheader()
            for row in self.rows:
                flat = {name: getattr(row, name) for name in names}
                pairs = list(row.errors.values())
                flat["max_error"] = max((p[0] for p in pairs), default=None)
                flat["rms_error"] = max((p[1] for p in pairs), default=None)
                writer.writerow(flat)
        os.replace(part, folder / "results.csv")


class ResultsError(ValueError):
    """A results file cannot be used."""


def load(path: Path) -> Results:
    """Read a results file, or the one in a folder.

    Raises:
        ResultsError: there is none, or it is not one of this version.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ResultsError(f"{path}: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ResultsError(f"{path}: not a results file of schema {SCHEMA}")
    rows = [Row(**row) for row in content["rows"]]
    names = {f.name for f in fields(Goal)}
    goals = [Goal(**{k: v for k, v in g.items() if k in names}) for g in content.get("asked", [])]
    return Results(content["environment"], content["ceilings"], rows, content["dropped"], goals)


def check_same_origin(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Rows of two machines or versions must not stand in one file.

    Raises:
        ResultsError: they would.
    """
    for name in IDENTITY:
        if old.get(name) != new.get(name):
            raise ResultsError(
                f"cannot resume: the results have {name} {old.get(name)!r}, now it is "
                f"{new.get(name)!r}"
            )


def _rounded(value: Any) -> Any:
    """Six digits: what is measured has fewer, and the files stay small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
