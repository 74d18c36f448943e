"""The harness under a budget: what comes first, what is left out, and going on where it stopped."""

import dataclasses
import json
import time

import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.goals import goals_of
from benchmarks.ops import benchmarks_of
from benchmarks.points import even_order, sweep
from benchmarks.registry import MODES, Asked
from benchmarks.results import Results, load
from benchmarks.runner import Runner, Settings

from .benchmark_toys import CPU, Clock, double, run_toys, slow, toy_benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_budget_drops_points_evenly_and_says_so():
    twice = [
        toy_benchmark(name, ours=slow(0.02), counts=range(1, 9)) for name in ("first", "second")
    ]
    started = time.perf_counter()
    results = run_toys(twice, budget=2.5)
    assert time.perf_counter() - started < 4
    done = [(row.operator, row.label) for row in results.rows if row.provider == "fastseq"]
    assert 0 < len(done) < 16
    assert len(done) + len(results.dropped) == 16
    assert all("fp32" in text for text in results.dropped)
    of_first = sum(name == "first" for name, _ in done)
    assert abs(2 * of_first - len(done)) <= 1


def test_what_is_asked_comes_first_and_is_shown_beside_what_is_seen(monkeypatch, tmp_path, capsys):
    clock = Clock(monkeypatch)
    wishes = (
        Asked({"count": 1}, "inference", "fp32", speedup=1.5, memory=1.0),
        Asked({"count": 2}, "inference", "fp32", speedup=4.0),
        Asked({"count": 2}, "inference", "fp32", beside={"count": 1}, times=0.1),
        Asked({"count": 3}, "bwd", "fp32", speedup=1.0),
    )
    slow = toy_benchmark(ours=clock.slow(0.004), torchs=clock.slow(0.008), counts=range(1, 9))
    slow = dataclasses.replace(slow, asked=wishes, sweeps={"cpu": slow.sweeps["smoke"]})
    phases = sweep([slow], "cpu", "cpu", None, ["reused"], ["inference"])
    assert [p.label for p in phases[0]] == ["1", "2"]
    results = Results(
        {"device": "a CPU", "torch": "2", "commit": "c", "date": "2026"},
        ceilings={"1": {"copy": 1e10, "matmul": {"fp32": 1e11, "bf16": 1e11}}},
        goals=goals_of(phases[0], [1]),
    )
    settings = Settings(CPU, ["inference"], [1], "cpu", ["fastseq"], 0.5, group_seconds=0.02)
    Runner(settings, results).run([phases[0][:1], phases[1][:0]])
    results.save(tmp_path)
    goals = load(tmp_path).goals
    assert [(goal.label, goal.what, goal.reached) for goal in goals] == [
        ("1", "speedup", True),
        ("1", "memory", True),
        ("2", "speedup", None),
        ("2", "time", None),
    ]
    settings.budget = None
    Runner(settings, results).run([phases[0][1:]])
    report.show(results, Console(width=200))
    report.show_goals(results, Console(width=200))
    assert [goal.reached for goal in results.goals] == [True, True, False, False]
    printed = capsys.readouterr().out
    assert "1.5x, peak 100% (1.00)" in printed
    assert "4 figures; 2 reached, 2 missed" in printed
    results.rows = [row for row in results.rows if row.label == "1"]
    report.show(results, Console(width=200))
    report.show_goals(results, Console(width=200))
    assert "not measured: double 2 fp32 inference, 1 thread: 4x torch's speed" in (
        capsys.readouterr().out
    )


def test_what_is_asked_of_slow_operators_comes_last():
    asked = sweep(benchmarks_of(), "cpu", "cpu", None, ["reused"], MODES)[0]
    slow = [point.benchmark.slow for point in asked]
    assert slow == sorted(slow)
    assert {"attention", "linear_cross_entropy"} <= {p.name for p in asked if p.benchmark.slow}


def test_what_is_asked_can_be_measured():
    """The times beside which others are asked are asked for themselves, so that they are there."""
    count = 0
    for benchmark in benchmarks_of():
        known = {(benchmark.label(a.sizes), a.mode, a.dtype) for a in benchmark.asked}
        for one in benchmark.asked:
            count += 1
            if one.beside is not None:
                assert (benchmark.label(one.beside), one.mode, one.dtype) in known
    assert count > 100


def test_any_first_points_are_spread():
    points = sweep(
        benchmarks_of(["layer_norm"]), "cpu", "cpu", ["fp32", "bf16"], ["reused"], MODES
    )[1]
    ordered = even_order(points)
    assert sorted(map(str, ordered)) == sorted(map(str, points))
    first = ordered[:8]
    assert len({point.name for point in first}) == 4
    assert len({point.label for point in first}) == 4
    assert sum(point.dtype == "fp32" for point in first) == 4


def test_resuming_measures_only_what_is_missing(tmp_path):
    calls = []

    def counted(input):
        calls.append(len(input))
        return double(input)

    results = run_toys([toy_benchmark(ours=counted, counts=(64,))])
    results.save(tmp_path)
    assert set(calls) == {64}
    calls.clear()
    resumed = run_toys([toy_benchmark(ours=counted, counts=(64, 128))], results=load(tmp_path))
    assert set(calls) == {128}
    assert [row.label for row in resumed.rows if row.provider == "fastseq"] == ["64", "128"]


def test_results_of_another_commit_are_not_resumed(tmp_path, capsys):
    arguments = ["--ops", "rms_norm", "--suite", "smoke", "--time-budget", "0.001"]
    arguments += ["--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    assert content["dropped"]
    content["environment"]["commit"] = "another"
    path.write_text(json.dumps(content))
    assert command.main([*arguments, "--resume"]) == 2
    assert "commit" in capsys.readouterr().err
