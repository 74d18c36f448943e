"""Reads machine code: what a compiled kernel takes, and how it reaches memory.

For kernels of any origin in a cubin: Triton's (``_ptx.py``) and nvcc's (``_nvcc.py``). The
disassembler is Triton's own or the CUDA toolkit's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from bisect import bisect_left
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


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


@dataclass(frozen=True)
class Code:
    """A kernel of a cubin.

    Attributes:
        threads: the most a block may have, 0 where the kernel does not say.
        shared_bytes: of the declared arrays; a launch may add to them.
        lines: address, opcode and operands of each instruction.
    """

    symbol: str
    registers: int
    local_bytes: int
    shared_bytes: int
    threads: int
    lines: list[tuple[str, str, str]]

    @property
    def opcodes(self) -> frozenset[str]:
        """Without what follows the first full stop."""
        return frozenset(opcode.split(".")[0] for _, opcode, _ in self.lines)

    def usage(self, name: str, threads: int, shared_bytes: int) -> Usage:
        """What it takes in a launch with so many threads and bytes of shared memory a block."""
        opcodes = [opcode for _, opcode, _ in self.lines]
        loops = innermost(self.lines)
        return Usage(
            kernel=name,
            threads=threads,
            registers=self.registers,
            local_bytes=self.local_bytes,
            local_accesses=_count(opcodes, _LOCAL),
            loop_local=max((_count(loop, _LOCAL) for loop in loops), default=0),
            shared_bytes=shared_bytes,
            barriers=_count(opcodes, r"BAR\b"),
            instructions=len(opcodes),
            wide_loads=_count(opcodes, r"(LDG|LDGSTS)\b.*\.128"),
            loads=_count(opcodes, r"(LDG|LDGSTS)\b"),
            bulk_loads=_count(opcodes, r"UTMALDG\b"),
            wide_stores=_count(opcodes, r"STG\b.*\.128"),
            stores=_count(opcodes, r"STG\b"),
            tensor_cores=_count(opcodes, _PRODUCT),
            loop=_loop(_hottest(loops or [opcodes]), threads // 32),
        )


def _tools() -> str:
    """Where cuobjdump and nvdisasm are, as a search path: Triton's, then the toolkit's."""
    triton = find_spec("triton")
    own = [] if triton is None or triton.origin is None else [Path(triton.origin).parent]
    folders = [str(folder / "backends" / "nvidia" / "bin") for folder in own]
    return os.pathsep.join([*folders, os.environ.get("PATH", "")])


def cuobjdump(*options: str, folder: Path | None = None) -> str:
    """What it prints, run in ``folder``."""
    path = _tools()
    tool = shutil.which("cuobjdump", path=path)
    if tool is None:
        raise RuntimeError("no cuobjdump: neither Triton's nor the CUDA toolkit's is here")
    done = subprocess.run(
        [tool, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path},
    )
    if done.returncode:
        raise RuntimeError(f"cuobjdump {' '.join(options)}: {done.stderr or done.stdout}")
    return done.stdout


def kernels(cubin: Path) -> list[Code]:
    """Every kernel in it, in order."""
    resources = _sections(cuobjdump("-res-usage", str(cubin)), r"Function (\S+):\n")
    elf = cuobjdump("-elf", str(cubin))
    bounds = _sections(elf, r"^\.nv\.info\.(\S+)\n")
    # From sm_90 on the figure has the system's part in it.
    reserved = 1024 if ".nv.shared.reserved" in elf else 0
    found = []
    for symbol, code in _sections(cuobjdump("-sass", str(cubin)), r"Function : (\S+)\n").items():
        taken = resources[symbol]
        threads = re.search(
            r"EIATTR_MAX_THREADS\s+Format:\s*\S+\s+Value:\s*0x(\w+) ", bounds.get(symbol, "")
        )
        found.append(
            Code(
                symbol,
                registers=_resource(taken, "REG"),
                local_bytes=_resource(taken, "STACK") + _resource(taken, "LOCAL"),
                shared_bytes=max(0, _resource(taken, "SHARED") - reserved),
                threads=int(threads[1], 16) if threads else 0,
                lines=_instructions(code),
            )
        )
    return found


def _sections(text: str, heading: str) -> dict[str, str]:
    """What follows each heading, by the name in it."""
    parts = re.split(heading, text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _instructions(code: str) -> list[tuple[str, str, str]]:
    """(address, opcode, operands) of lines like ``/*0a30*/ @P0 LDG.E.128 R4, [R2.64] ;``."""
    return re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Zx0-9_.]*)([^;]*)", code)


_LOCAL = r"(LDL|STL)\b"
_PRODUCT = r"(HMMA|HGMMA|UTC[A-Z]*MMA)\b"


def innermost(lines: list[tuple[str, str, str]]) -> list[list[str]]:
    """The opcodes of every loop that has none inside."""
    spans = _loops(lines)
    return [
        loop
        for (a, b), loop in spans.items()
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]


def loops(lines: list[tuple[str, str, str]]) -> list[list[str]]:
    """The opcodes of every loop."""
    return list(_loops(lines).values())


def _loops(lines: list[tuple[str, str, str]]) -> dict[tuple[int, int], list[str]]:
    """By where they begin and end: at a branch back."""
    addresses = [int(address, 16) for address, _, _ in lines]
    opcodes = [opcode for _, opcode, _ in lines]
    found = {}
    for end, (address, opcode, operands) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < int(address, 16):
            begin = bisect_left(addresses, int(target[1], 16))
            found[begin, end + 1] = opcodes[begin : end + 1]
    return found


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
