"""Compiles every family's kernels and prints their usage, or records it.

``python tests/codegen [FAMILY ...] [--full] [--only TEXT]`` prints one line of JSON for each kernel
and architecture (without ``--full`` a selection of both); ``--record`` rewrites
``recorded/<family>.json`` from a full run, for the Triton that runs it (with ``--only``, those
cases of it).
A family is a module beside this one with two functions: ``cases(full)`` yields (label, call), and
``expects(kernel, label)`` names the figures of a ``Usage`` that must not be zero.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from zlib import crc32

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import triton  # noqa: E402

from benchmarks._ptx import ARCHITECTURES, measure  # noqa: E402

FAMILIES = sorted(path.stem for path in HERE.glob("[!_]*.py"))

#: What recorded/<family>.json holds of every kernel, by Triton's version.
FIGURES = ("registers", "local_accesses", "wide_loads", "wide_stores")
VERSION = ".".join(triton.__version__.split(".")[:2])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/codegen", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all, if none is given")
    parser.add_argument("--full", action="store_true", help="every configuration, not a selection")
    parser.add_argument("--only", default="", help="cases whose label contains this")
    parser.add_argument("--record", action="store_true", help="rewrite the recorded figures")
    options = parser.parse_args()
    for family in options.families or FAMILIES:
        module = import_module(family)
        figures: dict[str, tuple[int, ...]] = {}
        for label, call in module.cases(options.full or options.record):
            if options.only not in label:
                continue
            for architecture in architectures(label, options.full or options.record):
                for usage in measure(call, architecture):
                    key = f"sm_{architecture} {usage.kernel}: {label}"
                    found = tuple(getattr(usage, name) for name in FIGURES)
                    figures[key] = worst(figures.get(key, found), found)
                    line = {
                        "key": key,
                        "architecture": architecture,
                        "expected": sorted(module.expects(usage.kernel, label)),
                        **asdict(usage),
                    }
                    print(json.dumps(line), flush=True)
        if options.record:
            record(family, figures, keep=bool(options.only))


def architectures(label: str, full: bool) -> tuple[int, ...]:
    """All, or sm_90 and one of the others, by the label: cases have their like beside them."""
    others = [number for number in ARCHITECTURES if number != 90]
    return tuple(ARCHITECTURES) if full else (90, others[crc32(label.encode()) % len(others)])


def worst(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """Of a call that launches a kernel twice, in two versions."""
    return (*map(max, one[:2], other[:2]), *map(min, one[2:], other[2:]))


def record(family: str, figures: dict[str, tuple[int, ...]], *, keep: bool) -> None:
    """Write the figures of this Triton into the family's file, beside (``keep``) or for its own."""
    path = HERE / "recorded" / f"{family}.json"
    recorded = json.loads(path.read_text()) if path.exists() else {}
    recorded[VERSION] = {**(recorded.get(VERSION, {}) if keep else {}), **figures}
    versions = [
        f"  {json.dumps(version)}: {{\n"
        + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items())
        + "\n  }"
        for version, values in sorted(recorded.items())
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(versions) + "\n}\n")


if __name__ == "__main__":
    main()
