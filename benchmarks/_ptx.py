"""Compiles Triton kernels for GPUs that are not there, and reads their machine code.

A launcher is called on CPU tensors while a stand-in for the driver names the architecture and every
launch stops after compiling. So exactly what a GPU would run is measured, with the specialisations
and options of the real call, not a list of signatures kept beside it.

It cannot share a process with the interpreter: ``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastseq.kernels import common

#: Architectures, with the multiprocessors of a chip of each: A100, H200, B200.
ARCHITECTURES = {80: 108, 90: 132, 100: 148}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes, and how it reaches memory (static instruction counts)."""

    kernel: str
    threads: int
    registers: int  # per thread
    local_bytes: int  # stack and spilled registers, per thread
    local_accesses: int
    shared_bytes: int
    barriers: int
    instructions: int
    wide_loads: int  # 16 bytes a thread, into registers or straight into shared memory
    loads: int
    wide_stores: int
    stores: int
    tensor_cores: int  # matrix products: of a warp, or of a group of warps (Hopper, Blackwell)


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


_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _disassemble(*options: str) -> str:
    environment = {**os.environ, "PATH": f"{_TOOLS}:{os.environ.get('PATH', '')}"}
    command = [str(_TOOLS / "cuobjdump"), *options]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


_known: dict[str, Usage] = {}


def _usage(kernel: Any) -> Usage:
    if kernel.hash not in _known:
        _known[kernel.hash] = _read(kernel)
    return _known[kernel.hash]


def _read(kernel: Any) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _disassemble("-res-usage", file.name)
        code = _disassemble("-sass", file.name)
    # One instruction a line: /*0a30*/ @P0 LDG.E.128 R4, desc[UR4][R2.64] ;
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    return Usage(
        kernel=kernel.metadata.name,
        threads=32 * kernel.metadata.num_warps,
        registers=_resource(resources, "REG"),
        local_bytes=_resource(resources, "STACK") + _resource(resources, "LOCAL"),
        local_accesses=_count(opcodes, r"(LDL|STL)\b"),
        shared_bytes=kernel.metadata.shared,
        barriers=_count(opcodes, r"BAR\b"),
        instructions=len(opcodes),
        wide_loads=_count(opcodes, r"(LDG|LDGSTS)\b.*\.128"),
        loads=_count(opcodes, r"(LDG|LDGSTS)\b"),
        wide_stores=_count(opcodes, r"STG\b.*\.128"),
        stores=_count(opcodes, r"STG\b"),
        tensor_cores=_count(opcodes, r"(HMMA|HGMMA|UTC[A-Z]*MMA)\b"),
    )


def _resource(text: str, name: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump reported no {name}: {text}")
    return int(match[1])


def _count(opcodes: list[str], pattern: str) -> int:
    return sum(1 for opcode in opcodes if re.match(pattern, opcode))
