"""Every operator on a GPU: real sizes, captured graphs, streams, tensors past 2^31 elements."""

from __future__ import annotations

import pytest
import torch

import fastseq
from fastseq import functional
from fastseq.backends import recorded
from fastseq.testing import OPERATORS, make_problem, run
from fastseq.testing.check import check

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_cases(name: str, backend: str, dtype: torch.dtype) -> None:
    ran = 0
    for case in OPERATORS[name].cases:
        if dtype not in case.dtypes:
            continue
        outcome = check(OPERATORS[name], backend, dtype, case, "cuda")
        assert not outcome.failures, (name, backend, dtype, case.name, outcome.failures)
        ran += outcome.skipped is None
    if not ran:
        pytest.skip(f"{name} has no {backend} kernel")


@pytest.mark.parametrize("name", list(OPERATORS))
def test_graph_replay(name: str) -> None:
    """Captured once, replayed on other numbers: what eager gives for those."""
    operator = OPERATORS[name]
    case = next(c for c in operator.cases if c.quick and "dropout_p" not in c.sizes)
    first, second = (
        make_problem(operator, case.sizes, torch.bfloat16, "cuda", seed) for seed in (0, 1)
    )
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm up: compile, allocate
        for _ in range(3):
            run(operator.ours, first)
    torch.cuda.current_stream().wait_stream(stream)
    leaves = first.leaves()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = operator.ours(**leaves, **first.options)
    for argument, value in second.arguments.items():
        if value is not None:
            leaf = first.arguments[argument]
            assert leaf is not None
            leaf.copy_(value)
    graph.replay()
    expected = run(operator.ours, second, gradients=False)
    for key, value in outputs.items():
        assert torch.equal(value, expected[key]), key


def test_a_graph_captures_attention_without_a_kernel() -> None:
    """Where no kernel serves, as for fp64, blocks of products do, and no value is asked for."""
    q, k, v = (torch.randn(1, 2, 40, 16, device="cuda", dtype=torch.float64) for _ in range(3))
    mask = torch.rand(40, 40, device="cuda") < 0.8
    eager = functional.attention(q, k, v, mask=mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = functional.attention(q, k, v, mask=mask)
    graph.replay()
    assert torch.equal(captured, eager)


def test_captured_dropout_draws_anew() -> None:
    x, r = torch.ones(64, 256, device="cuda"), torch.zeros(64, 256, device="cuda")
    functional.add_layer_norm(x, r, (256,), dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, drawn = functional.add_layer_norm(x, r, (256,), dropout_p=0.5)
    graph.replay()
    first = drawn.clone()
    graph.replay()
    assert not torch.equal(first, drawn)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_past_2_to_31_elements(backend: str) -> None:
    """The last rows of a tensor of 2^31 + elements are what a small tensor of them gives."""
    rows, length = 2**19 + 3, 4097
    x = torch.empty(rows, length, device="cuda", dtype=torch.bfloat16)
    x[-5:] = torch.randn(5, length, device="cuda")
    x[:-5] = 1
    with fastseq.use_backend(backend):
        whole = functional.layer_norm(x, (length,))[-5:]
        tail = functional.layer_norm(x[-5:].clone(), (length,))
    assert torch.equal(whole, tail)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_runs_on_the_current_stream(backend: str) -> None:
    """Work queued before on the same side stream is seen: the kernel does not jump the queue."""
    x = torch.zeros(4096, 1024, device="cuda")
    stream = torch.cuda.Stream()
    with fastseq.use_backend(backend), torch.cuda.stream(stream):
        functional.rms_norm(x, (1024,))
        torch.cuda._sleep(50_000_000)
        x += torch.randn_like(x)
        output = functional.rms_norm(x, (1024,))
        expected = torch.nn.functional.rms_norm(x, (1024,))
    stream.synchronize()
    torch.testing.assert_close(output, expected)


def test_autocast_runs_fused_in_one_kernel() -> None:
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16), recorded() as decisions:
        output = functional.layer_norm(x, (256,))
    assert output.dtype == torch.float32
    assert len(decisions) == 1
