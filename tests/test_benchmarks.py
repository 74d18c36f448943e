"""The benchmark harness: it must time what is right, refuse what is wrong, and see what moved."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import codegen, compare, gpu, memory, overhead, plots, report
from benchmarks.__main__ import _parser as command_parser
from benchmarks.ops import FAMILIES, benchmarks_of
from benchmarks.points import even_order, sweep
from benchmarks.registry import Benchmark, Cost, Provider
from benchmarks.results import Results, ResultsError, load
from benchmarks.runner import Runner, Settings
from benchmarks.statistics import noise, ratio, summarise
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


def _run(
    benchmarks, *, results=None, budget=None, modes=("inference",), providers=None, dtypes=("fp32",)
):
    settings = Settings(
        CPU, modes, [1], "smoke", providers or ["fastseq"], budget, group_seconds=0.02
    )
    results = results or Results(
        {"device": "a CPU", "torch": "2", "commit": "c", "date": "2026"},
        ceilings={"1": {"copy": 1e10, "matmul": {"fp32": 1e11}}},
    )
    Runner(settings, results).run(sweep(benchmarks, "smoke", "cpu", ["fp32"], ["reused"]))
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


@pytest.mark.parametrize("mode", ["inference", "fwd", "bwd", "fwd+bwd"])
def test_every_mode_of_every_registered_operator_runs(mode):
    assert FAMILIES == TESTED_FAMILIES
    for benchmark in benchmarks_of():
        if mode not in benchmark.modes:
            continue
        first = dataclasses.replace(benchmark, sweeps={"smoke": benchmark.sweeps["smoke"][:1]})
        rows = {row.provider: row for row in _run([first], modes=(mode,)).rows}
        assert rows["fastseq"].failure is None, rows["fastseq"].failure
        assert rows["fastseq"].speedup > 0
        assert rows["fastseq"].backend
        assert rows["torch"].minimal_bytes > 0


# --- timing --------------------------------------------------------------------------------------


def test_a_known_ratio_is_found():
    results = _run([_benchmark(ours=_slow(0.004), torchs=_slow(0.008))])
    row = next(row for row in results.rows if row.provider == "fastseq")
    assert 4 < row.milliseconds < 8
    assert row.speedup == pytest.approx(2, rel=0.2)
    assert row.p20 <= row.milliseconds <= row.p80
    assert row.rounds >= 7


def test_pairs_cancel_what_slows_both():
    slow_spell = torch.tensor([1.0, 1, 1, 5, 5, 5, 5]).numpy()
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


def test_peak_memory_of_a_cpu_call():
    source = torch.ones(2**18)
    peak = memory.peak_bytes(lambda: (source + 1) + 1, CPU)
    assert 2 * source.nbytes <= peak < 2.1 * source.nbytes


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


def test_any_first_points_are_spread():
    points = sweep(benchmarks_of(["layer_norm"]), "cpu", "cpu", ["fp32", "bf16"], ["reused"])[0]
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


def test_a_planted_slowdown_is_seen(tmp_path, capsys):
    for name, seconds in (("old", 0.004), ("same", 0.004), ("slower", 0.0054)):
        benchmark = _benchmark(ours=_slow(seconds), torchs=_slow(0.008))
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


def test_every_step_has_a_command_on_both_devices(tmp_path):
    for device in ("cpu", "cuda"):
        for name in gpu.STEPS:
            command, reason = gpu._command(name, device, tmp_path, 100.0)
            assert command or reason
    suite, _ = gpu._command("suite", "cuda", tmp_path, 100.0)
    options = command_parser().parse_args(suite[3:])
    assert (options.device, options.suite, options.time_budget) == ("cuda", "gpu", 85.0)


# --- code generation -----------------------------------------------------------------------------


def test_registers_bound_the_resident_threads():
    assert [codegen.resident_threads(n) for n in (32, 33, 64, 128, 255)] == [
        2048,
        1632,
        1024,
        512,
        256,
    ]


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


def test_options_of_the_other_tree_are_this_ones():
    given = ["layer_norm", "--base", "HEAD~1", "--mode", "fwd", "--out=here", "--ops", "rms_norm"]
    assert command._without(given, "--base", "--ops", "--out") == ["layer_norm", "--mode", "fwd"]


def test_what_is_counted_is_a_call():
    call = overhead.call_of("layer_norm", "fastseq")
    assert call()["output"].shape == (4, 64)
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
