"""What this machine can do at most, measured in the same run, and what its maker promises."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .timing import CpuTimer, GpuTimer, Timer, Variant

#: Datasheet figures, dense: (bytes/s, fp16 and bf16 matmul FLOP/s, tf32 or fp32 matmul FLOP/s).
#: From NVIDIA's product pages; the first name that is part of the device's is taken.
DATASHEETS: dict[str, tuple[float, float, float]] = {
    "H200": (4.8e12, 989e12, 67e12),
    "H100 PCIe": (2.0e12, 756e12, 51e12),
    "H100": (3.35e12, 989e12, 67e12),
    "A100-SXM4-80GB": (2.039e12, 312e12, 19.5e12),
    "A100": (1.555e12, 312e12, 19.5e12),
    "B200": (8.0e12, 2250e12, 75e12),
}


def measure(device: torch.device, dtypes: dict[str, torch.dtype], seconds: float) -> dict[str, Any]:
    """Copy bandwidth in bytes/s, matmul FLOP/s by dtype, on a GPU the time of an empty launch.

    Args:
        seconds: for each figure.
    """
    timer: Timer = GpuTimer() if device.type == "cuda" else CpuTimer()
    count = 2**28 if device.type == "cuda" else 2**25
    source = torch.empty(count, device=device).fill_(1.0)
    target = torch.empty_like(source).fill_(0.0)
    copying = _best(timer, lambda: target.copy_(source), seconds)
    size = 8192 if device.type == "cuda" else 1024
    matmul = {}
    for name, dtype in dtypes.items():
        left = torch.randn(size, size, device=device).to(dtype)
        right, out = left.clone(), torch.empty_like(left)
        taken = _best(timer, _matmul(left, right, out), seconds)
        matmul[name] = 2 * size**3 / taken
    result: dict[str, Any] = {"copy": 2 * source.nbytes / copying, "matmul": matmul}
    if device.type == "cuda":
        tiny = torch.zeros(1, device=device)
        result["launch"] = _best(timer, lambda: tiny.add_(1.0), seconds)
    return result


def _matmul(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.mm(left, right, out=out)


def _best(timer: Timer, call: Callable[[], object], seconds: float) -> float:
    """The shortest time of a call: a ceiling is what is possible, not what is usual."""
    run = timer.prepare(Variant("ceiling", [call], "auto", False), "hot")
    best = timer.measure(run)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, timer.measure(run))
    torch.set_grad_enabled(True)
    return best / run.calls


def datasheet(device_name: str) -> tuple[float, float, float] | None:
    """The datasheet's figures for a GPU, or None for one that is not listed."""
    for name, figures in DATASHEETS.items():
        if name in device_name:
            return figures
    return None
