"""``pytest benchmarks``: the registry under pytest-benchmark, on the CPU and small.

For ``--benchmark-compare`` and ``--benchmark-autosave``; ``python -m benchmarks`` measures better
(variants take turns) and more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastseq.testing import BOUND, make_problem, measure_torch, run

from .ops import benchmarks_of
from .providers import make_variant, providers_of
from .registry import DTYPES, Benchmark, Sizes

CASES = [
    pytest.param(benchmark, sizes, dtype, id=f"{benchmark.operator.name}-{label}-{dtype}")
    for benchmark in benchmarks_of()
    for sizes in benchmark.sizes_of("smoke", "cpu")
    for label in [benchmark.label(sizes)]
    for dtype in ("fp32", "bf16")
]


@pytest.mark.parametrize("provider_name", ["torch", "fastseq"])
@pytest.mark.parametrize("mode", ["inference", "fwd+bwd"])
@pytest.mark.parametrize(("case", "sizes", "dtype"), CASES)
def test_speed(
    benchmark: Any, case: Benchmark, sizes: Sizes, dtype: str, mode: str, provider_name: str
) -> None:
    if mode not in case.modes:
        pytest.skip("no gradients")
    problem = make_problem(case.operator, sizes, DTYPES[dtype], "cpu")
    providers = providers_of(case, sizes, [provider_name], "smoke", "cpu")
    provider = next(p for p in providers if p.name == provider_name)
    ratios = measure_torch(case.operator, problem).ratios(run(provider.function, problem))
    assert all(max(pair) <= BOUND for pair in ratios.values()), ratios

    variant = make_variant(provider, provider.function, [problem], mode)
    benchmark.group = f"{case.operator.name} {case.label(sizes)} {dtype} {mode}"
    with torch.set_grad_enabled(variant.gradients):
        benchmark.pedantic(variant.calls[0], rounds=30, iterations=5, warmup_rounds=2)
