"""Results as pictures, SVG and PNG: time and part of the ceiling over size; speedups as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .providers import BASELINE
from .results import Results, Row

#: Okabe and Ito's colours, told apart by everybody; the baseline is grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


def save_plots(
    results: Results, folder: Path, formats: Sequence[str] = ("svg", "png")
) -> list[Path]:
    """Write ``times.*`` (a row of panels an operator) and ``speedups.*``.

    One thread count and one policy: the largest, and the first measured. The rest is in the table.
    """
    rows = [row for row in results.rows if row.milliseconds is not None]
    if not rows:
        return []
    threads = max(row.threads for row in rows)
    rows = [row for row in rows if row.threads == threads and row.policy == rows[-1].policy]
    title = f"{results.environment['device']}, torch {results.environment['torch']}"
    if rows[0].device == "cpu":
        title += f", {threads} thread{'s' if threads > 1 else ''}"
    title += f", {rows[0].policy} {'outputs' if rows[0].device == 'cpu' else 'L2'}"
    colours = _colours(rows)
    written = []
    for name, figure in (("times", _times(rows, colours)), ("speedups", _speedups(rows, colours))):
        figure.suptitle(title, fontsize=9)
        for suffix in formats:
            written.append(folder / f"{name}.{suffix}")
            figure.savefig(
                written[-1], dpi=110, metadata={"Date": None} if suffix == "svg" else None
            )
        plt.close(figure)
    return written


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    names = [n for n in dict.fromkeys(row.provider for row in rows) if n != BASELINE]
    coloured = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    return {**coloured, BASELINE: "#777777"}


def _times(rows: Sequence[Row], colours: dict[str, str]) -> Figure:
    """For each operator and mode, time above and part of the ceiling below; a style for a dtype."""
    operators = list(dict.fromkeys(row.operator for row in rows))
    modes = list(dict.fromkeys(row.mode for row in rows))
    figure, grid = plt.subplots(
        2 * len(operators),
        len(modes),
        figsize=(3 * len(modes) + 1, 4.2 * len(operators) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    dtypes = dict.fromkeys(row.dtype for row in rows)
    styles = dict(zip(dtypes, ("-", "--", ":", "-."), strict=False))
    for number, operator in enumerate(operators):
        mine = [row for row in rows if row.operator == operator]
        labels = list(dict.fromkeys(row.label for row in mine))
        for column, mode in enumerate(modes):
            above, below = grid[2 * number][column], grid[2 * number + 1][column]
            some = [row for row in mine if row.mode == mode]
            for provider, dtype in dict.fromkeys((row.provider, row.dtype) for row in some):
                line = {r.label: r for r in some if (r.provider, r.dtype) == (provider, dtype)}
                places = [i for i, label in enumerate(labels) if label in line]
                times = [line[labels[i]].milliseconds for i in places]
                parts = [100 * (line[labels[i]].ceiling or 0) for i in places]
                look = {"color": colours[provider], "linestyle": styles[dtype], "marker": "."}
                above.plot(places, times, label=f"{provider} {dtype}", lw=1.2, **look)
                below.plot(places, parts, lw=1.2, **look)
            above.set_yscale("log")
            above.set_title(f"{operator} {mode}", fontsize=8)
            _name_sizes(above, [])
            _name_sizes(below, labels)
            below.set_ylim(bottom=0)
        grid[2 * number][0].set_ylabel("milliseconds", fontsize=7)
        grid[2 * number + 1][0].set_ylabel("% of measured ceiling", fontsize=7)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=7)
    return figure


def _name_sizes(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right")
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def _speedups(rows: Sequence[Row], colours: dict[str, str]) -> Figure:
    """Bars of the speedup over the baseline, whiskers from p20 to p80; a panel an operator."""
    rows = [row for row in rows if row.provider != BASELINE and row.speedup is not None]
    operators = list(dict.fromkeys(row.operator for row in rows)) or [""]
    cases = {
        operator: list(
            dict.fromkeys((r.mode, r.label, r.dtype) for r in rows if r.operator == operator)
        )
        for operator in operators
    }
    longest = max((len(c) for c in cases.values()), default=1)
    figure, grid = plt.subplots(
        1,
        len(operators),
        figsize=(3.2 * len(operators) + 0.5, 0.19 * max(longest, 6) + 1.6),
        squeeze=False,
        layout="constrained",
    )
    for axes, operator in zip(grid[0], operators, strict=True):
        mine = [row for row in rows if row.operator == operator]
        providers = list(dict.fromkeys(row.provider for row in mine))
        height = 0.8 / max(1, len(providers))
        for number, provider in enumerate(providers):
            bars = {(r.mode, r.label, r.dtype): r for r in mine if r.provider == provider}
            places, values, whiskers = [], [], []
            for place, case in enumerate(cases[operator]):
                row = bars.get(case)
                if row is None or row.speedup is None:
                    continue
                places.append(place + (number - (len(providers) - 1) / 2) * height)
                values.append(row.speedup)
                low, high = row.speedup_p20 or row.speedup, row.speedup_p80 or row.speedup
                whiskers.append((max(0.0, row.speedup - low), max(0.0, high - row.speedup)))
            axes.barh(
                places,
                values,
                height,
                color=colours[provider],
                label=provider,
                xerr=list(zip(*whiskers, strict=True)) if whiskers else None,
                error_kw={"lw": 0.7},
            )
        axes.axvline(1.0, color=colours[BASELINE], lw=1)
        axes.set_yticks(range(len(cases[operator])), [" ".join(c) for c in cases[operator]])
        axes.invert_yaxis()
        axes.tick_params(labelsize=6)
        axes.set_title(operator, fontsize=8)
        axes.set_xlabel(f"times faster than {BASELINE}", fontsize=7)
        axes.legend(fontsize=6)
    return figure
