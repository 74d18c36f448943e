"""``python -m benchmarks.codegen``: what every kernel compiles to, without a GPU.

Triton's: each operator of the registry is called, forward and backward, with the row lengths of the
GPU suite while a stand-in driver names the architecture: the kernels a GPU would get are compiled,
at the launch configuration it would get (see ``benchmarks/_ptx.py``). CUDA's: every instance in
``csrc/cuda``, from a build's objects or compiled by nvcc (``benchmarks/_nvcc.py``). Their machine
code is read, and written as Markdown and JSON, with what bounds each kernel by the arithmetic of
``roofline.py``.
``--rivals`` puts kernels of other packages beside them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import triton

import fastseq
from fastseq.testing import make_problem, run

from . import _nvcc, _sass, roofline
from .console import Console, track
from .ops import FAMILIES, benchmarks_of
from .registry import DTYPES, Benchmark, Sizes
from .report import rivals_markdown

#: Tiles and configurations depend on row lengths and dtypes; more rows would only take memory.
_ROWS = 300


def main(arguments: list[str] | None = None) -> int:
    """Compile, read, report; 1 when a kernel spills or cannot be compiled."""
    options = _parser().parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("codegen: TRITON_INTERPRET=1 is set; unset it", file=sys.stderr)
        return 2
    if options.rivals:
        return _beside_rivals(options)
    families = options.families or FAMILIES
    work: list[Callable[[], list[dict[str, Any]]]] = []
    if "triton" in options.kernels:
        work += [
            partial(_entries, architecture, benchmark, sizes, dtype)
            for benchmark in benchmarks_of(families)
            for sizes in _lengths(benchmark)
            for dtype in options.dtype.split(",")
            for architecture in options.arch
        ]
    if "cuda" in options.kernels:
        work += [
            partial(_cuda_entries, architecture, name)
            for family in families
            for name in _nvcc.FAMILIES.get(family, ())
            for architecture in options.arch
        ]
    entries: list[dict[str, Any]] = []
    shown = {"console": Console(stderr=True), "disable": not sys.stderr.isatty()}
    for compiled in track(work, "compiling", **shown):
        entries += compiled()
    failed = [e for e in entries if e.get("failure") or e.get("local_bytes")]
    text = markdown(entries)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "codegen.md").write_text(text + "\n")
        versions = {"triton": triton.__version__, "nvcc": _nvcc.release()}
        report = {**versions, "kernels": entries}
        (options.out / "codegen.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{len(entries)} kernels, {len(failed)} that spill or do not compile")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="family")
    parser.add_argument("--dtype", default="fp32,bf16")
    parser.add_argument(
        "--arch",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[80, 90, 100],
        help="80,90,100",
    )
    parser.add_argument(
        "--kernels",
        type=lambda text: text.split(","),
        default=["triton", "cuda"],
        help="triton,cuda: of both, or of one; CUDA's need nvcc or a build that has them",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write codegen.md and .json here")
    parser.add_argument(
        "--rivals",
        action="store_true",
        help="beside ours the kernels of packages that are installed (liger-kernel, fla-core), "
        "for sm_90 in bf16; written to DIR/rivals.json, which the documentation quotes",
    )
    return parser


def _lengths(benchmark: Benchmark) -> list[Sizes]:
    """The GPU suite's sizes with few rows, each row length once."""
    few: dict[str, Sizes] = {}
    for sizes in benchmark.sizes_of("gpu", "cuda"):
        fewer = {**sizes, "leading": (_ROWS,)} if "leading" in sizes else sizes
        few.setdefault(repr(fewer), fewer)
    return list(few.values())


def _entries(
    architecture: int, benchmark: Benchmark, sizes: Sizes, dtype: str
) -> list[dict[str, Any]]:
    from ._ptx import measure  # imports Triton's compiler: --help need not

    operator = benchmark.operator
    problem = make_problem(operator, sizes, DTYPES[dtype], "cpu")
    where = {
        "operator": operator.name,
        "length": benchmark.label(sizes).removeprefix(f"{_ROWS}x"),
        "dtype": dtype,
        "architecture": architecture,
    }
    try:
        with _triton_on_cpu_tensors():
            kernels = measure(lambda: run(operator.ours, problem) and None, architecture)
    except Exception as error:  # one kernel that does not compile must not hide the others
        return [{**where, "failure": f"{type(error).__name__}: {error}".splitlines()[0]}]
    return [_entry(where, usage) for usage in kernels]


def _cuda_entries(architecture: int, name: str) -> list[dict[str, Any]]:
    """Of every kernel in a CUDA file, in the largest blocks it may have.

    What shared memory a launch adds is not in it: see ``_nvcc.DYNAMIC``, which take a
    multiprocessor each.
    """
    where = {"operator": name, "length": "", "dtype": "", "architecture": architecture}
    try:
        codes = _nvcc.report(_nvcc.source(name), _nvcc.ARCHITECTURES[architecture])
    except RuntimeError as error:  # no nvcc, say: Triton's kernels are worth having all the same
        return [{**where, "failure": f"{type(error).__name__}: {error}".splitlines()[0]}]
    usages = (code.usage(title, code.threads, code.shared_bytes) for title, code in codes.items())
    return [_entry(where, usage) for usage in usages]


def _entry(where: dict[str, Any], usage: _sass.Usage) -> dict[str, Any]:
    architecture = where["architecture"]
    cycles = roofline.estimate(usage, architecture)
    return {
        **where,
        **asdict(usage),
        "occupancy": roofline.occupancy(usage, architecture),
        "cycles": asdict(cycles),
        "bound": cycles.bound,
    }


def _beside_rivals(options: argparse.Namespace) -> int:
    """Ours and theirs for the same sizes, operator by operator."""
    from ._ptx import measure
    from .codegen_rivals import ARCHITECTURE, DTYPE, rivals, versions

    benchmarks = {b.operator.name: b for b in benchmarks_of(options.families or FAMILIES)}
    chosen = [rival for rival in rivals() if rival.operator in benchmarks]
    if not chosen:
        print("codegen: no package to compare with is installed", file=sys.stderr)
        return 2
    entries: list[dict[str, Any]] = []
    for rival in track(chosen, "compiling", console=Console(stderr=True)):
        benchmark = benchmarks[rival.operator]
        ours = _entries(ARCHITECTURE, benchmark, rival.sizes, DTYPE)
        entries += [{"package": "fastseq", **entry} for entry in ours]
        where = {key: ours[0][key] for key in ("operator", "length", "dtype", "architecture")}
        try:
            found = [asdict(usage) for usage in measure(rival.call, ARCHITECTURE)]
        except Exception as error:  # another release of the package: say so, and go on
            found = [{"failure": f"{type(error).__name__}: {error}".splitlines()[0]}]
        entries += [{"package": rival.package, **where, **entry} for entry in found]
    entries.sort(key=lambda entry: list(benchmarks).index(entry["operator"]))
    report = {
        "made": f"sm_{ARCHITECTURE}, {DTYPE}, Triton {triton.__version__}",
        "versions": versions(),
        "kernels": entries,
    }
    print(rivals_markdown(report))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "rivals.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


@contextmanager
def _triton_on_cpu_tensors() -> Iterator[None]:
    """Let the ops hand CPU tensors to Triton launchers, as they do under the interpreter."""
    backends = importlib.import_module("fastseq.backends")
    before = backends._INTERPRETED
    backends._INTERPRETED = True
    try:
        with fastseq.use_backend("triton"):
            yield
    finally:
        backends._INTERPRETED = before


def _is_dynamic(kernel: str) -> bool:
    return kernel.startswith(_nvcc.DYNAMIC)


def markdown(entries: list[dict[str, Any]]) -> str:
    """A line a kernel: registers, occupancy, spills, memory accesses; of its hottest loop the
    instructions, the cycles of ``roofline.estimate``, and which of them bound it.
    """
    lines = [
        "| operator | row | dtype | sm | kernel | threads | registers | occupancy | spilled B "
        "| shared B | instructions | 16-byte loads | 16-byte stores | products | loop | issue "
        "| special | tensor | memory | bound |",
        "|---|---:|---|---:|---|" + "---:|" * 14 + "---|",
    ]
    for entry in entries:
        start = [entry[name] for name in ("operator", "length", "dtype", "architecture")]
        if "failure" in entry:
            cells = [*start, entry["failure"], *[""] * 15]
        else:
            cells = [
                *start,
                entry["kernel"],
                entry["threads"],
                entry["registers"],
                f"{entry['occupancy']:.0%}",
                entry["local_bytes"],
                f"{entry['shared_bytes']}{' + plan' * _is_dynamic(entry['kernel'])}",
                entry["instructions"],
                f"{entry['wide_loads']} of {entry['loads']}",
                f"{entry['wide_stores']} of {entry['stores']}",
                entry["tensor_cores"],
                entry["loop"]["instructions"],
                *(round(cycles) for cycles in entry["cycles"].values()),
                entry["bound"],
            ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
