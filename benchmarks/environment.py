"""Where numbers come from: enough to repeat a run, nothing about who ran it."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastseq

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device, arguments: list[str]) -> dict[str, Any]:
    """The environment block of a results file."""
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "fastseq": fastseq.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "backends": fastseq.backends(),
    }
    for package in ("triton", "liger-kernel", "quack-kernels", "flashrnn"):
        result[package] = _version(package)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
        query = "driver_version,clocks.max.sm,clocks.max.mem,clocks.sm,clocks.mem,power.limit"
        line = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        if line:
            values = [value.strip() for value in line.splitlines()[0].split(",")]
            result["gpu"].update(zip(query.split(","), values, strict=False))
    return result


#: What two results must have in common to stand in one file.
IDENTITY = ("device", "commit", "torch", "python", "fastseq")


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
