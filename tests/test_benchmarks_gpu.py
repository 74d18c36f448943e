"""The command for ten minutes of a GPU: no step costs another."""

import json
import time

import pytest
import torch

from benchmarks import gpu
from benchmarks.__main__ import _parser as command_parser
from benchmarks.ops import benchmarks_of
from benchmarks.providers import providers_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_step_that_hangs_or_fails_takes_nothing_with_it(monkeypatch, tmp_path, capsys):
    commands = {
        "build": ["sh", "-c", "echo built; exit 3"],
        "verify": ["sleep", "60"],
        "tests": ["sh", "-c", "exit 5"],
        "sanitizer": [],
        "suite": ["sh", "-c", "echo measured"],
    }
    monkeypatch.setattr(gpu, "_command", lambda name, *rest: (commands[name], "why"))
    monkeypatch.setattr(gpu, "_GRACE", 0.5)
    started = time.perf_counter()
    assert gpu.main(["--device", "cpu", "--budget", "6", "--out", str(tmp_path)]) == 1
    assert time.perf_counter() - started < 8
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    outcomes = {step["name"]: step["outcome"] for step in steps}
    assert outcomes == {
        "build": "failed",
        "verify": "out of time",
        "tests": "passed",
        "sanitizer": "left out",
        "suite": "passed",
    }
    log = (tmp_path / "log.txt").read_text()
    assert "built" in log
    assert "measured" in log
    assert "verify: out of time" in capsys.readouterr().out


def test_no_step_costs_another_and_the_folder_stays_small(monkeypatch, tmp_path):
    def planted(name, device, out, seconds):
        if name == "verify":
            raise OSError("planted")
        if name == "sanitizer":
            return ["/no/such/program"], ""
        if name == "baselines":
            code = "mkdir -p $0; echo {} > $0/results.json; echo , > $0/results.csv"
            return ["sh", "-c", code, str(out / "baselines")], ""
        return ["sh", "-c", "yes | head -c 3000000"], ""

    monkeypatch.setattr(gpu, "_command", planted)
    parts = ",".join(gpu.STEPS)
    arguments = ["--device", "cpu", "--budget", "60", "--out", str(tmp_path), "--parts", parts]
    assert gpu.main(arguments) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [step["outcome"] for step in summary["steps"]] == [
        *("passed", "failed", "passed", "failed", "passed", "passed")
    ]
    assert "planted" in summary["steps"][1]["remark"]
    assert summary["machine"]["torch"] == torch.__version__
    assert {path.name for path in tmp_path.iterdir()} == {
        *("log.txt", "summary.json", "baselines.json")
    }
    assert (tmp_path / "log.txt").stat().st_size < 1.1 * 2**20
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "all"])


def test_the_files_with_gpu_tests_are_found():
    assert "tests/gpu/test_kernels.py" in gpu._gpu_tests()
    assert not [path for path in gpu._gpu_tests() if "test_benchmarks" in path]


def test_without_pytest_verify_has_all_cases(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    command, reason = gpu._command("tests", "cuda", tmp_path, 100.0)
    assert command[1:] == ["-m", "fastseq", "verify", "--device", "cuda"]
    assert "pytest is not installed" in reason


def test_every_step_has_a_command_on_both_devices(tmp_path):
    for device in ("cpu", "cuda"):
        for name in gpu.STEPS:
            command, reason = gpu._command(name, device, tmp_path, 100.0)
            assert command or reason
    suite, _ = gpu._command("suite", "cuda", tmp_path, 100.0)
    options = command_parser().parse_args(suite[3:])
    assert (options.device, options.suite, options.time_budget) == ("cuda", "gpu", 70.0)
    baselines, _ = gpu._command("baselines", "cuda", tmp_path, 100.0)
    assert command_parser().parse_args(baselines[3:]).suite == "baselines"
    for benchmark in benchmarks_of():
        assert benchmark.sizes_of("baselines", "cuda")
        names = [p.name for p in providers_of(benchmark, {}, None, "baselines", "cuda")]
        assert names[0] == "torch"
        assert not [name for name in names if name.startswith("fastseq")]
