"""``fastseq doctor``: what is installed, built and available, and what to do about the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from .. import __version__, _extension, functional
from ..backends import backends, current_backend, recorded
from ..explain import call_name
from ._machine import device_name

#: Environment variables that change what fastseq does.
VARIABLES = (
    "FASTSEQ_BACKEND",
    "FASTSEQ_CPP",
    "FASTSEQ_CUDA",
    "FASTSEQ_CUDA_ARCHS",
    "FASTSEQ_AUTOTUNE",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "OMP_NUM_THREADS",
)


def run(argv: list[str]) -> int:
    """The command: 0 when fastseq works here, on whatever backend, and 1 when it does not."""
    parser = argparse.ArgumentParser(
        prog="fastseq doctor",
        description="Say what is installed, what was built, which backends can run here and why "
        "others cannot, and what to do about it. Fails only if fastseq itself does not work.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    report = examine()
    print(json.dumps(report, indent=1) if options.json else _text(report))
    return 0 if all(check["works"] for check in report["checks"]) else 1


def examine() -> dict[str, Any]:
    """Everything the command says.

    Returns:
        What can be written as JSON: ``installed``, ``extension``, ``backends``, ``gpus``,
        ``environment`` (variables that are set), ``checks`` (a norm and its gradient, run on each
        device) and ``advice`` (sentences).
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    report: dict[str, Any] = {
        "installed": {
            "fastseq": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "CUDA of torch": torch.version.cuda,
            "CUDA driver": _output(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
            ),
            "nvcc": _output("nvcc", "--version"),
            "C++ compiler": _output(os.environ.get("CXX", "g++"), "--version"),
            "platform": f"{platform.system()} {platform.machine()}, {device_name(devices[0])}",
        },
        "extension": _built(),
        "backends": backends(),
        "forced backend": current_backend(),
        "gpus": [_gpu(device) for device in devices[1:]],
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "checks": [_check(device) for device in devices],
    }
    report["advice"] = _advice(report)
    return report


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(program: str, *arguments: str) -> str | None:
    """The line of a program's output that holds its version, or None if it is not there."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        result = subprocess.run(
            [path, *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    return next((line for line in lines if "release" in line), lines[0] if lines else None)


def _built() -> dict[str, Any]:
    reason = _extension.UNAVAILABLE
    if reason:
        return {"loaded": False, "reason": reason}
    return {
        "loaded": True,
        "CPU instruction set": _extension.cpu_instruction_set(),
        "CUDA architectures": str(torch.ops.fastseq_C.cuda_architectures()) or None,
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }


def _check(device: torch.device) -> dict[str, Any]:
    """Run layer_norm and its gradient on the device, and compare with torch's."""
    result: dict[str, Any] = {"device": str(device), "works": False}
    try:
        x = torch.arange(3 * 65.0, device=device).view(3, 65).sin().requires_grad_()
        with recorded() as calls:
            ours = functional.layer_norm(x, (65,))
            ours.pow(3).sum().backward()
        result["ran on"] = {call_name(call.op): call.backend for call in calls}
        gradient, x.grad = x.grad, None
        theirs = torch.nn.functional.layer_norm(x, (65,))
        theirs.pow(3).sum().backward()
        torch.testing.assert_close((ours, gradient), (theirs, x.grad), rtol=1e-4, atol=1e-5)
    except Exception as error:  # whatever is broken, the rest of the report matters the more
        result["error"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    else:
        result["works"] = True
    return result


def _advice(report: dict[str, Any]) -> list[str]:
    installed, extension, gpus = report["installed"], report["extension"], report["gpus"]
    again = (
        "then install fastseq again (pip install --no-build-isolation --force-reinstall --no-deps)"
    )
    advice = []
    if report["environment"].get("FASTSEQ_CPP") == "0":
        advice.append("FASTSEQ_CPP=0 switches the compiled kernels off: unset it.")
    elif not extension["loaded"]:
        if installed["C++ compiler"] is None:
            advice.append(f"No C++ compiler, so no compiled kernels: install g++, {again}.")
        else:
            advice.append(f"The compiled kernels are missing ({extension['reason']}): {again[5:]}.")
    elif gpus and extension["CUDA architectures"] is None:
        advice.append(f"The compiled kernels have no CUDA part: put nvcc on PATH, {again}.")
    if installed["CUDA driver"] and not torch.cuda.is_available():
        hidden = report["environment"].get("CUDA_VISIBLE_DEVICES")
        if torch.version.cuda is None:
            advice.append("This machine has a GPU but torch is a CPU build: install a CUDA build.")
        elif hidden is not None:
            advice.append(f"CUDA_VISIBLE_DEVICES={hidden!r} may be what hides the GPU from torch.")
        else:
            advice.append("torch cannot use the GPU: compare the CUDA driver with torch's CUDA.")
    if installed["triton"] is None:
        advice.append("Triton is not installed, most GPU kernels need it: pip install triton.")
    for gpu in gpus:
        if int(gpu["capability"].removeprefix("sm_")) < 80:
            advice.append(
                f"{gpu['name']} is {gpu['capability']}: fastseq's GPU kernels need sm_80."
            )
    if report["forced backend"] != "auto":
        advice.append(
            f"FASTSEQ_BACKEND forces {report['forced backend']!r}, which raises where it cannot "
            "serve: unset it unless you mean that."
        )
    for check in report["checks"]:
        if not check["works"]:
            advice.append(
                f"layer_norm failed on {check['device']} ({check['error']}): `fastseq verify` says "
                "which kernel is wrong, use_backend('torch') goes around it."
            )
    return advice


def _text(report: dict[str, Any]) -> str:
    lines: list[str] = []

    def section(title: str, entries: dict[str, Any]) -> None:
        lines.append(title)
        width = max(map(len, entries), default=0)
        for name, value in entries.items():
            lines.append(f"  {name:<{width}}  {'-' if value is None else value}")

    section("Installed", report["installed"])
    section("Compiled kernels (fastseq._C)", report["extension"])
    section("Backends", report["backends"] | {"in use": report["forced backend"]})
    gpus = {
        f"cuda:{index}": ", ".join(f"{name} {value}" for name, value in gpu.items())
        for index, gpu in enumerate(report["gpus"])
    }
    section("GPUs", gpus or {"none": "torch sees no CUDA device"})
    if report["environment"]:
        section("Environment", report["environment"])
    checks = {
        check["device"]: "works: " + ", ".join(f"{c} on {b}" for c, b in check["ran on"].items())
        if check["works"]
        else "FAILS: " + check["error"]
        for check in report["checks"]
    }
    section("layer_norm and its gradient", checks)
    lines.append("What to do")
    lines += [f"  * {sentence}" for sentence in report["advice"] or ["Nothing: all is well."]]
    return "\n".join(lines)
