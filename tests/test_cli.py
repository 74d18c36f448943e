"""The command line: dispatch, doctor and demo."""

import argparse
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fastseq
from fastseq import cli
from fastseq.cli import demo, doctor
from fastseq.cli.demo_models import CharGPT, RecurrentLM, Text

ROOT = Path(__file__).parent.parent


def run_module(*arguments, **environment):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "fastseq", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


# --- dispatch ------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command}" in text for command in ("doctor", "verify", "demo"))


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"fastseq {fastseq.__version__} ")


def test_no_command_is_an_error_with_help(capsys):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["cure"], ["doctor", "--nonsense"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help_of_its_own(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    assert f"usage: fastseq {command}" in capsys.readouterr().out


def test_a_command_gets_the_rest_and_gives_the_status(monkeypatch):
    seen = []

    def run(arguments):
        seen.extend(arguments)
        return 7

    monkeypatch.setitem(sys.modules, "fastseq.cli.verify", types.SimpleNamespace(run=run))
    assert cli.main(["verify", "--quick", "--json", "x"]) == 7
    assert seen == ["--quick", "--json", "x"]


def test_interrupted(monkeypatch, capsys):
    def run(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# --- doctor --------------------------------------------------------------------------------------


def test_doctor_as_a_command():
    result = run_module("doctor")
    assert result.returncode == 0, result.stderr
    for name in ("Installed", "Compiled kernels", "Backends", "GPUs", "What to do"):
        assert f"\n{name}" in f"\n{result.stdout}"
    assert f"torch          {torch.__version__}\n" in result.stdout


def test_doctor_without_compiled_kernels():
    result = run_module("doctor", "--json", FASTSEQ_CPP="0", FASTSEQ_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["extension"] == {"loaded": False, "reason": "switched off by FASTSEQ_CPP=0"}
    assert report["backends"]["cpu"] == "switched off by FASTSEQ_CPP=0"
    assert report["environment"] == report["environment"] | {
        "FASTSEQ_CPP": "0",
        "FASTSEQ_BACKEND": "reference",
    }
    assert report["checks"][0]["works"]
    assert report["checks"][0]["ran on"]["layer_norm forward"] == "reference"
    advice = " ".join(report["advice"])
    assert "FASTSEQ_CPP=0 switches the compiled kernels off" in advice
    assert "FASTSEQ_BACKEND forces 'reference'" in advice


def test_doctor_fails_when_a_norm_is_wrong(monkeypatch, capsys):
    right = fastseq.functional.layer_norm
    monkeypatch.setattr(fastseq.functional, "layer_norm", lambda *a: right(*a) * 1.01)
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAILS: AssertionError" in text
    assert "layer_norm failed on cpu" in text


def report(**changes):
    """What `examine` finds on a machine that has everything, but for the changes."""
    full = {
        "installed": {"C++ compiler": "g++ 12", "CUDA driver": "570", "triton": "3.7"},
        "extension": {"loaded": True, "CUDA architectures": "sm_90a"},
        "gpus": [{"name": "H200", "capability": "sm_90"}],
        "environment": {},
        "forced backend": "auto",
        "checks": [{"device": "cpu", "works": True}],
    }
    for name, change in changes.items():
        full[name] = full[name] | change if isinstance(change, dict) else change
    return full


MISSING = {"loaded": False, "reason": "not built"}


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, None),
        ({"extension": MISSING, "installed": {"C++ compiler": None}}, "install g++"),
        ({"extension": MISSING}, "missing (not built): install fastseq again"),
        ({"extension": {"CUDA architectures": None}}, "put nvcc on PATH"),
        ({"installed": {"triton": None}}, "pip install triton"),
        ({"gpus": [{"name": "V100", "capability": "sm_70"}]}, "V100 is sm_70"),
        ({"forced backend": "cuda"}, "forces 'cuda'"),
    ],
)
def test_advice(changes, advice, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = doctor._advice(report(**changes))
    if advice is None:
        assert given == []
    else:
        assert len(given) == 1
        assert advice in given[0]


@pytest.mark.parametrize(
    ("cuda", "environment", "advice"),
    [
        (None, {}, "torch is a CPU build"),
        ("13.0", {"CUDA_VISIBLE_DEVICES": ""}, "may be what hides the GPU"),
        ("13.0", {}, "compare the CUDA driver"),
    ],
)
def test_advice_for_a_gpu_that_torch_does_not_see(cuda, environment, advice, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    given = doctor._advice(report(gpus=[], environment=environment))
    assert len(given) == 1
    assert advice in given[0]


# --- demo ----------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """The demo with models that take milliseconds."""
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    tasks = (
        demo.Task("CharGPT", lambda size: CharGPT(size, 16, 1, 2, 8), 4, 8, 6e-3),
        demo.Task("RecurrentLM", lambda size: RecurrentLM(size, 16, 1), 4, 8, 4e-3),
    )
    monkeypatch.setattr(demo, "CPU_TASKS", tasks)


ARGUMENTS = ("demo", "--device", "cpu", "--threads", "1")


def test_demo_writes_picture_numbers_and_table(small, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert cli.main([*ARGUMENTS, "--steps", "12", "--out", str(tmp_path / "a" / "b")]) == 0
    assert torch.get_num_threads() == threads
    picture = (tmp_path / "a" / "b" / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    text = capsys.readouterr().out
    for part in ("3 LayerNorm", "MultiheadAttention", "1 GRU", "CharGPT", "memory", "writes:"):
        assert part in text
    assert "FAILED" not in text

    report = json.loads((tmp_path / "a" / "b" / "demo.json").read_text())
    assert report["environment"]["torch"] == torch.__version__
    gpt, recurrent = report["models"]
    assert gpt["swapped"] == {"LayerNorm": 3, "MultiheadAttention": 1}
    assert gpt["kept"] == {"Embedding": 2, "Linear": 3, "GELU": 1}
    assert recurrent["swapped"] == {"GRU": 1, "LayerNorm": 1}
    assert recurrent["kept"] == {"Embedding": 1, "Linear": 1}
    for model in (gpt, recurrent):
        assert model["steps"] == 12
        assert model["agrees"]
        assert model["threads"] == 1
        served = {name.split()[0] for name in model["kernels"]}
        ours = {"layer_norm", "recurrent", "attention", "scaled_dot_product_attention"}
        assert served <= ours, served
        assert model["kernels"]
        for variant in ("torch", "fastseq", "yardstick"):
            assert len(model["losses"][variant]) == len(model["step_ms"][variant]) == 12
            assert model["losses"][variant][-1] < model["losses"][variant][0]
        # Rounding moves the yardstick: a bound of zero would mean that nothing was measured.
        assert model["losses"]["torch"] != model["losses"]["yardstick"]
        assert model["memory_mib"]["torch"] > 0
        assert model["memory_mib"]["fastseq"] > 0
        assert model["swapped_ms"]["torch"] > 0
        assert model["sample"].startswith("The ")
        assert len(model["sample"]) == 244


@pytest.mark.parametrize("wrong", [lambda y: y * 1.001, lambda y: y * float("nan")])
def test_demo_fails_when_a_norm_is_wrong(small, tmp_path, capsys, monkeypatch, wrong):
    right = fastseq.functional.layer_norm
    monkeypatch.setattr(fastseq.functional, "layer_norm", lambda *a: wrong(right(*a)))
    monkeypatch.setattr(demo, "_sample", lambda *a: "")
    assert cli.main([*ARGUMENTS, "--steps", "3", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("FAILED") == 2
    models = json.loads((tmp_path / "demo.json").read_text())["models"]
    assert [model["agrees"] for model in models] == [False, False]


def test_demo_stops_after_its_seconds(small, tmp_path):
    assert cli.main([*ARGUMENTS, "--seconds", "0.2", "--out", str(tmp_path)]) == 0
    for model in json.loads((tmp_path / "demo.json").read_text())["models"]:
        steps = [sum(times) for times in zip(*model["step_ms"].values(), strict=True)]
        assert sum(steps[:-1]) < 200  # milliseconds: the last step is the one that crosses the line


@pytest.mark.parametrize("option", [("--seconds", "-1"), ("--seconds", "nan"), ("--steps", "0")])
def test_demo_refuses_nonsense(option, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["demo", *option])
    assert exit.value.code == 2
    assert f"{option[0]}: invalid positive" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_demo_without_the_device_asked_for(tmp_path, capsys):
    assert cli.main(["demo", "--device", "cuda", "--out", str(tmp_path / "new")]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_demo_without_its_extra(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fastseq.cli.demo_report", raising=False)
    monkeypatch.delattr(cli, "demo_report", raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["demo"]) == 2
    assert "pip install 'fastseq[demo]'" in capsys.readouterr().err


def test_best_threads_is_the_faster_of_one_and_all(monkeypatch):
    task = demo.Task("x", lambda size: RecurrentLM(size, 4, 1), 1, 4, 1e-3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for faster in (1, 2):

            def timed(function, device, faster=faster):
                return function(), 1.0 if torch.get_num_threads() == faster else 2.0

            monkeypatch.setattr(demo, "_timed", timed)
            assert demo._best_threads(task, Text.load()) == faster
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_peak_memory_is_what_a_step_allocates():
    def step():
        kept = torch.empty(3 << 20, dtype=torch.uint8)
        for _ in range(4):
            torch.empty(2 << 20, dtype=torch.uint8)  # freed at once: counts once
        return kept

    peak = demo._peak_memory(step, torch.device("cpu"))
    assert peak == pytest.approx(5, abs=0.05)


def test_the_models_are_causal():
    torch.manual_seed(0)
    tokens = torch.randint(20, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 20
    for model in (CharGPT(20, 16, 2, 2, 8), RecurrentLM(20, 16, 2)):
        before, after = model(tokens), model(changed)
        torch.testing.assert_close(after[:, :5], before[:, :5])
        assert not torch.allclose(after[:, 5:], before[:, 5:])


def test_text_batches_predict_the_next_character():
    text = Text.load()
    assert len(text.tokens) > 300_000
    inputs, targets = text.batch(4, 16, torch.Generator().manual_seed(1))
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert text.write(inputs[0])[1:] == text.write(targets[0])[:-1]


def test_bound_follows_the_yardstick():
    result = demo.Result("x", 0, 1, {}, [], {}, {})
    result.losses = {
        "torch": [2.0] * 12,
        "yardstick": [2.0] * 11 + [2.5],
        "fastseq": [2.0] * 11 + [3.0],
    }
    result.bound = demo._bound(result, tokens=100, device=torch.device("cpu"))
    assert result.bound[10] < 1e-5
    assert result.bound[11] == pytest.approx(5, rel=1e-3)
    assert result.exceeded is None
    result.losses["fastseq"][3] = 2.001
    assert result.exceeded == 4


def test_options_have_the_promised_defaults():
    options = demo._parser().parse_args([])
    assert options == argparse.Namespace(
        out=Path("demo-results"), seconds=22.0, steps=None, device="auto", threads=None
    )
