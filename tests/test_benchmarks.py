"""The benchmark harness: it must time what is right, refuse what is wrong, and see what moved."""

import ctypes
import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import fastseq
from benchmarks import __main__ as command
from benchmarks import (
    base,
    codegen,
    compare,
    console,
    gpu,
    memory,
    overhead,
    plots,
    report,
    timing,
)
from benchmarks.__main__ import _parser as command_parser
from benchmarks.goals import goals_of
from benchmarks.ops import FAMILIES, benchmarks_of
from benchmarks.points import even_order, sweep
from benchmarks.providers import providers_of
from benchmarks.registry import MODES, Asked, Benchmark, Cost, Provider
from benchmarks.results import Results, ResultsError, load
from benchmarks.runner import Runner, Settings
from benchmarks.statistics import noise, ratio, summarise
from fastseq.cli import verify
from fastseq.ops import layer_norm as layer_norm_ops
from fastseq.testing import FAMILIES as TESTED_FAMILIES
from fastseq.testing import Operator, Problem

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads_as_before():
    count = torch.get_num_threads()
    torch.set_num_threads(1)  # two would wait for each other where other tests run beside
    yield
    torch.set_num_threads(count)
    memory.set_allocation("reused")


def _double(input):
    return {"output": input * 2}


def _make(dtype, device, generator, *, count):
    input = torch.randn(count, generator=generator).to(dtype).to(device)
    grad = torch.ones(count, dtype=dtype, device=device)
    return Problem({"input": input}, {"output": grad}, differentiable=("input",))


def _benchmark(name="double", ours=_double, torchs=_double, counts=(64,), rivals=()):
    operator = Operator(name, "toy", "_layer_norm_fwd", _make, ours, torchs, ())
    return Benchmark(
        operator,
        {"smoke": tuple({"count": count} for count in counts), "all": ()},
        lambda sizes: str(sizes["count"]),
        lambda problem, mode: Cost(problem.arguments["input"].nbytes),
        lambda: tuple(rivals),
    )


def _slow(seconds, function=_double):
    def slowed(**arguments):
        time.sleep(seconds)
        return function(**arguments)

    return slowed


class Clock:
    """Time that passes in planted functions alone, a little more or less each: no other process's
    doing shows in it."""

    def __init__(self, monkeypatch):
        self.now, self.jitter = 0.0, itertools.cycle((1.0, 1.01, 0.99, 1.02, 0.98))
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def slow(self, seconds):
        def slowed(**arguments):
            self.now += seconds * next(self.jitter)
            return _double(**arguments)

        return slowed


def _run(benchmarks, *, results=None, budget=None, modes=("inference",), providers=None):
    settings = Settings(
        CPU, modes, [1], "smoke", providers or ["fastseq"], budget, group_seconds=0.02
    )
    results = results or Results(
        {"device": "a CPU", "torch": "2", "commit": "c", "date": "2026"},
        ceilings={"1": {"copy": 1e10, "matmul": {"fp32": 1e11}}},
    )
    Runner(settings, results).run(sweep(benchmarks, "smoke", "cpu", ["fp32"], ["reused"], modes))
    return results


# --- the gate ------------------------------------------------------------------------------------


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
    results = _run([_benchmark(rivals=[Provider("rival", wrong)])], providers=["fastseq", "rival"])
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

    results = _run([_benchmark(ours=lambda input: {"output": Wrong.apply(input)})], modes=("bwd",))
    assert "wrong: grad_input" in next(r for r in results.rows if r.provider == "fastseq").failure


def test_every_mode_of_every_registered_operator_runs():
    assert FAMILIES == TESTED_FAMILIES
    for benchmark in benchmarks_of():
        first = dataclasses.replace(benchmark, sweeps={"smoke": benchmark.sweeps["smoke"][:1]})
        rows = _run([first], modes=MODES).rows
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


# --- timing --------------------------------------------------------------------------------------


def test_a_known_ratio_is_found(monkeypatch):
    clock = Clock(monkeypatch)
    results = _run([_benchmark(ours=clock.slow(0.004), torchs=clock.slow(0.008))])
    row = next(row for row in results.rows if row.provider == "fastseq")
    assert row.milliseconds == pytest.approx(4, rel=0.02)
    assert row.speedup == pytest.approx(2, rel=0.05)
    assert row.p20 <= row.milliseconds <= row.p80
    assert row.rounds >= 7


def test_pairs_cancel_what_slows_both():
    slow_spell = torch.tensor([1.0, 1, 1, 5, 5, 5, 5]).double()
    paired = ratio(2 * slow_spell, slow_spell)
    assert (paired.p20, paired.median, paired.p80) == (2, 2, 2)
    assert summarise(slow_spell).median == 5
    assert noise(paired, paired, 7) == 1  # a baseline that is off from itself by 100 %


@pytest.mark.skipif(not memory.set_allocation("reused"), reason="no glibc")
def test_reused_blocks_do_not_fault():
    """In a process of its own: what the heap holds already would tell on it."""
    code = (
        "import torch; from benchmarks import memory\n"
        "call = lambda: torch.empty(2**22).fill_(1.0)\n"
        "memory.set_allocation('reused'); call(); call()\n"
        "faults = memory.page_faults(call); assert faults < 50, faults"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _bytes_left_unmerged():
    """What malloc keeps of small freed blocks for its next large request to merge."""

    class Mallinfo2(ctypes.Structure):
        _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    return mallinfo2().field6  # fsmblks


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc of 2.33")
@pytest.mark.parametrize("policy", memory.CPU_POLICIES)
def test_a_run_does_not_clean_up_after_the_one_before(policy):
    """As graphs of many nodes do, the first run leaves thousands of small free blocks."""
    memory.set_allocation(policy)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    left = []

    def leave():
        for block in [libc.malloc(64) for _ in range(2000)]:
            libc.free(block)
        left.append(_bytes_left_unmerged())

    timer = timing.CpuTimer()
    for call in (leave, lambda: left.append(_bytes_left_unmerged())):
        timer.measure(timing.Run(timing.Variant("", [call], "auto", False), call, 1))
    assert left[0] > 100_000
    assert left[1] < 10_000


def test_peak_memory_of_a_cpu_call():
    source = torch.ones(2**18)
    peak = memory.peak_bytes(lambda: (source + 1) + 1, CPU)
    assert 2 * source.nbytes <= peak < 2.1 * source.nbytes


# --- timing on a GPU that is not there -----------------------------------------------------------


class Gpu:
    """As much of ``torch.cuda`` as the timer uses, with a clock of its own, in milliseconds."""

    def __init__(self):
        self.now, self.captured, self.stream_now, self.log = 0.0, None, None, []

    def kernel(self, name, milliseconds):
        assert self.stream_now == "timer's", "a kernel on another stream cannot be captured"
        if self.captured is not None:
            self.captured.append((name, milliseconds))
        else:
            self.now += milliseconds
            self.log.append(name)

    def install(self, monkeypatch):
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                assert gpu.stream_now == "timer's"
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                assert gpu.stream_now == "timer's"
                assert gpu.captured is None
                for name, milliseconds in self.nodes:
                    gpu.kernel(name, milliseconds)

        @contextmanager
        def stream(name):
            before, gpu.stream_now = gpu.stream_now, name
            yield
            gpu.stream_now = before

        @contextmanager
        def graph(graph, stream):
            gpu.captured, before = [], gpu.stream_now
            gpu.stream_now = stream
            yield
            graph.nodes, gpu.captured, gpu.stream_now = gpu.captured, None, before

        fakes = {"Stream": lambda: "timer's", "stream": stream, "Event": Event, "graph": graph}
        fakes |= {"CUDAGraph": Graph, "synchronize": lambda: None, "_sleep": lambda cycles: None}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def variant(self, name, milliseconds, copies=3):
        calls = [lambda i=i: self.kernel(f"{name}{i}", milliseconds) for i in range(copies)]
        return timing.Variant(name, calls, "auto", False)


def test_a_graph_is_replayed_on_all_copies_when_cold_and_on_one_when_hot(monkeypatch):
    gpu = Gpu()
    gpu.install(monkeypatch)
    timer = timing.GpuTimer()
    for policy, names in (("cold", {"a0", "a1", "a2"}), ("hot", {"a0"})):
        run = timer.prepare(gpu.variant("a", 0.01), policy)
        gpu.log.clear()
        assert timer.measure(run) == pytest.approx(run.calls * 1e-5)
        assert len(gpu.log) == run.calls
        assert 90 <= run.calls <= 100  # a millisecond's worth
        assert {name: gpu.log.count(name) for name in names} == dict.fromkeys(
            names, run.calls // len(names)
        )
    assert timer.prepare(gpu.variant("a", 50.0), "cold").calls == 3  # long calls: each copy once
    assert timer.prepare(gpu.variant("a", 1e-7), "hot").calls == timing.MAX_CALLS


def test_ratios_and_wall_time_on_a_gpu(monkeypatch):
    gpu = Gpu()
    gpu.install(monkeypatch)
    timer = timing.GpuTimer()
    runs = [timer.prepare(gpu.variant(n, t), "cold") for n, t in (("a", 0.02), ("b", 0.005))]
    slow, fast = timing.interleave(timer, runs, 0.001)
    assert len(slow) == len(fast) >= timing.MIN_ROUNDS
    assert ratio(slow, fast).median == pytest.approx(4)
    monkeypatch.setattr(gpu, "kernel", lambda *_: gpu.log.append("call"))
    gpu.log.clear()
    assert timing.wall_seconds(gpu.variant("a", 0.0), torch.device("cuda"), 1e-5) > 0
    assert len(gpu.log) == 5 * 20
    gpu.log.clear()
    timing.wall_seconds(gpu.variant("a", 0.0), torch.device("cuda"), 1.0)
    assert len(gpu.log) == 5


# --- the budget, and going on where a run stopped ------------------------------------------------


def test_a_budget_drops_points_evenly_and_says_so():
    slow = [_benchmark(name, ours=_slow(0.02), counts=range(1, 9)) for name in ("first", "second")]
    started = time.perf_counter()
    results = _run(slow, budget=2.5)
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
    slow = _benchmark(ours=clock.slow(0.004), torchs=clock.slow(0.008), counts=range(1, 9))
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
        return _double(input)

    results = _run([_benchmark(ours=counted, counts=(64,))])
    results.save(tmp_path)
    assert set(calls) == {64}
    calls.clear()
    resumed = _run([_benchmark(ours=counted, counts=(64, 128))], results=load(tmp_path))
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


# --- comparing -----------------------------------------------------------------------------------


def test_a_planted_slowdown_is_seen(monkeypatch, tmp_path, capsys):
    clock = Clock(monkeypatch)
    for name, seconds in (("old", 0.004), ("same", 0.004), ("slower", 0.0054)):
        benchmark = _benchmark(ours=clock.slow(seconds), torchs=clock.slow(0.008))
        _run([benchmark]).save(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("old", "same", "slower")}
    assert command.main(["compare", paths["old"], paths["same"], "--least", "0.1"]) == 0
    assert "0 slower, 0 faster" in capsys.readouterr().out
    assert command.main(["compare", paths["old"], paths["slower"], "--least", "0.1"]) == 1
    assert "1 slower, 0 faster" in capsys.readouterr().out
    change = compare.changes(load(tmp_path / "old"), load(tmp_path / "slower"))[0]
    assert change.ratio == pytest.approx(4 / 5.4, rel=0.1)


def test_what_breaks_is_seen():
    old = _run([_benchmark()])
    new = _run([_benchmark(ours=lambda input: {"output": input})])
    assert [row.provider for row in compare.broken(old, new)] == ["fastseq"]


# --- output --------------------------------------------------------------------------------------


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


# --- the command for ten minutes of a GPU --------------------------------------------------------


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


# --- code generation -----------------------------------------------------------------------------


def test_registers_bound_the_resident_threads():
    assert [report.resident_threads(n) for n in (32, 33, 64, 128, 255)] == [
        2048,
        1632,
        1024,
        512,
        256,
    ]


def test_every_rival_kernel_stands_beside_ours():
    path = Path(gpu.ROOT, "benchmarks", "results", "codegen", "rivals.json")
    found = json.loads(path.read_text())
    assert set(found["versions"]) == {"liger-kernel", "fla-core"}
    places = {
        package: {(e["operator"], e["length"]) for e in found["kernels"] if e["package"] == package}
        for package in ("fastseq", *found["versions"])
    }
    assert places["fastseq"] == places["liger-kernel"] | places["fla-core"]
    assert not [entry for entry in found["kernels"] if "failure" in entry]


def test_codegen_report_names_failures():
    where = {"operator": "layer_norm", "length": "64", "dtype": "bf16", "architecture": 90}
    assert "| CompilationError: x |" in codegen.markdown(
        [{**where, "failure": "CompilationError: x"}]
    )


# --- another commit, and instructions ------------------------------------------------------------


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
        benchmark = _benchmark(ours=clock.slow(seconds), torchs=clock.slow(0.008))
        _run([benchmark]).save(Path(command[-1]))
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


# --- machine code --------------------------------------------------------------------------------

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P2 BRA 0x0090 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0060*/                   MUFU.EX2 R4, R5 ;
        /*0070*/               @P0 BRA 0x0030 ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/              @!P1 BRA 0x0010 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0x00b0;
"""


def test_the_hottest_loop_is_found_and_bounded():
    pytest.importorskip("triton")
    from benchmarks import _ptx, roofline

    lines = _ptx._instructions(SASS)
    assert len(lines) == 12
    loop = _ptx._loop(_ptx._hottest(_ptx._innermost(lines)), warps=8)
    assert loop == _ptx.Loop(
        instructions=5, special=1, bytes=18, tensor_flops=2 * 2 * 64 * 128 * 16
    )
    straight = [line for line in lines if line[1] != "BRA"]
    assert not _ptx._innermost(straight)
    assert _ptx._loop([opcode for _, opcode, _ in straight], warps=4).bytes == 16 + 16 + 2 + 16

    kernel = _ptx.Usage("kernel", 256, *[0] * 13, loop)
    bounds = roofline.estimate(kernel, 90)
    assert bounds.issue == 5 * 8 / 4
    assert bounds.special == 256 / 16
    # 132 multiprocessors at 1.755 GHz, 989 TFLOP/s, 4.8 TB/s: 4269 flops, 20.7 bytes a cycle.
    assert bounds.tensor == pytest.approx(2 * 2 * 64 * 128 * 16 / 4269, rel=1e-3)
    assert bounds.memory == pytest.approx(256 * 18 / 20.72, rel=1e-3)
    assert bounds.bound == "memory"
    assert bounds.memory_share == 1
