"""What moved between two results, or since another commit, is seen."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import base, compare
from benchmarks.results import load

from .benchmark_toys import Clock, run_toys, toy_benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_planted_slowdown_is_seen(monkeypatch, tmp_path, capsys):
    clock = Clock(monkeypatch)
    for name, seconds in (("old", 0.004), ("same", 0.004), ("slower", 0.0054)):
        benchmark = toy_benchmark(ours=clock.slow(seconds), torchs=clock.slow(0.008))
        run_toys([benchmark]).save(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("old", "same", "slower")}
    assert command.main(["compare", paths["old"], paths["same"], "--least", "0.1"]) == 0
    assert "0 slower, 0 faster" in capsys.readouterr().out
    assert command.main(["compare", paths["old"], paths["slower"], "--least", "0.1"]) == 1
    assert "1 slower, 0 faster" in capsys.readouterr().out
    change = compare.changes(load(tmp_path / "old"), load(tmp_path / "slower"))[0]
    assert change.ratio == pytest.approx(4 / 5.4, rel=0.1)


def test_what_breaks_is_seen():
    old = run_toys([toy_benchmark()])
    new = run_toys([toy_benchmark(ours=lambda input: {"output": input})])
    assert [row.provider for row in compare.broken(old, new)] == ["fastseq"]


def test_base_says_what_is_wrong(tmp_path, capsys):
    arguments = ["layer_norm", "--device", "cpu", "--base", "no-such-commit"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 2
    assert "no-such-commit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "--base needs --out" in capsys.readouterr().err


def _repository(path, setup):
    path.mkdir()
    (path / "setup.py").write_text(setup)
    git = ["git", "-C", str(path), "-c", "user.name=n", "-c", "user.email=e@example.com"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    return path


def test_another_commit_is_built_once_beside_this_one(monkeypatch, tmp_path):
    builds = "open('count', 'a').write('x')"
    monkeypatch.setattr(base, "_ROOT", _repository(tmp_path / "good", builds))
    tree = base.checkout("HEAD")
    assert tree == base.checkout("HEAD")
    assert (tree / "count").read_text() == "x"
    monkeypatch.setattr(base, "_ROOT", _repository(tmp_path / "bad", "raise SystemExit('no')"))
    with pytest.raises(base.BaseError, match="HEAD does not build"):
        base.checkout("HEAD")


def test_a_slowdown_since_the_other_commit_is_seen(monkeypatch, tmp_path, capsys):
    """Both trees are measured operator by operator in turn, and compared."""
    clock, order = Clock(monkeypatch), []

    def measured(command, cwd, env, check):
        order.append((command[command.index("--ops") + 1], cwd == tmp_path))
        seconds = 0.004 if cwd == tmp_path else 0.0054
        benchmark = toy_benchmark(ours=clock.slow(seconds), torchs=clock.slow(0.008))
        run_toys([benchmark]).save(Path(command[-1]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(base, "checkout", lambda revision: tmp_path)
    monkeypatch.setattr(base.subprocess, "run", measured)
    arguments = ["layer_norm", "--ops", "layer_norm,rms_norm", "--device", "cpu", "--base", "HEAD"]
    assert command.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    names = ("layer_norm", "rms_norm")
    assert order == [(name, there) for name in names for there in (True, False)]
    assert "1 slower, 0 faster" in capsys.readouterr().out


def test_options_of_the_other_tree_are_this_ones():
    given = ["layer_norm", "--base", "HEAD~1", "--mode", "fwd", "--out=here", "--ops", "rms_norm"]
    assert command._without(given, "--base", "--ops", "--out") == ["layer_norm", "--mode", "fwd"]
