"""Compiles every family's kernels and prints their usage, or records it.

``python tests/codegen [--full] [--only TEXT]`` prints one line of JSON for each kernel and
architecture; ``--record`` rewrites ``recorded.json`` from a full run, for the Triton that runs it
(with ``--only``, those cases of it).
A family is a module beside this one with a function ``cases(full)``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import triton  # noqa: E402

from benchmarks._ptx import ARCHITECTURES, measure  # noqa: E402

FAMILIES = ("cross_entropy", "layer_norm")
RECORDED = HERE / "recorded.json"

#: What recorded.json holds of every kernel, by Triton's version.
FIGURES = ("registers", "local_accesses", "wide_loads", "wide_stores")
VERSION = ".".join(triton.__version__.split(".")[:2])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/codegen", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every configuration, not a selection")
    parser.add_argument("--only", default="", help="cases whose label contains this")
    parser.add_argument("--record", action="store_true", help="rewrite recorded.json")
    options = parser.parse_args()
    figures: dict[str, tuple[int, ...]] = {}
    for family in FAMILIES:
        for label, call in import_module(family).cases(options.full or options.record):
            if options.only not in label:
                continue
            for architecture in ARCHITECTURES:
                for usage in measure(call, architecture):
                    key = f"sm_{architecture} {usage.kernel}: {label}"
                    figures[key] = tuple(getattr(usage, name) for name in FIGURES)
                    line = {"key": key, "architecture": architecture, **asdict(usage)}
                    print(json.dumps(line), flush=True)
    if options.record:
        recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
        recorded[VERSION] = {**(recorded.get(VERSION, {}) if options.only else {}), **figures}
        lines = [
            f"  {json.dumps(version)}: {{\n"
            + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items())
            + "\n  }"
            for version, values in sorted(recorded.items())
        ]
        RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
