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
from bisect import bisect_left
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
class Loop:
    """One pass of a kernel's hottest loop, or of a whole kernel that has none: per thread, but for
    the products, which are a program's."""

    instructions: int
    special: int  # exp2, log2, reciprocals, ...: a quarter as fast as the rest or slower
    bytes: int  # to and from global memory
    tensor_flops: int  # in 16 bits; products in TF32 count twice, for they take twice as long


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes, and how it reaches memory (static instruction counts)."""

    kernel: str
    threads: int
    registers: int  # per thread
    local_bytes: int  # stack and spilled registers, per thread
    local_accesses: int
    loop_local: int  # of these, the most that one innermost loop has
    shared_bytes: int
    barriers: int
    instructions: int
    wide_loads: int  # 16 bytes a thread, into registers or straight into shared memory
    loads: int
    bulk_loads: int  # tiles by the copy engine (TMA), through tensor descriptors
    wide_stores: int
    stores: int
    tensor_cores: int  # matrix products: of a warp, or of a group of warps (Hopper, Blackwell)
    loop: Loop


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
    lines = _instructions(code)
    opcodes = [opcode for _, opcode, _ in lines]
    loops = _innermost(lines)
    return Usage(
        kernel=kernel.metadata.name,
        threads=32 * kernel.metadata.num_warps,
        registers=_resource(resources, "REG"),
        local_bytes=_resource(resources, "STACK") + _resource(resources, "LOCAL"),
        local_accesses=_count(opcodes, _LOCAL),
        loop_local=max((_count(loop, _LOCAL) for loop in loops), default=0),
        shared_bytes=kernel.metadata.shared,
        barriers=_count(opcodes, r"BAR\b"),
        instructions=len(opcodes),
        wide_loads=_count(opcodes, r"(LDG|LDGSTS)\b.*\.128"),
        loads=_count(opcodes, r"(LDG|LDGSTS)\b"),
        bulk_loads=_count(opcodes, r"UTMALDG\b"),
        wide_stores=_count(opcodes, r"STG\b.*\.128"),
        stores=_count(opcodes, r"STG\b"),
        tensor_cores=_count(opcodes, _PRODUCT),
        loop=_loop(_hottest(loops or [opcodes]), kernel.metadata.num_warps),
    )


def _instructions(code: str) -> list[tuple[str, str, str]]:
    """(address, opcode, operands) of lines like ``/*0a30*/ @P0 LDG.E.128 R4, [R2.64] ;``."""
    return re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Zx0-9_.]*)([^;]*)", code)


_LOCAL = r"(LDL|STL)\b"
_PRODUCT = r"(HMMA|HGMMA|UTC[A-Z]*MMA)\b"


def _innermost(lines: list[tuple[str, str, str]]) -> list[list[str]]:
    """The opcodes of every loop that has none inside."""
    addresses = [int(address, 16) for address, _, _ in lines]
    opcodes = [opcode for _, opcode, _ in lines]
    spans = []
    for end, (address, opcode, operands) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < int(address, 16):
            spans.append((bisect_left(addresses, int(target[1], 16)), end + 1))
    return [
        opcodes[a:b]
        for a, b in spans
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]


def _hottest(loops: list[list[str]]) -> list[str]:
    """The one with most products, else accesses, else instructions."""
    accesses = r"(LDG|LDGSTS|STG)\b"
    return max(loops, key=lambda o: (_count(o, _PRODUCT), _count(o, accesses), len(o)))


def _loop(opcodes: list[str], warps: int) -> Loop:
    size = 0
    flops = 0
    for opcode in opcodes:
        parts = opcode.split(".")
        if parts[0] in ("LDG", "LDGSTS", "STG"):
            narrow = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
            size += next((narrow[part] for part in parts if part in narrow), 4)
        slow = 2 if "TF32" in parts else 1
        if parts[0] == "HMMA":  # of a warp: HMMA.16816 is [16, 16] times [16, 8]
            flops += 2 * 16 * 8 * int(parts[1][3:]) * warps * slow
        elif parts[0] == "HGMMA":  # of four: HGMMA.64x128x16
            m, n, k = map(int, parts[1].split("x"))
            flops += 2 * m * n * k * (warps // 4) * slow
    return Loop(len(opcodes), _count(opcodes, r"MUFU\b"), size, flops)


def _resource(text: str, name: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump reported no {name}: {text}")
    return int(match[1])


def _count(opcodes: list[str], pattern: str) -> int:
    return sum(1 for opcode in opcodes if re.match(pattern, opcode))
