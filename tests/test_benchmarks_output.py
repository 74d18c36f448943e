"""The harness's files, tables and pictures, and what its command says to bad arguments."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks import console, overhead, plots, report
from benchmarks.results import Results, ResultsError, load

pytestmark = pytest.mark.usefixtures("one_thread")


def test_files_and_tables(tmp_path, capsys):
    arguments = ["layer_norm", "--ops", "layer_norm,add_rms_norm", "--suite", "smoke"]
    arguments += ["--device", "cpu", "--seconds", "0.01", "--mode", "fwd", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "add_rms_norm" in printed
    assert "% ceiling" in printed
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {f"{name}.{suffix}" for name in ("times", "speedups") for suffix in ("svg", "png")}
    assert names == {"results.json", "results.csv"} | pictures
    results = load(tmp_path)
    assert results.environment["command"].startswith("python -m benchmarks layer_norm")
    assert results.ceilings["1"]["copy"] > 1e8
    assert len((tmp_path / "results.csv").read_text().splitlines()) == len(results.rows) + 1
    assert command.main(["table", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "| `layer_norm` fwd |" in table
    assert results.environment["command"] in table


def test_no_results_no_plots(tmp_path):
    assert plots.save_plots(Results({}), tmp_path) == []
    assert "no results" in report.markdown(Results({}))


def test_without_rich_and_matplotlib_the_numbers_come_all_the_same(monkeypatch, tmp_path, capsys):
    """As on a machine without network, that has what it has."""
    for name in ("rich", "rich.console", "rich.progress", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarks.plots")
    spec = importlib.util.spec_from_file_location("plain", console.__file__)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    assert plain.Console.__module__ == "plain"
    for name in ("Console", "Table", "Text"):
        monkeypatch.setattr(report, name, getattr(plain, name))
    monkeypatch.setattr(command, "Console", plain.Console)
    monkeypatch.setattr(command, "progress", plain.progress)
    arguments = ["--ops", "rms_norm", "--suite", "smoke", "--device", "cpu", "--seconds", "0.01"]
    arguments += ["--mode", "inference", "--dtype", "fp32", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "fastseq (" in printed
    assert "matplotlib is not installed" in printed
    assert load(tmp_path).rows
    assert list(plain.track([1, 2], "counting")) == [1, 2]


def test_the_registry_runs_under_pytest_benchmark(tmp_path):
    found = tmp_path / "found.json"
    case = "benchmarks/test_registry.py::test_speed[rms_norm-4x64-fp32-inference-"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"{case}{name}]" for name in ("torch", "fastseq")]
    # Under xdist, which it takes for being run in parallel, pytest-benchmark measures nothing.
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    command += [f"--benchmark-json={found}"]
    subprocess.run(command, check=True, capture_output=True, env=alone)
    timed = json.loads(found.read_text())["benchmarks"]
    assert [entry["params"]["provider_name"] for entry in timed] == ["torch", "fastseq"]
    assert len({entry["group"] for entry in timed}) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["--dtype", "fp8"],
        ["--mode", ""],
        ["--threads", "0"],
        ["--threads", "two"],
        ["--time-budget", "-1"],
        ["--ops", "softplus"],
        ["--resume"],
        ["--device", "cpu", "--memory", "hot"],
    ],
)
def test_bad_arguments_are_named(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_bad_files_are_named(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    assert command.main(["table", str(tmp_path)]) == 2
    assert "schema" in capsys.readouterr().err
    assert command.main(["compare", str(tmp_path / "none"), str(tmp_path)]) == 2
    with pytest.raises(ResultsError):
        load(tmp_path / "none")


def test_what_is_counted_is_a_call(monkeypatch, capsys):
    for gradient in (False, True):
        call = overhead.call_of("layer_norm", "fastseq", gradient)
        assert call()["output"].shape == (4, 64)
        assert call()["output"].requires_grad is gradient
    monkeypatch.setattr(overhead, "_WALL_CALLS", 20)
    monkeypatch.setattr(overhead, "ASKED", {"layer_norm": (1e6, 1e6), "rms_norm": (1e-3, 1e6)})
    assert overhead.main(["--wall"]) == 0
    assert overhead.main(["rms_norm", "--wall"]) == 1
    assert "recorded" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        overhead.main(["no_such_operator"])
