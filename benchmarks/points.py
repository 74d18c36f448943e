"""The sweep: its points, the order in which dropping the last ones leaves an even sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .registry import MODES, Asked, Benchmark, Sizes

DEFAULT_DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Point:
    """One operator, one size, one dtype: what shares inputs, oracle and the gate's verdict.

    On a CPU also one allocation policy, as those cannot alternate (see ``memory.set_allocation``);
    on a GPU both of its policies.

    Attributes:
        asked: what is to be reached here. Such a point has the modes that are asked alone and
            comes before the rest, among which it comes again with all modes.
    """

    benchmark: Benchmark
    sizes: Sizes
    dtype: str
    policies: tuple[str, ...]
    modes: tuple[str, ...]
    asked: tuple[Asked, ...] = ()

    @property
    def name(self) -> str:
        return self.benchmark.operator.name

    @property
    def label(self) -> str:
        return self.benchmark.label(self.sizes)

    def __str__(self) -> str:
        asked = f" (asked: {', '.join(self.modes)})" if self.asked else ""
        return f"{self.name} {self.label} {self.dtype} {'/'.join(self.policies)}{asked}"


def sweep(
    benchmarks: Iterable[Benchmark],
    suite: str,
    device: str,
    dtypes: Sequence[str] | None,
    policies: Sequence[str],
    modes: Sequence[str],
) -> list[list[Point]]:
    """The points in phases that must follow each other, each phase in an even order.

    Before the CPU's own sweep with reused memory comes what is asked of it, in the dtypes it is
    asked in unless ``dtypes`` says which.
    """
    benchmarks = list(benchmarks)

    def modes_of(benchmark: Benchmark) -> tuple[str, ...]:
        return tuple(mode for mode in modes if mode in benchmark.modes)

    def swept(policies: tuple[str, ...]) -> list[Point]:
        return even_order(
            Point(benchmark, sizes, dtype, policies, modes_of(benchmark))
            for benchmark in benchmarks
            for sizes in benchmark.sizes_of(suite, device)
            for dtype in dtypes or DEFAULT_DTYPES
            if modes_of(benchmark)
        )

    if device == "cuda":
        return [swept(tuple(policies))]
    phases = []
    for policy in policies:
        if policy == "reused" and suite in ("cpu", "all"):
            points = even_order(asked_points(benchmarks, dtypes, modes))
            # A machine that is busy gets through the many quick ones first.
            phases.append(sorted(points, key=lambda point: point.benchmark.slow))
        phases.append(swept((policy,)))
    return phases


def asked_points(
    benchmarks: Iterable[Benchmark], dtypes: Sequence[str] | None, modes: Sequence[str]
) -> list[Point]:
    """A point for every size and dtype something is asked at, with the modes it is asked in."""
    points = []
    for benchmark in benchmarks:
        wanted: dict[tuple[str, str], list[Asked]] = {}
        for one in benchmark.asked:
            if one.mode in modes and (dtypes is None or one.dtype in dtypes):
                wanted.setdefault((benchmark.label(one.sizes), one.dtype), []).append(one)
        for (_, dtype), here in wanted.items():
            modes_here = tuple(mode for mode in MODES if mode in {one.mode for one in here})
            points.append(
                Point(benchmark, here[0].sizes, dtype, ("reused",), modes_here, tuple(here))
            )
    return points


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
