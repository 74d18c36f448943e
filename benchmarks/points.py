"""The sweep: its points, the order in which dropping the last ones leaves an even sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .registry import Benchmark, Sizes


@dataclass(frozen=True)
class Point:
    """One operator, one size, one dtype: what shares inputs, oracle and the gate's verdict.

    On a CPU also one allocation policy, as those cannot alternate (see ``memory.set_allocation``);
    on a GPU both of its policies.
    """

    benchmark: Benchmark
    sizes: Sizes
    dtype: str
    policies: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.benchmark.operator.name

    @property
    def label(self) -> str:
        return self.benchmark.label(self.sizes)

    def __str__(self) -> str:
        return f"{self.name} {self.label} {self.dtype} {'/'.join(self.policies)}"


def sweep(
    benchmarks: Iterable[Benchmark],
    suite: str,
    device: str,
    dtypes: Sequence[str],
    policies: Sequence[str],
) -> list[list[Point]]:
    """The points in phases that must follow each other, each phase in an even order."""
    phases = [tuple(policies)] if device == "cuda" else [(policy,) for policy in policies]
    benchmarks = list(benchmarks)
    return [
        even_order(
            Point(benchmark, sizes, dtype, phase)
            for benchmark in benchmarks
            for sizes in benchmark.sizes_of(suite, device)
            for dtype in dtypes
        )
        for phase in phases
    ]


def even_order(points: Iterable[Point]) -> list[Point]:
    """The points so that any first few are spread over operators, sizes and dtypes.

    Each next one is that whose operator, size and dtype, and pairs of these, came least often.
    """
    left = list(points)
    seen: Counter[tuple[str, ...]] = Counter()

    def traits(point: Point) -> list[tuple[str, ...]]:
        single = [("n", point.name), ("l", point.label), ("d", point.dtype)]
        pairs = [single[i] + single[j] for i in range(3) for j in range(i)]
        return [*single, *pairs]

    ordered = []
    while left:
        best = min(left, key=lambda point: sum(seen[trait] for trait in traits(point)))
        left.remove(best)
        seen.update(traits(best))
        ordered.append(best)
    return ordered
