"""What the demo shows: a progress bar, tables, and a picture."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from .demo import Result

_console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)

Advance = Callable[[float, str], None]


@contextmanager
def progress() -> Iterator[Callable[[str, float], Advance]]:
    """Progress bars: ``progress(name, total)`` starts one and returns what moves it on."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[note]:<24}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_console) as bars:

        def start(name: str, total: float) -> Advance:
            task = bars.add_task(name, total=total, note="")
            return lambda done, note: bars.update(task, completed=min(done, total), note=note)

        yield start


def print_header(environment: dict[str, Any], characters: int, alphabet: int) -> None:
    """What runs where, on what text."""
    device = f"{environment['device_name']}, {environment['precision']}"
    _console.print(
        f"[bold]fastseq {environment['fastseq']}[/bold], torch {environment['torch']}\n{device}\n"
        f"Text: Python's language reference, {characters:,} characters of {alphabet} kinds.\n"
        "Each model is trained from the same weights on the same batches: with torch's modules, "
        "with fastseq's, and as a yardstick with torch's and each weight moved by one rounding.\n"
    )


def print_results(results: list[Result]) -> None:
    """The tables, what explains them, and a sample of what the models write."""
    _console.print()
    _console.print(_modules_table(results))
    _console.print()
    _console.print(_measured_table(results))
    _console.print(
        "[dim]difference: the largest between the two losses at any step; allowed are 10 times "
        "the yardstick's.\nstep: forward, backward and AdamW, the variants taking turns; the "
        "median time, and the median\nratio of neighbours, which a busy machine disturbs less.\n"
        "in swapped: the swapped modules run by themselves, forward and backward, all of a step.\n"
        "memory: the most that torch's allocator hands out within a step beyond what it holds "
        "before.[/dim]\n"
    )
    for result in results:
        _console.print(Padding(_why(result), (0, 0, 1, 0)))
    for result in results:
        _console.print(f"[bold]{result.name}[/bold] after {result.steps} steps writes:")
        _console.print(Padding(escape(result.sample), (0, 0, 1, 4)))
    for result in results:
        if result.exceeded:
            step = result.exceeded
            _console.print(
                f"[bold red]FAILED[/] {result.name}: at step {step} the losses differ by "
                f"{result.differences('fastseq')[step - 1]:.2e}, allowed are "
                f"{result.bound[step - 1]:.2e}: run `fastseq verify`"
            )


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )


def _modules_table(results: list[Result]) -> Table:
    table = _table("What runs on what")
    for column in ("model", "modules", "run on", "why"):
        table.add_column(column, overflow="fold")
    for result in results:
        name = result.name
        backends = ", ".join(dict.fromkeys(ran[0] for ran in result.kernels.values()))
        for kind, count in result.swapped.items():
            table.add_row(name, f"{count} {kind}", f"[green]fastseq ({backends})[/]", "swapped")
            name = ""
        for fqn, kind, reason in result.skipped:
            table.add_row(name, f"{fqn} ({kind})", "torch", escape(reason))
            name = ""
        kept = ", ".join(f"{count} {kind}" for kind, count in result.kept.items())
        table.add_row(name, kept, "torch", "fastseq has no such class", end_section=True)
    return table


def _measured_table(results: list[Result]) -> Table:
    table = _table("What it comes to")
    table.add_column("model")
    table.add_column("with")
    for column in ("last loss", "difference", "step", "in swapped", "memory"):
        table.add_column(column, justify="right")
    for result in results:
        step = {name: result.median_ms(name) for name in ("torch", "fastseq")}
        rows = {
            name: (
                f"{result.losses[name][-1]:.4f}",
                f"{max(result.differences(name)):.1e}",
                f"{step[name]:.1f} ms",
                f"{result.swapped_ms[name]:.2f} ms",
                f"{result.memory_mib[name]:.1f} MiB",
            )
            for name in step
        }
        verdict = "[bold red]exceeds" if result.exceeded else "[green]allowed"
        table.add_row(result.name, "torch", rows["torch"][0], "", *rows["torch"][2:])
        table.add_row(f"[dim]{result.steps} steps", "fastseq", *rows["fastseq"])
        table.add_row(
            f"[dim]{_threads(result)}",
            "",
            "",
            f"{verdict} {max(result.bound):.1e}",
            f"[bold]{result.ratio:.2f}x",
            *(f"[bold]{_ratio(pair):.2f}x" for pair in (result.swapped_ms, result.memory_mib)),
            end_section=True,
        )
    return table


def _threads(result: Result) -> str:
    return "1 thread" if result.threads == 1 else f"{result.threads} threads"


def _ratio(pair: dict[str, float]) -> float:
    """How many times fastseq's figure goes into torch's."""
    return pair["torch"] / pair["fastseq"] if pair["fastseq"] else 1.0


def _why(result: Result) -> str:
    """What the ratio of a model comes from, in words."""
    step, torch_ms, our_ms = result.median_ms("torch"), *result.swapped_ms.values()
    expected = step / (step - torch_ms + our_ms)
    lines = [
        f"[bold]{result.name} {result.ratio:.2f}x[/bold]: {', '.join(result.swapped)} takes "
        f"{torch_ms:.2f} of the {step:.1f} ms of torch's step ({torch_ms / step:.0%}), fastseq's "
        f"{our_ms:.2f} ms: that alone makes {expected:.2f}x of the step. Everything else runs on "
        "torch in both, so the rest of the ratio is noise and caches, no kernel."
    ]
    for call, (backend, *reasons) in result.kernels.items():
        if backend in ("torch", "reference"):
            why = "; ".join(reasons) or "it was forced"
            lines.append(f"    {call} ran on the backend {backend}: {escape(why)}")
    return "\n".join(lines)


# --- the picture ---------------------------------------------------------------------------------

_COLOURS = {"torch": "#e8793a", "fastseq": "#1b5faa", "yardstick": "#9aa3ad"}
_INK, _FAINT = "#22272e", "#d8dde3"


def save_picture(results: list[Result], environment: dict[str, Any], path: Path) -> Path:
    """Loss curves over each other, their difference, and the time of a step; one row a model.

    Returns:
        The path of the PNG.
    """
    mpl.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _FAINT,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _FAINT,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
    }
    with mpl.rc_context(style):
        figure, rows = pyplot.subplots(
            len(results),
            3,
            figsize=(14, 4.1 * len(results) + 0.7),
            width_ratios=(1.35, 1.35, 0.8),
            squeeze=False,
            layout="constrained",
        )
        for result, (losses, differences, times) in zip(results, rows, strict=True):
            _draw_losses(losses, result)
            _draw_differences(differences, result)
            _draw_times(times, result)
        where = f"{environment['device_name']}, {environment['precision']}"
        figure.suptitle(
            f"fastseq {environment['fastseq']} against torch {environment['torch']} on {where}",
            fontsize=13,
        )
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
    return path


def _draw_losses(axes: Any, result: Result) -> None:
    steps = np.arange(1, result.steps + 1)
    axes.plot(steps, result.losses["torch"], color=_COLOURS["torch"], linewidth=4, alpha=0.55)
    axes.plot(steps, result.losses["fastseq"], color=_COLOURS["fastseq"], linewidth=1.1)
    axes.legend(["torch", "fastseq"], loc="upper right")
    axes.set(title=f"{result.name}: loss", xlabel="step", ylabel="cross-entropy (nats)")


def _draw_differences(axes: Any, result: Result) -> None:
    steps = np.arange(1, result.steps + 1)
    smallest = np.finfo(np.float32).eps  # what one rounding of a loss of 1 to 4 can hide

    def farthest(values: list[float]) -> Any:
        return np.maximum(np.maximum.accumulate(values), smallest)

    axes.plot(steps, result.bound, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.plot(steps, farthest(result.differences("yardstick")), color=_COLOURS["yardstick"], lw=2)
    axes.plot(steps, farthest(result.differences("fastseq")), color=_COLOURS["fastseq"], lw=2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 2, high * 20)  # room for the legend
    axes.legend(
        ["allowed", "torch, weights moved by one rounding", "fastseq"], loc="upper left", fontsize=9
    )
    axes.set(
        title="Difference from torch's loss, largest so far",
        xlabel="step",
        ylabel="nats, log scale",
    )


def _draw_times(axes: Any, result: Result) -> None:
    names = ("torch", "fastseq")
    medians = [result.median_ms(name) for name in names]
    spread = [np.percentile(result.step_ms[name], (20, 80)) for name in names]
    errors = np.array(
        [
            [max(m - low, 0), max(high - m, 0)]
            for m, (low, high) in zip(medians, spread, strict=True)
        ]
    ).T
    axes.bar(names, medians, width=0.58, color=[_COLOURS[name] for name in names], alpha=0.9)
    axes.errorbar(names, medians, yerr=errors, fmt="none", ecolor=_INK, elinewidth=1, capsize=4)
    for place, median in enumerate(medians):
        axes.text(
            place,
            0.05 * max(medians),
            f"{median:.1f} ms",
            ha="center",
            color="white",
            size=12,
            weight="bold",
        )
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, 1.3 * max(medians))  # a busy machine's slow steps may reach beyond
    axes.set(
        title=f"Time of a step: {result.ratio:.2f}x",
        xlabel=_threads(result),
        ylabel="ms (median, 20-80 %)",
    )
