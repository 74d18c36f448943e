"""The benchmark of barriers and launches, without a GPU: its kernels wait for what they say they
wait for, its loops are there in the machine code, and what goes wrong is told in a line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import _nvcc, _sass, latency, report, runner
from benchmarks.console import Console
from benchmarks.results import Results

sys.path.insert(0, str(Path(__file__).parent))
from simt import host as simt_host

HEADER = latency.SOURCE.with_suffix(".cuh").read_text()
PATTERNS = re.findall(r'^    \{"([^"]+)", (\w+), (true|false)', HEADER, re.MULTILINE)
NAMES = [name for name, _, _ in PATTERNS]
LARGE = [(64, 8, 8), (32, 32, 16)]


def _run(races: bool, sizes: list[tuple[int, int, int]], steps: int) -> None:
    if simt_host.compiler() is None:
        pytest.skip("no C++ compiler")
    with simt_host.Host(simt_host.build("latency", races)) as host:
        for number, (name, _, clusters) in enumerate(PATTERNS):
            for threads, blocks, cluster in sizes:
                memory = np.zeros(2, np.uint32)
                size = [threads, blocks, cluster if clusters == "true" else 1]
                error = host.call("run", [memory], [0, 0, number, *size, steps], seed=number)
                assert error is None, name
                assert memory[1] == steps, (name, size)


def test_every_kernel_does_its_steps() -> None:
    assert {"flag barrier", "cluster barrier", "round trip", "launch"} <= set(NAMES)
    _run(False, [(64, 2, 2)], 512)


@pytest.mark.slow
def test_every_kernel_does_its_steps_in_large_clusters_in_order() -> None:
    _run(True, LARGE, 256)


@pytest.mark.slow
@pytest.mark.skipif(_nvcc.nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
def test_the_loops_are_in_the_machine_code(arch: str) -> None:
    """What each kernel waits by stands in one of its loops; on sm_80 what needs a cluster traps."""
    waits = {
        "block_barrier": {"BAR"},
        "flag_barrier": {"LD"},
        "cooperative_sync": {"BAR"},
    }
    if arch != "sm_80":
        waits |= {
            "cluster_barriers": {"UCGABAR_ARV", "UCGABAR_WAIT"},
            "remote_load": {"LD"},
            "round_trip": {"STAS", "SYNCS"},
            "exchange": {"STAS"},
        }
    codes = _nvcc.report(latency.SOURCE, arch)
    assert {*waits, "nothing"} <= set(codes)
    for name, wanted in waits.items():
        loops = _sass.loops(codes[name].lines)
        found = [{opcode.split(".")[0] for opcode in loop} for loop in loops]
        assert any(wanted <= opcodes for opcodes in found), (name, found)
    assert not _sass.loops(codes["nothing"].lines)


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit whose nvcc makes a program of a script of ours."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "program"
    compiler = tmp_path / "bin" / "nvcc"
    compiler.write_text(
        f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp {program} $2 || exit 1\n'
    )
    compiler.chmod(0o755)
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(latency, "_search_path", lambda: f"{tmp_path}/bin:/usr/bin:/bin")
    return program


LINES = """{"what": "cluster barrier", "threads": 512, "blocks": 8, "cluster": 8, "nanoseconds": 25}
{"what": "cluster barrier", "threads": 512, "blocks": 16, "cluster": 16, "error": "no room"}
{"what": "flag barrier", "threads": 512, "blocks": 132, "cluster": 1, "nanoseconds": 990}
{"what": "flag barr"""


def test_what_the_program_prints_is_read_as_far_as_it_goes(toolkit: Path) -> None:
    toolkit.write_text(f"#!/bin/sh\ncat << 'end'\n{LINES}\nend\n")
    toolkit.chmod(0o755)
    lines = latency.measure("90a")
    assert [line.get("nanoseconds") for line in lines] == [25, None, 990, None]
    assert "not a line of JSON" in lines[-1]["error"]
    summary = latency.summary(lines)
    assert "cluster barrier (cluster of 8) 25 ns" in summary
    assert "flag barrier (132 blocks of 512) 990 ns" in summary
    assert "no room" in summary


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (None, "nvcc:"),
        ("echo broken >&2; exit 7", "latency: broken"),
        ("sleep 60", "timed out"),
        ("exit 0", "it printed nothing"),
    ],
)
def test_what_goes_wrong_is_a_line(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, complaint: str
) -> None:
    monkeypatch.setattr(latency, "LIMITS", (20.0, 0.5 if script == "sleep 60" else 20.0))
    if script is not None:
        toolkit.write_text(f"#!/bin/sh\n{script}\n")
        toolkit.chmod(0o755)
    (line,) = latency.measure("90a")
    assert complaint in line["error"]


def test_no_compiler_is_a_line_and_architectures_are_nvccs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_search_path", lambda: "/nowhere")
    assert latency.measure("90a") == [{"what": "latency", "error": "no nvcc"}]
    assert latency.architecture_of((9, 0)) == "90a"
    assert latency.architecture_of((10, 0)) == "100"


@pytest.mark.parametrize("suite", ["gpu", "baselines", "smoke"])
def test_a_run_on_a_gpu_shows_them_beside_its_ceilings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], suite: str
) -> None:
    asked = []
    line = {"what": "flag barrier", "threads": 512, "blocks": 132, "cluster": 1, "nanoseconds": 990}
    monkeypatch.setattr(
        latency, "measure", lambda architecture: asked.append(architecture) or [line]
    )
    found = {"copy": 4e12, "matmul": {"bf16": 8e14}, "launch": 2e-6}
    monkeypatch.setattr(runner.ceilings, "measure", lambda *_: dict(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    results = Results({"device": "a GPU", "torch": "2", "commit": "c", "gpu": "a GPU"})
    settings = runner.Settings(torch.device("cuda"), ["inference"], [1], suite)
    runner.Runner(settings, results)._measure_ceilings([[SimpleNamespace(dtype="bf16")]])
    report.show_environment(results, Console(width=200))
    printed = capsys.readouterr().out
    assert "empty launch 2.00 us" in printed
    assert asked == ([] if suite == "smoke" else ["90a"])
    assert ("waits: flag barrier (132 blocks of 512) 990 ns" in printed) == (suite != "smoke")
