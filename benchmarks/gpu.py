"""``python -m benchmarks.gpu``: everything worth doing with a GPU that is at hand for ten minutes.

Builds in place, verifies every kernel, runs the GPU tests, compute-sanitizer and the benchmarks,
each in a process of its own with a time limit: what fails or hangs takes nothing else with it. Each
step saves as it goes; the folder holds at most eight small files. ``--device cpu`` stands in for a
GPU, to try all of this without one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
STEPS = ("build", "verify", "tests", "sanitizer", "suite")
#: The part of the time left that a step may take; the suite plans with what remains.
_SHARES = {"build": 0.5, "verify": 0.3, "tests": 0.3, "sanitizer": 0.2, "suite": 1.0}
#: Between a polite end and a hard one, and for the suite's tables and plots.
_GRACE = 15.0


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
    options = _parser().parse_args(arguments)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")
    end = time.monotonic() + options.budget
    steps: list[Step] = []
    for name in STEPS:
        if name in options.parts:
            step = _run(name, options.device, out, end)
            steps.append(step)
            remark = f": {step.remark}" if step.remark else ""
            print(f"{name}: {step.outcome} after {step.seconds:.0f} s{remark}", flush=True)
            summary = {"device": options.device, "steps": [asdict(step) for step in steps]}
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"in {options.out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 1 if any(step.outcome in ("failed", "out of time") for step in steps) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds for all steps, 500")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        default=list(STEPS),
        help=f"of {','.join(STEPS)}; default all",
    )
    return parser


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
    return step


def _limited(command: Sequence[str], log: int, seconds: float) -> tuple[int, bool]:
    """Run a command; after so many seconds interrupt it, then kill it and all it started."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "140"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
    )
    try:
        return process.wait(seconds), True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, False


def _command(name: str, device: str, out: Path, seconds: float) -> tuple[list[str], str]:
    """The command of a step, or none and the reason."""
    if name == "build":
        native = ["env", f"FASTSEQ_CUDA_ARCHS={_architecture()}"] if _architecture() else []
        return [*native, PYTHON, "setup.py", "build_ext", "--inplace"], ""
    if name == "verify":
        quick = ["--quick"] if device == "cpu" else []
        verify = [PYTHON, "-m", "fastseq", "verify", "--device", device, *quick]
        return [*verify, "--json", str(out / "verify.json")], ""
    if name == "tests":
        return [PYTHON, "-m", "pytest", "tests", "-m", "gpu", "-q", "-p", "no:cacheprovider"], ""
    if name == "sanitizer":
        tool = shutil.which("compute-sanitizer")
        if device != "cuda" or tool is None:
            return [], "needs a GPU" if tool else "compute-sanitizer is not installed"
        quick = ["verify", "--device", "cuda", "--quick", "--backend", "cuda", "--dtype", "fp32"]
        memcheck = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
        return [*memcheck, PYTHON, "-m", "fastseq", *quick], ""
    suite = ["--suite", "gpu" if device == "cuda" else "smoke", "--plots", "png"]
    limits = ["--time-budget", f"{max(1.0, seconds - _GRACE):.0f}", "--out", str(out)]
    return [PYTHON, "-m", "benchmarks", "--device", device, *suite, *limits], ""


def _architecture() -> str:
    """This GPU's, as nvcc has it ("90a"), for which alone the kernels build in a third of the time;
    empty where none answers."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return ""
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60).stdout
    name = answer.split("\n", 1)[0].strip().replace(".", "")
    return f"{name}a" if name == "90" else name if name.isdigit() else ""


if __name__ == "__main__":
    sys.exit(main())
