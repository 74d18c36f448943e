"""The benchmark harness must time what is right and refuse what is wrong."""

import dataclasses

import pytest
import torch

import fastseq
from benchmarks import __main__ as command
from benchmarks.ops import FAMILIES, benchmarks_of
from benchmarks.registry import MODES, Provider
from fastseq.cli import verify
from fastseq.ops import layer_norm as layer_norm_ops
from fastseq.testing import FAMILIES as TESTED_FAMILIES

from .benchmark_toys import run_toys, toy_benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lambda input: {"output": input * 2.001}, "wrong: output"),
        (lambda input: {"output": (input * 2)[:-1]}, "shape"),
        (lambda input: {"output": (input * 2).double()}, "dtype"),
        (
            lambda input: {"output": torch.where(input > 1.5, torch.nan, input * 2)},
            "wrong: output inf",
        ),
        (lambda input: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_wrong_provider_gets_its_error_and_no_time(wrong, complaint):
    results = run_toys(
        [toy_benchmark(rivals=[Provider("rival", wrong)])], providers=["fastseq", "rival"]
    )
    rows = {row.provider: row for row in results.rows}
    assert rows["rival"].milliseconds is None
    assert complaint in rows["rival"].failure
    assert rows["fastseq"].milliseconds > 0
    assert rows["fastseq"].failure is None
    assert set(rows["fastseq"].errors) == {"output"}


def test_a_wrong_gradient_is_caught_too():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            return input * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2.01

    results = run_toys(
        [toy_benchmark(ours=lambda input: {"output": Wrong.apply(input)})], modes=("bwd",)
    )
    assert "wrong: grad_input" in next(r for r in results.rows if r.provider == "fastseq").failure


def test_every_mode_of_every_registered_operator_runs():
    assert FAMILIES == TESTED_FAMILIES
    for benchmark in benchmarks_of():
        first = dataclasses.replace(benchmark, sweeps={"smoke": benchmark.sweeps["smoke"][:1]})
        rows = run_toys([first], modes=MODES).rows
        assert [row.mode for row in rows] == [mode for mode in benchmark.modes for _ in range(2)]
        for row in rows:
            assert row.failure is None, row
            assert row.speedup > 0
            assert row.minimal_bytes > 0
            assert bool(row.backend) == (row.provider == "fastseq")


@pytest.mark.skipif(
    not fastseq.backends()["cpu"].startswith("available"), reason="no kernel to plant it in"
)
def test_an_error_planted_in_a_kernel_is_caught(monkeypatch, capsys):
    right = layer_norm_ops._extension_forward

    def wrong(*arguments):
        output, *rest = right(*arguments)
        return output * 1.0001, *rest

    monkeypatch.setattr(layer_norm_ops, "_extension_forward", wrong)
    arguments = ["--ops", "rms_norm", "--suite", "smoke", "--device", "cpu", "--seconds", "0.01"]
    assert command.main([*arguments, "--mode", "inference", "--dtype", "fp32"]) == 1
    assert "wrong: output" in capsys.readouterr().out
    arguments = ["--device", "cpu", "--family", "layer_norm", "--quick", "--dtype", "fp32"]
    assert verify.run([*arguments, "--backend", "cpu"]) == 1
    assert "FAILED rms_norm cpu fp32, plain:" in capsys.readouterr().out
