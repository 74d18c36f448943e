"""``python -m benchmarks``, and its ``compare``, ``table`` and ``overhead``: docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import torch

from . import base, compare, environment, memory, overhead, report
from .console import Console, progress
from .goals import goals_of
from .ops import FAMILIES, benchmarks_of
from .points import Point, sweep
from .registry import DTYPES, MODES, SUITES
from .results import Results, ResultsError, check_same_origin, load
from .runner import Runner, Settings


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"compare": _compare, "table": _table, "overhead": overhead.main}
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        return _measure(arguments)
    except (ResultsError, base.BaseError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _listed(choices: tuple[str, ...]) -> type:
    """An argparse type: names from ``choices``, separated by commas."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in choices]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown) or 'nothing'}: expected some of {', '.join(choices)}"
            )
        return list(dict.fromkeys(names))

    return parse  # type: ignore[return-value]


def _threads(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive numbers, like 1,2")
    return list(dict.fromkeys(counts))


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number of seconds")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time fastseq against torch and others. A provider that computes something "
        "wrong gets no time. Also: `compare A B`, `table RESULTS`, `overhead`.",
    )
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--ops", help="only these operators, separated by commas")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--suite", choices=SUITES, help="default: the device's own")
    parser.add_argument("--mode", type=_listed(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--dtype", type=_listed(tuple(DTYPES)), help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--threads", type=_threads, help="CPU thread counts, like 1,2")
    policies = (*memory.CPU_POLICIES, *memory.GPU_POLICIES)
    parser.add_argument("--memory", type=_listed(policies), help="reused,fresh or cold,hot")
    parser.add_argument("--providers", help="fastseq, fastseq:BACKEND, torch.compile, liger, ...")
    parser.add_argument("--time-budget", type=_positive, metavar="SECONDS")
    parser.add_argument("--seconds", type=_positive, default=1.0, help="sampling of each group")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write files here")
    formats = ("svg", "png")
    parser.add_argument(
        "--plots", type=_listed((*formats, "none")), default=list(formats), help="svg,png or none"
    )
    parser.add_argument(
        "--base", metavar="REV", help="measure this commit too, in turn, and compare; needs --out"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows DIR has already")
    return parser


def _measure(arguments: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = [family for family in options.families if family not in FAMILIES]
    if unknown:
        parser.error(f"unknown family {', '.join(unknown)}: expected {', '.join(FAMILIES)}")
    if options.resume and options.out is None:
        parser.error("--resume needs --out, the folder to go on in")
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    device = torch.device(name)
    suite = options.suite or ("gpu" if name == "cuda" else "cpu")
    small = suite == "smoke"

    chosen = benchmarks_of(options.families or FAMILIES)
    if options.ops:
        names = options.ops.split(",")
        known = [benchmark.operator.name for benchmark in chosen]
        if not set(names) <= set(known):
            parser.error(f"--ops {options.ops}: expected some of {', '.join(known)}")
        chosen = tuple(b for b in chosen if b.operator.name in names)
    if options.base:
        if options.out is None:
            parser.error("--base needs --out, the folder for both results")
        names = [benchmark.operator.name for benchmark in chosen]
        rest = _without(arguments, "--base", "--ops", "--out")
        rest = [argument for argument in rest if argument not in FAMILIES]
        both = base.measure(options.base, names, rest, options.out)
        return _compare([str(folder) for folder in both])
    allowed = memory.GPU_POLICIES if name == "cuda" else memory.CPU_POLICIES
    # Fresh comes first: see memory.set_allocation.
    policies = [p for p in reversed(allowed) if p in (options.memory or allowed)]
    if small and not options.memory:
        policies = [allowed[0]]
    if not policies:
        parser.error(f"--memory: on {name} expected some of {', '.join(allowed)}")
    settings = Settings(
        device,
        modes=options.mode or ["inference", "fwd+bwd"] if small else options.mode or list(MODES),
        threads=options.threads or ([1] if small else sorted({1, torch.get_num_threads()})),
        suite=suite,
        providers=options.providers.split(",") if options.providers else None,
        budget=options.time_budget,
        group_seconds=min(options.seconds, 0.2) if small else options.seconds,
    )
    phases = sweep(chosen, suite, name, options.dtype, policies, settings.modes)
    if not any(phases):
        parser.error(f"suite {suite} has no sizes on {name}")

    results = Results(environment.describe(device, arguments))
    if options.resume and (options.out / "results.json").exists():
        kept = load(options.out)
        check_same_origin(kept.environment, results.environment)
        results.rows, results.ceilings = kept.rows, kept.ceilings
    results.goals = goals_of((p for phase in phases for p in phase), settings.threads)
    return _run(settings, results, phases, options.out, options.plots)


def _without(arguments: list[str], *options: str) -> list[str]:
    """The arguments but for these options and their values."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in options:
            next(rest, None)
        elif not argument.startswith(tuple(f"{option}=" for option in options)):
            kept.append(argument)
    return kept


def _run(
    settings: Settings,
    results: Results,
    phases: list[list[Point]],
    out: Path | None,
    formats: list[str],
) -> int:
    console = Console(width=None if sys.stdout.isatty() else 140)
    stopped = ""
    with progress(sum(len(phase) for phase in phases)) as tell:
        save = (lambda: results.save(out)) if out else (lambda: None)
        try:
            Runner(settings, results, save, tell).run(phases)
        except KeyboardInterrupt:
            stopped = "interrupted"
        except torch.AcceleratorError as error:
            stopped = f"the device failed: {error}"
    _sort(results, phases)
    report.show_environment(results, console)
    console.print()
    report.show(results, console)
    report.show_goals(results, console)
    if out:
        results.save(out)
        names = ["results.json", "results.csv", *_plotted(results, out, formats)]
        console.print(f"in {out}: {', '.join(names)}")
    failures = [row for row in results.rows if row.failure is not None]
    if failures:
        console.print(f"{len(failures)} rows without a time: see the red ones", style="red")
    if stopped:
        console.print(stopped, style="bold red")
    return 1 if failures or stopped else 0


def _sort(results: Results, phases: list[list[Point]]) -> None:
    """Into the registry's order: measuring goes by another, see ``points.even_order``."""
    order: dict[tuple[str, str], int] = {}
    for benchmark in benchmarks_of():
        for suite in SUITES:
            asked = [one.sizes for one in benchmark.asked]
            for sizes in (*benchmark.sweeps.get(suite, ()), *asked):
                order.setdefault((benchmark.operator.name, benchmark.label(sizes)), len(order))
    dtypes = list(DTYPES)
    results.rows.sort(
        key=lambda row: (
            order.get((row.operator, row.label), len(order)),
            dtypes.index(row.dtype),
            MODES.index(row.mode),
            row.threads,
            row.policy,
        )
    )


def _plotted(results: Results, out: Path, formats: list[str]) -> list[str]:
    """The names of the pictures, or of what is missing for them."""
    if "none" in formats:
        return []
    try:
        from .plots import save_plots
    except ModuleNotFoundError as error:
        return [f"no pictures ({error.name} is not installed)"]
    return [path.name for path in save_plots(results, out, formats)]


def _compare(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description="What moved from A to B beyond the noise of both; 1 if anything got slower.",
    )
    parser.add_argument("old", type=Path, metavar="A")
    parser.add_argument("new", type=Path, metavar="B")
    parser.add_argument(
        "--least", type=float, default=compare.LEAST, help="smallest change that counts, 0.05"
    )
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    worse = compare.show(load(options.old), load(options.new), console, options.least)
    return 1 if worse else 0


def _table_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks table",
        description="Print results as Markdown. Or, with --update FILE ..., make a file's tables: "
        "what stands between <!-- benchmarks: ARGUMENTS --> and <!-- /benchmarks -->, where the "
        "arguments are this command's.",
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("families", nargs="*", metavar="family", help="only these")
    parser.add_argument("--provider", default="fastseq")
    parser.add_argument("--mode", choices=MODES, help="only this mode")
    parser.add_argument("--memory", help="only this allocation or cache policy")
    return parser


def _markdown(arguments: list[str]) -> str:
    options = _table_parser().parse_args(arguments)
    if options.results.name == "rivals.json":  # of `python -m benchmarks.codegen --rivals`
        return report.rivals_markdown(json.loads(options.results.read_text()))
    return report.markdown(
        load(options.results),
        options.provider,
        policy=options.memory,
        mode=options.mode,
        families=options.families,
    )


def updated(text: str) -> str:
    """Markdown with the tables between its marks made anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{_markdown(match[2].split())}\n{match[3]}"

    marks = r"(<!-- benchmarks: (.*?) -->)\n.*?(<!-- /benchmarks -->)"
    return re.sub(marks, table, text, flags=re.DOTALL)


def _table(arguments: list[str]) -> int:
    if arguments[:1] == ["--update"]:
        for path in map(Path, arguments[1:]):
            path.write_text(updated(path.read_text()))
        return 0
    print(_markdown(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
