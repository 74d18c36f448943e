"""What is measured, one module a family. A new family is one module here and one name below."""

from __future__ import annotations

from importlib import import_module

from ..registry import Benchmark

FAMILIES = ("cross_entropy", "layer_norm", "recurrent", "softmax")


def benchmarks_of(families: tuple[str, ...] | list[str] = FAMILIES) -> tuple[Benchmark, ...]:
    """Every benchmark of these families, in order."""
    return tuple(
        benchmark
        for family in families
        for benchmark in import_module(f"{__name__}.{family}").BENCHMARKS
    )
