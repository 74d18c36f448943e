"""How long a GPU waits: barriers of a block, a cluster and a grid, shared memory of other blocks,
launches. The floor under a step of a persistent recurrence.

The program (``benchmarks/cuda/latency.cu``, whose kernels wait by the words of our own) is compiled
when it is wanted, for the GPU at hand, by nvcc. Whatever is missing becomes a line with an error.
``python -m benchmarks.latency`` prints the lines.

Chips differ: grids have a cooperative barrier from Pascal on, and our flags from Ampere; clusters
and shared memory of other blocks came with Hopper, 8 blocks anywhere and 16 where a chip has room
for them (H100, H200, B200; not the small Blackwells).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._nvcc import FLAGS

SOURCE = Path(__file__).resolve().parent / "cuda" / "latency.cu"
#: Of nvcc, and of the program, in seconds.
LIMITS = (60.0, 20.0)


def measure(architecture: str) -> list[dict[str, Any]]:
    """A line for every pattern and size: ``what``, ``threads``, ``blocks``, ``cluster``, and
    ``nanoseconds`` of a step or ``error``.

    Args:
        architecture: as nvcc has it, "90a".
    """
    compiler = shutil.which("nvcc", path=_search_path())
    if compiler is None:
        return [_error("no nvcc")]
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "latency")
        try:
            _run([compiler, *FLAGS, target, "-o", program, str(SOURCE)], LIMITS[0])
            return lines_of(_run([program], LIMITS[1]))
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            return [_error(str(error))]


def lines_of(text: str) -> list[dict[str, Any]]:
    """What the program printed, of which any line may be broken off."""
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            lines.append(_error(f"not a line of JSON: {line[:80]}"))
    return lines or [_error("it printed nothing")]


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """What a step of a recurrence waits for, in a line: of each pattern its largest size."""
    best: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "nanoseconds" in line:
            size = (line["threads"], line["cluster"], line["blocks"])
            name = line["what"]
            known = best.get(name)
            if known is None or size > (known["threads"], known["cluster"], known["blocks"]):
                best[name] = line
    parts = [f"{name} ({_size(line)}) {line['nanoseconds']:.0f} ns" for name, line in best.items()]
    errors = {line["error"] for line in lines if "error" in line}
    return ", ".join([*parts, *sorted(errors)])


def _size(line: dict[str, Any]) -> str:
    blocks = f"{line['blocks']} blocks of {line['threads']}"
    return f"cluster of {line['cluster']}" if line["cluster"] > 1 else blocks


def _error(text: str) -> dict[str, Any]:
    return {"what": "latency", "error": text.strip()[-300:]}


def _run(command: list[str], seconds: float) -> str:
    """What it printed; the program itself exits with 1 after a line that says why."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
        env={**os.environ, "PATH": _search_path()},
    )
    if done.returncode and not done.stdout:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr or done.returncode}")
    return done.stdout


def _search_path() -> str:
    """With the CUDA toolkit in its usual place."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [f"{home}/bin" for home in homes if home]
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])


def main() -> int:
    """Print the lines; 1 where there is nothing but errors."""
    import torch

    if not torch.cuda.is_available():
        print(json.dumps(_error("torch sees no CUDA device")))
        return 1
    lines = measure(architecture_of(torch.cuda.get_device_capability()))
    for line in lines:
        print(json.dumps(line))
    return 0 if any("nanoseconds" in line for line in lines) else 1


def architecture_of(capability: tuple[int, int]) -> str:
    """As nvcc has it: Hopper's own instructions need the "a"."""
    name = f"{capability[0]}{capability[1]}"
    return f"{name}a" if name == "90" else name


if __name__ == "__main__":
    sys.exit(main())
