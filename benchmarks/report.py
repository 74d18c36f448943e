"""Results as tables: on the terminal, and as Markdown for the README."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import latency
from .console import Console, Table, Text
from .goals import OURS, Goal, look
from .providers import BASELINE
from .registry import DTYPES
from .results import Results, Row


def duration(milliseconds: float) -> str:
    """With three digits, in the unit that suits: ns, us, ms or s."""
    for factor, unit in ((1e-3, "s"), (1.0, "ms"), (1e3, "us"), (1e6, "ns")):
        if milliseconds * factor >= 1.0:
            return f"{milliseconds * factor:.3g} {unit}"
    return f"{milliseconds * 1e6:.3g} ns"


def size(count: float) -> str:
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


_COLUMNS = {
    "provider": "left",
    "time": "right",
    "p20-p80": "right",
    "speedup": "right",
    "asked": "right",
    "noise": "right",
    "GB/s": "right",
    "% ceiling": "right",
    "wall": "right",
    "peak": "right",
    "error": "right",
}


def show(results: Results, console: Console, rows: Sequence[Row] | None = None) -> None:
    """A table for every operator; a line for what was dropped."""
    rows = results.rows if rows is None else rows
    on_gpu = any(row.device == "cuda" for row in rows)
    look(results.goals, results.rows)
    goals: dict[tuple[object, ...], list[Goal]] = {}
    for goal in results.goals:
        goals.setdefault(goal.place, []).append(goal)
    there = {"wall": on_gpu, "asked": bool(goals)}
    columns = [c for c in _COLUMNS if there.get(c, True)]
    for operator in dict.fromkeys(row.operator for row in rows):
        table = Table(title=operator, title_justify="left", title_style="bold", show_edge=False)
        table.add_column("case")
        for column in columns:
            table.add_column(column, justify=_COLUMNS[column])  # type: ignore[arg-type]
        mine = [row for row in rows if row.operator == operator]
        for group in dict.fromkeys(row.group for row in mine):
            members = [row for row in mine if row.group == group]
            for number, row in enumerate(members):
                cells = _cells(row)
                if row.provider == OURS and row.policy == "reused":
                    cells["asked"] = _asked(goals.get(_place_of(row), []))
                case = "" if number else case_name(row)
                last = number == len(members) - 1
                table.add_row(case, *[cells[c] for c in columns], end_section=last)
        console.print(table)
        console.print()
    if results.dropped:
        console.print(f"no time for {len(results.dropped)} points: {', '.join(results.dropped)}")


def _place_of(row: Row) -> tuple[object, ...]:
    return row.operator, row.label, row.dtype, row.mode, row.threads


def _asked(goals: Sequence[Goal]) -> Text:
    """What is asked of a row, each figure in the colour of what became of it."""
    parts = []
    for goal in goals:
        shown = {"speedup": f"{goal.wanted:g}x", "memory": f"peak {goal.wanted:.0%}"}
        seen = f" ({goal.seen:.2f})" if goal.seen is not None and goal.what != "speedup" else ""
        parts.append(Text(shown.get(goal.what, f"{goal.wanted:g} plain") + seen, _style(goal)))
    return Text(", ").join(parts)


def _style(goal: Goal) -> str:
    if goal.reached is None:
        return "dim"
    return "green" if goal.reached else "yellow" if goal.in_doubt else "red"


def show_goals(results: Results, console: Console) -> None:
    """How much of what is asked was reached; what was not, and what was not measured, by name."""
    goals = results.goals
    if not goals:
        return
    reached = [goal for goal in goals if goal.reached]
    unseen = [goal for goal in goals if goal.reached is None]
    missed = [goal for goal in goals if goal.reached is False]
    console.print(
        f"asked: {len(goals)} figures; {len(reached)} reached, {len(missed)} missed "
        f"({sum(goal.in_doubt for goal in missed)} of them by less than the noise), "
        f"{len(unseen)} not measured"
    )
    if missed:
        table = Table(title="missed", title_justify="left", show_edge=False)
        for column in ("operator", "case", "asked"):
            table.add_column(column)
        for column in ("seen", "noise"):
            table.add_column(column, justify="right")
        for goal in sorted(missed, key=_shortfall):
            case = f"{goal.label} {goal.dtype} {goal.mode} {goal.threads}t"
            seen = Text(f"{goal.seen:.2f}", _style(goal))
            table.add_row(goal.operator, case, goal.words, seen, f"{goal.noise:.1%}")
        console.print(table)
    for goal in unseen:
        console.print(f"not measured: {goal}", style="dim")


def _shortfall(goal: Goal) -> float:
    seen = goal.seen or 0.0
    return seen / goal.wanted if goal.what == "speedup" else goal.wanted / max(seen, 1e-9)


def case_name(row: Row) -> str:
    threads = "" if row.device == "cuda" else f" {row.threads}t"
    return f"{row.label} {row.dtype} {row.mode}{threads} {row.policy}"


def _cells(row: Row) -> dict[str, Text | str]:
    name = row.provider
    if row.backend and row.provider == "fastseq":
        name += f" ({row.backend})"
    worst = max((pair[0] for pair in row.errors.values()), default=None)
    cells: dict[str, Text | str] = dict.fromkeys(_COLUMNS, "")
    cells["provider"] = name
    cells["error"] = "" if worst is None else f"{worst:.2f}x"
    if row.failure is not None:
        cells["provider"] = Text(f"{name}: {row.failure}", style="bold red")
        return cells
    if row.milliseconds is None or row.p20 is None or row.p80 is None:
        cells["provider"] = Text(f"{name}: {row.skipped}", style="dim")
        return cells
    cells["time"] = duration(row.milliseconds)
    cells["p20-p80"] = (
        f"{row.p20 / row.milliseconds - 1:+.0%} {row.p80 / row.milliseconds - 1:+.0%}"
    )
    if row.speedup is not None and row.provider != BASELINE:
        style = "green" if row.speedup > 1 + (row.noise or 0) else ""
        style = "red" if row.speedup < 1 - (row.noise or 0) else style
        cells["speedup"] = Text(f"{row.speedup:.2f}x", style=style)
    cells["noise"] = "" if row.noise is None else f"{row.noise:.1%}"
    if row.minimal_bytes > 2**16:
        cells["GB/s"] = "" if row.bytes_per_second is None else f"{row.bytes_per_second / 1e9:.1f}"
        cells["% ceiling"] = "" if row.ceiling is None else f"{row.ceiling:.0%}"
    cells["wall"] = "" if row.wall_milliseconds is None else duration(row.wall_milliseconds)
    cells["peak"] = "" if row.peak_bytes is None else size(row.peak_bytes)
    return cells


def show_environment(results: Results, console: Console) -> None:
    env = results.environment
    dirty = " + changes" if env.get("dirty") else ""
    console.print(f"{env['device']}, torch {env['torch']}, fastseq {env['commit']}{dirty}")
    if env.get("load", 0.0) > 0.2 * (env.get("cpus") or 1):
        console.print(
            f"the machine was busy at the start (load {env['load']:.1f} on {env['cpus']} CPUs): "
            "times are off, and with several threads ratios too",
            style="yellow",
        )
    for threads, found in results.ceilings.items():
        matmul = ", ".join(f"{n} {rate / 1e12:.3g}" for n, rate in found["matmul"].items())
        where = "" if env.get("gpu") else f"{threads} threads: "
        launch = f", empty launch {found['launch'] * 1e6:.2f} us" if "launch" in found else ""
        console.print(
            f"ceilings: {where}copy {found['copy'] / 1e9:.1f} GB/s, matmul TFLOP/s {matmul}{launch}"
        )
        if "latency" in found:
            console.print(f"waits: {latency.summary(found['latency'])}")


# --- Markdown ------------------------------------------------------------------------------------


def markdown(
    results: Results,
    provider: str = "fastseq",
    *,
    policy: str | None = None,
    mode: str | None = None,
    families: Sequence[str] = (),
) -> str:
    """The speedups over the baseline as Markdown tables, one line an operator and mode.

    Operators of the same sizes share a table, whose columns these are; each cell has the dtypes in
    their order. The command that made the results stands below.
    """
    rows = [
        row
        for row in results.rows
        if row.provider == provider
        and row.speedup is not None
        and policy in (None, row.policy)
        and mode in (None, row.mode)
        and (not families or row.family in families)
    ]
    if not rows:
        return f"no results of {provider}"
    parts = []
    for place, placed in _by(rows, "device", "threads", "policy"):
        dtypes = [name for name in DTYPES if name in {row.dtype for row in placed}]
        parts.append(f"Times faster than torch, {' / '.join(dtypes)} ({_place(*place)}):")
        tables: dict[tuple[str, ...], list[Row]] = {}
        for _, same in _by(placed, "operator"):
            tables.setdefault(tuple(dict.fromkeys(row.label for row in same)), []).extend(same)
        parts += [_speedups(chosen, labels, dtypes) for labels, chosen in tables.items()]
    env = results.environment
    parts.append(
        f"{env['device']}, torch {env['torch']}, fastseq {env['commit']}"
        f"{' with changes' if env.get('dirty') else ''}, {env['date'][:10]}: `{env['command']}`"
    )
    return "\n\n".join(parts)


def _place(device: str, threads: int, policy: str) -> str:
    if device == "cuda":
        return policy
    return f"{threads} thread{'' if threads == 1 else 's'}, {policy} outputs"


def _speedups(rows: list[Row], labels: tuple[str, ...], dtypes: list[str]) -> str:
    lines = [f"| | {' | '.join(labels)} |", f"|---|{'---:|' * len(labels)}"]
    for (operator, mode), same in _by(rows, "operator", "mode"):
        cells = []
        for label in labels:
            found = {row.dtype: row.speedup for row in same if row.label == label}
            cells.append(" / ".join(f"{found[d]:.2f}" if found.get(d) else "-" for d in dtypes))
        lines.append(f"| `{operator}` {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by(rows: Iterable[Row], *names: str) -> list[tuple[tuple[object, ...], list[Row]]]:
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return list(groups.items())


# --- generated code ------------------------------------------------------------------------------

#: Threads and 32-bit registers of a multiprocessor, alike on sm_80, sm_90 and sm_100.
_THREADS, _REGISTERS = 2048, 65536


def resident_threads(registers: int) -> int:
    """Threads of a multiprocessor that registers leave room for: allocated by 8 a thread."""
    return min(_THREADS, _REGISTERS // (-(-registers // 8) * 8) // 32 * 32)


def rivals_markdown(report: Mapping[str, Any]) -> str:
    """What ``codegen --rivals`` found: a line a kernel, those of a package below ours."""
    lines = [
        "| operator | row | of | kernel | threads | registers | threads/SM | spilled B | shared B "
        "| 16-byte loads | 16-byte stores | products | instructions | loop |",
        "|---|---|---|---|" + "---:|" * 10,
    ]
    for entry in report["kernels"]:
        start = [entry["operator"], entry["length"], entry["package"]]
        if "failure" in entry:
            cells = [*start, entry["failure"], *[""] * 10]
        else:
            cells = [
                *start,
                f"`{entry['kernel']}`",
                entry["threads"],
                entry["registers"],
                resident_threads(entry["registers"]),
                entry["local_bytes"],
                entry["shared_bytes"],
                f"{entry['wide_loads']} of {entry['loads']}",
                f"{entry['wide_stores']} of {entry['stores']}",
                entry["tensor_cores"],
                entry["instructions"],
                entry["loop"]["instructions"],
            ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    made = f"{report['made']}; {versions}: `python -m benchmarks.codegen --rivals`"
    return "\n".join([*lines, "", made])
