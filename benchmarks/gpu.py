"""``python -m benchmarks.gpu``: everything worth doing with a GPU that is at hand for ten minutes.

Builds in place, verifies every kernel, runs the GPU tests, compute-sanitizer and the benchmarks,
each in a process of its own with a time limit: what fails or hangs takes nothing else with it. Each
step saves as it goes; the folder holds at most eight small files. ``--device cpu`` stands in for a
GPU, to try all of this without one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
#: In this order; the baselines, where the others stand, only when asked for.
STEPS = ("build", "verify", "tests", "sanitizer", "baselines", "suite")
DEFAULT = tuple(step for step in STEPS if step != "baselines")
#: The part of the time left that a step may take; the suite plans with what remains.
_SHARES = {
    "build": 0.5,
    "verify": 0.3,
    "tests": 0.3,
    "sanitizer": 0.15,
    "baselines": 0.6,
    "suite": 1.0,
}
#: Between a polite end and a hard one, and for the suite's tables and plots.
_GRACE = 15.0
_LOG_BYTES = 2**20
#: setup.py without pyproject.toml, which setuptools before 77 rejects for its licence's form.
_BUILD = (
    "import runpy, sys; from setuptools.config import pyprojecttoml as p; "
    "p.apply_configuration = lambda distribution, *_, **__: distribution; "
    "sys.argv = ['setup.py', 'build_ext', '--inplace']; "
    "runpy.run_path('setup.py', run_name='__main__')"
)


@dataclass
class Step:
    """What came of one part: ``passed``, ``failed``, ``out of time`` or ``left out``."""

    name: str
    command: str = ""
    outcome: str = "left out"
    status: int | None = None
    seconds: float = 0.0
    remark: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen steps; 0 when none failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - set(STEPS))
    if unknown:
        parser.error(f"--parts {', '.join(unknown)}: expected some of {', '.join(STEPS)}")
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")
    end = time.monotonic() + options.budget
    steps: list[Step] = []
    machine = _machine()
    for name in STEPS:
        if name in options.parts:
            try:
                step = _run(name, options.device, out, end)
            except Exception as error:  # nothing here may cost the steps that follow
                step = Step(name, outcome="failed", remark=f"{type(error).__name__}: {error}")
            steps.append(step)
            remark = f": {step.remark}" if step.remark else ""
            print(f"{name}: {step.outcome} after {step.seconds:.0f} s{remark}", flush=True)
            summary = {
                "device": options.device,
                "machine": machine,
                "steps": [asdict(step) for step in steps],
            }
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
            _shorten(out / "log.txt")
    print(f"in {options.out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 1 if any(step.outcome in ("failed", "out of time") for step in steps) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds for all steps, 500")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument(
        "--parts",
        type=lambda text: [part for part in text.split(",") if part],
        default=list(DEFAULT),
        help=f"of {','.join(STEPS)}; default {','.join(DEFAULT)}",
    )
    return parser


def _machine() -> dict[str, str]:
    """What is installed, without importing any of it."""
    names = ("torch", "triton", "numpy", "setuptools", "pytest", "rich", "matplotlib")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found["gpu"] = _answer(query) or "none answers"
    found["nvcc"] = _answer(["nvcc", "--version"]).rpartition("release ")[2] or "not found"
    return found


def _answer(command: Sequence[str]) -> str:
    """The first line with content that a command prints last, or nothing."""
    environment = _environment()
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    wanted = [line for line in lines if "release " in line] or lines
    return wanted[0] if wanted and done.returncode == 0 else ""


def _environment() -> dict[str, str]:
    """This process's, with the CUDA toolkit in its usual place on the path."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    tools = [f"{home}/bin" for home in homes if home and Path(home, "bin").is_dir()]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *tools])
    root = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": root,
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "140",
    }


def _run(name: str, device: str, out: Path, end: float) -> Step:
    left = max(1.0, (end - time.monotonic() - _GRACE) * _SHARES[name])
    command, remark = _command(name, device, out, left)
    step = Step(name, " ".join(command).replace(str(out), "OUT").replace(PYTHON, "python"))
    step.remark = remark
    if not command:
        return step
    started = time.monotonic()
    with (out / "log.txt").open("a") as log:
        log.write(f"\n=== {step.command}\n")
        log.flush()
        try:
            status, in_time = _limited(command, log.fileno(), left)
        except OSError as error:
            status, in_time, step.remark = 127, True, str(error)
    step.status, step.seconds = status, time.monotonic() - started
    passed = status == 0 or (name == "tests" and status == 5)  # 5: pytest found no test to run
    step.outcome = "passed" if passed else "failed" if in_time else "out of time"
    if name == "baselines":
        _keep_one_file(out)
    return step


def _limited(command: Sequence[str], log: int, seconds: float) -> tuple[int, bool]:
    """Run a command; after so many seconds interrupt it, then kill it and all it started."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=log, env=_environment(), start_new_session=True
    )
    try:
        return process.wait(seconds), True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    except BaseException:  # interrupted: the command, in a session of its own, would live on
        os.killpg(process.pid, signal.SIGKILL)
        raise
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, False


def _command(name: str, device: str, out: Path, seconds: float) -> tuple[list[str], str]:
    """The command of a step, or none and the reason."""
    verify = [PYTHON, "-m", "fastseq", "verify", "--device", device]
    if name == "build":
        native = ["env", f"FASTSEQ_CUDA_ARCHS={_architecture()}"] if _architecture() else []
        return [*native, PYTHON, "-c", _BUILD], ""
    if name == "verify":  # every operator on every backend; all the cases are the tests' business
        return [*verify, "--quick", "--json", str(out / "verify.json")], ""
    if name == "tests":
        if importlib.util.find_spec("pytest") is None:
            return verify, "pytest is not installed: all of verify's cases instead"
        options = ["-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
        return [PYTHON, "-m", "pytest", *_gpu_tests(), *options], ""
    if name == "sanitizer":
        tool = shutil.which("compute-sanitizer", path=_environment()["PATH"])
        if device != "cuda" or tool is None:
            return [], "needs a GPU" if tool else "compute-sanitizer is not installed"
        memcheck = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
        return [*memcheck, *verify, "--quick", "--backend", "cuda", "--dtype", "fp32"], ""
    measure = [PYTHON, "-m", "benchmarks", "--device", device]
    # A seventh for imports, the last point, tables and plots.
    limit = ["--time-budget", f"{max(1.0, 0.85 * seconds - _GRACE):.0f}", "--out"]
    if name == "baselines":
        suite = ["--suite", "baselines" if device == "cuda" else "smoke", "--plots", "none"]
        wanted = ["--dtype", "bf16,fp32,fp16", "--mode", "inference,fwd+bwd"]
        policy = ["--memory", "hot"] if device == "cuda" else ["--providers", "torch"]
        return [*measure, *suite, *wanted, *policy, *limit, str(out / "baselines")], ""
    suite = ["--suite", "gpu" if device == "cuda" else "smoke", "--plots", "png"]
    modes = ["--mode", "inference,bwd,fwd+bwd"] if device == "cuda" else []
    return [*measure, *suite, *modes, *limit, str(out)], ""


def _gpu_tests() -> list[str]:
    """The files with tests for a GPU; others may need what is not installed here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [path for path in files if "pytest.mark.gpu" in path.read_text()]
    return [str(path.relative_to(ROOT)) for path in marked]


def _keep_one_file(out: Path) -> None:
    """Of the baselines' folder the results alone, as ``baselines.json``."""
    found = out / "baselines" / "results.json"
    if found.exists():
        os.replace(found, out / "baselines.json")
    shutil.rmtree(out / "baselines", ignore_errors=True)


def _shorten(log: Path) -> None:
    """Beginning and end of a log that got long."""
    content = log.read_bytes()
    if len(content) > _LOG_BYTES:
        half = _LOG_BYTES // 2
        log.write_bytes(content[:half] + b"\n[...]\n" + content[-half:])


def _architecture() -> str:
    """This GPU's, as nvcc has it ("90a"), for which alone the kernels build in a third of the time;
    empty where none answers."""
    answer = _answer(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    name = answer.replace(".", "")
    return f"{name}a" if name == "90" else name if name.isdigit() else ""


if __name__ == "__main__":
    sys.exit(main())
