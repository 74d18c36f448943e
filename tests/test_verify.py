"""``fastseq verify`` and its error rule: right code passes, every planted fault is named."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import fastseq
from fastseq import testing
from fastseq.cli import verify
from fastseq.testing import MismatchError, assert_as_good_as_torch, error_ratio
from fastseq.testing.check import check
from fastseq.testing.operators import poisoned_memory

FP32 = torch.float32


@pytest.fixture(autouse=True)
def _one_thread():
    count = torch.get_num_threads()
    torch.set_num_threads(1)  # two would wait for each other where other tests run beside
    yield
    torch.set_num_threads(count)


# --- the error rule ------------------------------------------------------------------------------


def _layer_norm(dtype, rows=64, length=257):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(rows, length, generator=generator).to(dtype)
    return F.layer_norm(input, (length,)), F.layer_norm(input.double(), (length,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_torch_and_the_rounded_truth_pass(dtype):
    theirs, oracle = _layer_norm(dtype)
    for ours in (theirs, oracle.to(dtype)):
        largest, typical = error_ratio(ours, theirs, oracle)
        assert largest <= 1
        assert typical <= 1
        assert_as_good_as_torch(ours, theirs, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_a_few_ulps_off_fails(dtype):
    theirs, oracle = _layer_norm(dtype)
    ulps = 16 if dtype == torch.float32 else 3
    one_off = oracle.to(dtype)
    one_off[5, 7] += ulps * torch.finfo(dtype).eps * oracle.abs().max().to(dtype)
    largest, typical = error_ratio(one_off, theirs, oracle)
    assert largest > 2
    assert typical < 2  # one outlier shows in the maximum alone
    with pytest.raises(MismatchError, match=r"output: error .* at \(5, 7\)"):
        assert_as_good_as_torch(one_off, theirs, oracle, name="output")
    all_off = (oracle * (1 + ulps / 2 * torch.finfo(dtype).eps)).to(dtype)
    assert error_ratio(all_off, theirs, oracle)[1] > 2  # and a bias in the RMS


def test_a_sum_of_many_rows_may_err_more():
    oracle = torch.full((8,), 1.0, dtype=torch.float64)
    ours = (oracle * (1 + 20 * 2**-23)).float()
    exact = oracle.float()
    assert max(error_ratio(ours, exact, oracle)) > 2
    assert max(error_ratio(ours, exact, oracle, summed=4096)) <= 2


def test_nan_and_inf_must_stand_where_torch_has_them():
    oracle = torch.tensor([1.0, math.nan, math.inf, -math.inf], dtype=torch.float64)
    theirs = oracle.float()
    assert max(error_ratio(theirs, theirs, oracle)) <= 1
    for place, value in ((0, math.nan), (0, math.inf), (1, 1.0), (2, 1.0), (2, -math.inf)):
        ours = theirs.clone()
        ours[place] = value
        assert error_ratio(ours, theirs, oracle) == (math.inf, math.inf)
    # Where torch overflows and the truth does not, the truth is right too.
    truth, overflown = torch.tensor([6e4], dtype=torch.float64), torch.tensor([math.inf]).half()
    assert max(error_ratio(truth.half(), overflown, truth)) <= 1


def test_shapes_and_dtypes_must_match():
    theirs, oracle = _layer_norm(FP32)
    with pytest.raises(MismatchError, match="shape"):
        error_ratio(theirs[1:], theirs, oracle)
    with pytest.raises(MismatchError, match="dtype"):
        error_ratio(theirs.double(), theirs, oracle)
    assert error_ratio(theirs[:0], theirs[:0], oracle[:0]) == (0.0, 0.0)


def test_zeros_are_no_division_by_zero():
    zero = torch.zeros(4)
    assert error_ratio(zero, zero, zero.double()) == (0.0, 0.0)
    assert error_ratio(zero + 1e-3, zero, zero.double())[0] > 2


def test_poisoned_memory_is_poisoned_and_then_no_more():
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
        assert torch.empty(1000, dtype=torch.bfloat16).isnan().all()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


# --- planted faults ------------------------------------------------------------------------------


def _with(operator, change):
    """The operator with its output changed by ``change(output)``."""
    right = operator.ours

    def ours(**arguments):
        return {**right(**arguments), "output": change(right(**arguments)["output"])}

    return dataclasses.replace(operator, ours=ours)


def _writes_half(output):
    fresh = torch.empty_like(output)
    if not torch.are_deterministic_algorithms_enabled():
        fresh.copy_(output)  # memory that happens to hold the right result: only poison tells
    fresh[: len(output) // 2 + 1] = output[: len(output) // 2 + 1]
    return fresh


_counter = itertools.count()

FAULTS = {
    "error": lambda y: y * 1.001,
    "dtype": lambda y: y.double(),
    "shape": lambda y: y[..., :-1],
    "two runs differ": lambda y: torch.nextafter(y, y + next(_counter) % 2),
    "not fully written": _writes_half,
    "batch": lambda y: torch.nextafter(y, y + len(y) % 2),
    "ValueError": lambda y: (_ for _ in ()).throw(ValueError("planted")),
}


@pytest.mark.parametrize("complaint", FAULTS)
def test_a_planted_fault_is_named(complaint):
    operator = testing.OPERATORS["layer_norm"]
    case = next(case for case in operator.cases if case.name == "length 63")
    # Row independence is asked of kernels of ours; this stands in where none is built.
    backend = "cpu" if fastseq.backends()["cpu"].startswith("available") else "reference"
    assert check(operator, backend, FP32, case, "cpu").failures == []
    if complaint == "batch" and backend == "reference":
        pytest.skip("no kernel of ours here")
    failures = check(_with(operator, FAULTS[complaint]), backend, FP32, case, "cpu").failures
    assert any(complaint in failure for failure in failures), failures


def test_a_modified_input_and_an_alias_are_named():
    operator = testing.OPERATORS["layer_norm"]
    case = next(case for case in operator.cases if case.name == "plain")
    right = operator.ours

    def modifies(**arguments):
        result = right(**arguments)
        arguments["input"].data.mul_(1.001)  # unseen by autograd, as a kernel's writes are
        return result

    def aliases(**arguments):
        with torch.no_grad():
            return {"output": arguments["input"].copy_(right(**arguments)["output"])}

    modified = check(dataclasses.replace(operator, ours=modifies), "auto", FP32, case, "cpu")
    assert "input: the input was modified" in modified.failures
    inference = dataclasses.replace(
        operator,
        ours=aliases,
        make=lambda *args, **sizes: dataclasses.replace(
            operator.make(*args, **sizes), differentiable=()
        ),
    )
    aliased = check(inference, "auto", FP32, case, "cpu")
    assert "output: shares memory with an input" in aliased.failures


def test_a_wrong_gradient_is_named():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    operator = _with(testing.OPERATORS["rms_norm"], Wrong.apply)
    case = next(case for case in operator.cases if case.name == "plain")
    failures = check(operator, "reference", FP32, case, "cpu").failures
    assert {failure.split(":")[0] for failure in failures} == {"grad_input", "grad_weight"}


# --- the command ---------------------------------------------------------------------------------


def test_the_command_passes_and_writes_json(tmp_path, capsys):
    """But for Triton interpreted, which takes minutes and is each family's own test."""
    path = tmp_path / "folder" / "verify.json"
    arguments = ["--device", "cpu", "--quick", "--dtype", "fp32", "--dtype", "bf16"]
    for backend in ("auto", "cpu", "torch", "reference"):
        arguments += ["--backend", backend]
    assert verify.run([*arguments, "--json", str(path)]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "0 failed" in printed
    for name in testing.OPERATORS:
        assert name in printed
    report = json.loads(path.read_text())
    assert report["passed"] is True
    assert {outcome["operator"] for outcome in report["outcomes"]} == set(testing.OPERATORS)
    assert {"auto", "torch", "reference"} <= {o["backend"] for o in report["outcomes"]}
    checked = [o for o in report["outcomes"] if o["backend"] == "auto"]
    assert all(o["gradients"] and o["ratios"] for o in checked)


def test_the_command_fails_on_a_wrong_operator(monkeypatch, tmp_path, capsys):
    wrong = _with(testing.OPERATORS["layer_norm"], lambda y: y * 1.01)
    monkeypatch.setitem(testing.OPERATORS, "layer_norm", wrong)
    path = tmp_path / "verify.json"
    arguments = ["--device", "cpu", "--quick", "--dtype", "fp32", "--backend", "auto"]
    assert verify.run([*arguments, "--json", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED layer_norm auto fp32, plain:" in printed
    assert "FAILED rms_norm" not in printed
    assert json.loads(path.read_text())["passed"] is False


def test_a_failing_device_ends_the_run_but_not_the_report(monkeypatch, tmp_path, capsys):
    def lost(**arguments):
        raise torch.AcceleratorError("planted")

    broken = dataclasses.replace(testing.OPERATORS["rms_norm"], ours=lost)
    case = next(case for case in broken.cases if case.name == "plain")
    # An error that leaves the device as it was is the kernel's alone.
    assert check(broken, "auto", FP32, case, "cpu").failures == ["AcceleratorError: planted"]
    monkeypatch.setattr("fastseq.testing.check.device_works", lambda device: False)
    monkeypatch.setitem(testing.OPERATORS, "rms_norm", broken)
    path = tmp_path / "verify.json"
    arguments = ["--device", "cpu", "--quick", "--dtype", "fp32", "--backend", "auto"]
    assert verify.run([*arguments, "--json", str(path)]) == 1
    assert "the device failed" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert "planted" in report["stopped"]
    reached = list(testing.OPERATORS)[: list(testing.OPERATORS).index("rms_norm")]
    assert {outcome["operator"] for outcome in report["outcomes"]} == set(reached)


def test_what_cannot_be_checked_is_an_error(capsys):
    assert verify.run(["--device", "cpu", "--backend", "cuda"]) == 2
    assert "nothing to check" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert verify.run(["--device", "cuda"]) == 2
        assert "no device cuda" in capsys.readouterr().err
    assert verify.run(["--device", "nonsense"]) == 2
    for bad in (["--family", "nothing"], ["--dtype", "fp8"]):
        with pytest.raises(SystemExit) as stop:
            verify.run(bad)
        assert stop.value.code == 2
