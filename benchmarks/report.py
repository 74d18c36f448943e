"""Results as tables: on the terminal, and as Markdown for the README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

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
    columns = [c for c in _COLUMNS if on_gpu or c != "wall"]
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
                case = "" if number else case_name(row)
                last = number == len(members) - 1
                table.add_row(case, *[cells[c] for c in columns], end_section=last)
        console.print(table)
        console.print()
    if results.dropped:
        console.print(f"no time for {len(results.dropped)} points: {', '.join(results.dropped)}")


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
