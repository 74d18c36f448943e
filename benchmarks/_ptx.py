"""Compiles Triton kernels for GPUs that are not there, for their machine code to be read.

A launcher is called on CPU tensors while a stand-in for the driver names the architecture and every
launch stops after compiling. So exactly what a GPU would run is measured, with the specialisations
and options of the real call, not a list of signatures kept beside it.

It cannot share a process with the interpreter: ``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastseq.kernels import common

from . import _sass
from ._sass import Usage

#: Architectures, with the multiprocessors of a chip of each: A100, H200, B200.
ARCHITECTURES = {80: 108, 90: 132, 100: 148}


class _Driver:
    """As much of a driver as compiling asks for. The architecture is the device's number too, so
    that a kernel's cache per device keeps them apart."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def _compiling_for(architecture: int) -> Iterator[list[Any]]:
    """Collects the kernels launched inside the block, compiled for ``architecture`` and not run."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    previous_driver, previous_device = driver._active, common.CPU_DEVICE
    driver.set_active(_Driver(architecture))
    common.CPU_DEVICE = common.Device(architecture, ARCHITECTURES[architecture])
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        common.CPU_DEVICE = previous_device
        driver._active = previous_driver


def measure(launch: Callable[[], None], architecture: int) -> list[Usage]:
    """The usage of every kernel that ``launch`` launches, in order.

    Args:
        launch: calls a launcher on CPU tensors; whether they are initialised does not matter.
        architecture: 80, 90 or 100.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter's kernels cannot be compiled")
    with _compiling_for(architecture) as compiled:
        launch()
    return [_usage(kernel) for kernel in compiled]


_known: dict[str, Usage] = {}


def _usage(kernel: Any) -> Usage:
    if kernel.hash not in _known:
        _known[kernel.hash] = _read(kernel)
    return _known[kernel.hash]


def _read(kernel: Any) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (code,) = _sass.kernels(Path(file.name))
    metadata = kernel.metadata
    return code.usage(metadata.name, 32 * metadata.num_warps, metadata.shared)
