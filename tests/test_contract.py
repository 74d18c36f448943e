"""The op contract (every op of every family): opcheck, compile, export, registration, backends."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import functional, nn
from fastseq.backends import NAMES, BackendError, recorded
from fastseq.ops._op import REGISTRY
from fastseq.testing import OPERATORS, Operator, Problem, make_problem, run

CPU = torch.device("cpu")
OPERATOR_NAMES = list(OPERATORS)


def quick(operator: Operator, dtype: torch.dtype = torch.float32) -> list[Problem]:
    """The operator's quick, tiny problems: its argument combinations at sizes of no matter."""
    return [
        make_problem(operator, case.sizes, dtype, CPU)
        for case in operator.cases
        if case.quick
        and case.tiny
        and dtype in case.dtypes
        and case.sizes.get("values") != "special"  # opcheck takes NaN and NaN for different
    ]


class Recorder:
    """Collects the arguments that private ops are called with, where the backend serves them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[object, ...]]] = []

    def mode(self) -> object:
        from torch.utils._python_dispatch import TorchDispatchMode

        calls = self.calls

        class Listen(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None):
                result = op(*args, **(kwargs or {}))
                if op.namespace == "fastseq":
                    plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
                    calls.append((op.name().removeprefix("fastseq::"), plain))
                return result

        return Listen()


@cache
def calls_of(name: str) -> list[tuple[str, tuple[object, ...]]]:
    """The calls of private ops that an operator's problems come to, each kind once.

    A kind is what a schema or a fake can be wrong about: which tensors there are, of which dtypes
    and layouts, and the options; sizes are of no matter.
    """
    recorder = Recorder()
    with fastseq.use_backend("reference"):
        for problem in quick(OPERATORS[name]):
            with recorder.mode():  # type: ignore[attr-defined]
                run(OPERATORS[name].ours, problem)
    kinds = {}
    for op, args in recorder.calls:
        kind = tuple(
            (a.dtype, a.dim(), a.is_contiguous(), not a.numel())
            if isinstance(a, Tensor)
            else a
            if isinstance(a, bool | str)
            else str(a)
            if isinstance(a, list)
            else type(a)
            for a in args
        )
        kinds.setdefault((op, kind), (op, args))
    return list(kinds.values())


def cannot_serve(error: BaseException | None) -> bool:
    """Whether a backend that was forced has no kernel for the call."""
    return error is not None and (
        isinstance(error, BackendError) or cannot_serve(error.__cause__ or error.__context__)
    )


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_opcheck(name: str, backend: str) -> None:
    """Schema, fake and dynamic-shape agreement of the ops behind an operator.

    What a compiler makes of an op does not depend on who runs it: dynamic shapes are checked once.
    """
    if backend not in [candidate.backend for candidate in REGISTRY[OPERATORS[name].op]]:
        pytest.skip(f"{name} has no {backend} kernel")
    tests = ["test_schema", "test_faketensor"]
    if backend == "reference":
        tests.append("test_aot_dispatch_dynamic")
    checked = 0
    with fastseq.use_backend(backend):
        for op, args in calls_of(name):
            results = torch.library.opcheck(
                getattr(torch.ops.fastseq, op).default,
                args,
                test_utils=tests,
                raise_exception=False,
            )
            errors = [found for found in results.values() if isinstance(found, Exception)]
            if errors and all(map(cannot_serve, errors)):
                continue
            assert not errors, (op, args, errors)
            checked += 1
    assert checked


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_compiles_whole_with_dynamic_shapes(name: str) -> None:
    """fullgraph, forward and backward; one compilation serves other sizes; no kernel is inlined."""
    operator = OPERATORS[name]
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(traced: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
            graphs.append(traced)
            return make_boxed_func(traced.forward)  # type: ignore[no-any-return]

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    compiled = torch.compile(operator.ours, fullgraph=True, dynamic=True, backend=backend)
    problem = quick(operator)[-1]
    with fastseq.use_backend("reference"):
        eager = run(operator.ours, problem)
        result = run(compiled, problem)
    for key, value in eager.items():
        torch.testing.assert_close(result[key], value, msg=lambda m, key=key: f"{key}: {m}")
    ops = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    mine = {op for op in ops if op.startswith("fastseq.")}
    if mine and problem.differentiable:  # an operator that is composed of torch's has none
        assert any("_fwd" in op for op in mine)
        assert any("_bwd" in op for op in mine), ops


def test_inductor_and_export() -> None:
    torch._dynamo.reset()
    block = torch.nn.Sequential(torch.nn.Linear(64, 64), fastseq.nn.LayerNorm(64))
    x = torch.randn(50, 64)
    expected = block(x)
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    expected.sum().backward()
    grads = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()
    compiled(x).sum().backward()
    for parameter, grad in zip(block.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: rows},))
    assert "fastseq._layer_norm_fwd" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x[:7]), block(x[:7]))


def test_meta_and_fake_tensors_run_no_kernel() -> None:
    with recorded() as decisions:
        output = functional.layer_norm(torch.empty(3, 8, device="meta"), (8,))
    assert (output.device.type, output.shape, decisions) == ("meta", (3, 8), [])


def test_forward_and_backward_on_the_meta_device() -> None:
    """Whose autocast torch refuses to be asked of."""
    with torch.device("meta"):
        x = torch.empty(6, 2, 8, requires_grad=True)
        target = torch.empty(6, dtype=torch.int64)
        matrix, weight = torch.empty(8, 8), torch.empty(8)
        results = [
            *(getattr(nn, kind)(8, 5)(x)[0] for kind in ("LSTM", "GRU", "LayerNormLSTM")),
            nn.GRUCell(8, 5)(x[0]),
            functional.feed_forward(x, matrix, None, matrix, None),
            functional.additive_attention(x, x, x, weight),
            functional.cross_entropy(x[:, 0], target),
            functional.linear_cross_entropy(x[:, 0], matrix, target),
        ]
        assert all(result.is_meta for result in results)
        for result in results:
            (grad,) = torch.autograd.grad(result.sum(), x)
            assert grad.shape == x.shape


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_batches_of_gradients(name: str) -> None:
    """``is_grads_batched``, of which torch.autograd.functional's ``vectorize`` makes use: the same
    numbers as of each gradient alone."""
    for dtype in (torch.float32, torch.float64):
        for problem in quick(OPERATORS[name], dtype)[:3]:
            leaves = problem.leaves()
            inputs = [leaf for leaf in leaves.values() if leaf is not None and leaf.requires_grad]
            if not inputs:
                continue
            torch.manual_seed(0)
            made = OPERATORS[name].ours(**leaves, **problem.options)
            outputs = [made[key] for key in problem.grad_outputs]
            batches = [torch.stack([g, 0 * g, 2 * g]) for g in problem.grad_outputs.values()]
            gradients = partial(torch.autograd.grad, outputs, inputs, retain_graph=True)
            together = gradients(batches, is_grads_batched=True)
            for i in range(3):
                alone = gradients([batch[i] for batch in batches])
                torch.testing.assert_close([grad[i] for grad in together], list(alone))


def test_every_op_has_a_reference_that_takes_everything() -> None:
    assert REGISTRY
    for name, candidates in REGISTRY.items():
        assert name.startswith("_")
        backends = [candidate.backend for candidate in candidates]
        assert backends[-1] == "reference"
        assert len(set(backends)) == len(backends)
        assert set(backends) <= set(NAMES)
        schema = torch._C._get_schema(f"fastseq::{name}", "")
        assert not any(argument.has_default_value() for argument in schema.arguments)


# --- choosing a backend --------------------------------------------------------------------------


def test_use_backend_as_context_and_call() -> None:
    assert fastseq.current_backend() == "auto"
    with fastseq.use_backend("reference"):
        assert fastseq.current_backend() == "reference"
        with fastseq.use_backend("auto"):
            assert fastseq.current_backend() == "auto"
        assert fastseq.current_backend() == "reference"
    try:
        fastseq.use_backend("torch")
        assert fastseq.current_backend() == "torch"
    finally:
        fastseq.use_backend("auto")


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference", "triton"])
def test_forced_backend_serves_forward_and_backward(backend: str) -> None:
    x = torch.randn(4, 64, requires_grad=True)
    with fastseq.use_backend(backend), recorded() as decisions:
        functional.layer_norm(x, (64,)).sum().backward()
    assert [d.backend for d in decisions] == [backend, backend]


def test_forced_backend_that_cannot_says_why() -> None:
    x = torch.randn(4, 64)
    with fastseq.use_backend("cuda"), pytest.raises(BackendError, match="not a CUDA tensor"):
        functional.layer_norm(x, (64,))
    with fastseq.use_backend("triton"), pytest.raises(BackendError, match="no fp64 kernel"):
        functional.layer_norm(x.double(), (64,))
    assert fastseq.current_backend() == "auto"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'tritn'.*reference"):
        fastseq.use_backend("tritn")
    assert fastseq.current_backend() == "auto"


def test_environment_variable() -> None:
    code = "import fastseq; print(fastseq.current_backend())"

    def start(value: str) -> subprocess.CompletedProcess[str]:
        import os

        environment = {**os.environ, "FASTSEQ_BACKEND": value}
        return subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    assert start("reference").stdout == "reference\n"
    wrong = start("fast")
    assert wrong.returncode != 0
    assert "FASTSEQ_BACKEND: unknown backend 'fast'" in wrong.stderr


def test_without_the_extension_all_works_by_other_backends() -> None:
    code = """
import torch, fastseq
assert "FASTSEQ_CPP=0" in fastseq.backends()["cpu"]
x = torch.randn(4, 64, requires_grad=True)
for name in ("layer_norm", "rms_norm"):
    getattr(fastseq.functional, name)(x, (64,)).sum().backward()
y, r = fastseq.functional.add_layer_norm(x, x, (64,), dropout_p=0.5)
(y.sum() + r.sum()).backward()
"""
    import os

    subprocess.run([sys.executable, "-c", code], env={**os.environ, "FASTSEQ_CPP": "0"}, check=True)


def test_explain_names_backend_and_reasons() -> None:
    explanation = str(fastseq.explain(functional.rms_norm, torch.randn(4, 64), (64,)))
    assert "cpu" in explanation
    with fastseq.use_backend("reference"):
        assert "reference" in str(fastseq.explain(functional.rms_norm, torch.randn(4, 64), (64,)))


def test_two_threads_at_once() -> None:
    """The same results as one after the other: scratch memory and caches are each thread's own."""
    x = torch.randn(400, 300, requires_grad=True)
    grad = torch.randn(400, 300)

    def work() -> Tensor:
        with torch.enable_grad():
            output = functional.rms_norm(x, (300,))
            return torch.autograd.grad(output, x, grad)[0]

    expected = work()
    results: list[bool] = []

    def repeat() -> None:
        results.extend(torch.equal(work(), expected) for _ in range(20))

    threads = [threading.Thread(target=repeat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80
