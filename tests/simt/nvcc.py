"""What nvcc makes of a CUDA file, kernel by kernel: registers, spills, wide accesses.

Needs no GPU. The disassembler comes with the CUDA toolkit or, where that has none, with Triton.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ["-std=c++17", "-O3"]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """``loads`` and ``stores`` count the instructions of 128 bits to global memory."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    loads_128: int
    stores_128: int
    local_accesses: int
    opcodes: frozenset[str]  # without what follows the first full stop


def nvcc() -> str | None:
    return shutil.which("nvcc")


def nvdisasm() -> str:
    found = shutil.which("nvdisasm")
    if found is None:
        triton = importlib.util.find_spec("triton")
        assert triton is not None, "no nvdisasm and no triton"
        assert triton.origin is not None
        found = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm")
    return found


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def _short_names(symbols: list[str]) -> dict[str, str]:
    """``_ZN...`` to ``kernel<arguments>``, without namespaces and parameters."""
    demangled = _run(["c++filt", *symbols]).splitlines()
    short = {}
    for symbol, name in zip(symbols, demangled, strict=True):
        without = name.replace("(anonymous namespace)::", "").removeprefix("void ")
        without = re.sub(r"\((?:\w+::)+\w+\)(?=\d)", "", without)  # the type of an enumerator
        without = re.sub(r"\([\w:]+\)(?=\d)", "", without)  # an enum's number keeps no type
        short[symbol] = re.sub(r"^(\w+::)*", "", without.split("(")[0]).strip()
    return short


def _sass(cubin: Path) -> dict[str, str]:
    sections = _run([nvdisasm(), "-c", str(cubin)]).split("//--------------------- .text.")
    return {section.split(maxsplit=1)[0]: section for section in sections[1:]}


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


@functools.cache
def nvcc_report(path: Path, arch: str) -> dict[str, Kernel]:
    """Compiles the file for one architecture (such as "sm_90a") and reports on every kernel."""
    compiler = nvcc()
    assert compiler is not None, "no nvcc"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        arguments = [*FLAGS, f"-arch={arch}", "-cubin", "-Xptxas", "-v", "-o", str(cubin)]
        log = _run([compiler, *arguments, "-x", "cu", str(path)])
        sass = _sass(cubin)
    entry = re.compile(r"Compiling entry function '(\S+)'")
    sections = entry.split(log)
    names = _short_names(sections[1::2])
    report = {}
    for symbol, section in zip(sections[1::2], sections[2::2], strict=True):

        def number(pattern: str, text: str = section) -> int:
            found = re.search(pattern, text)
            return int(found.group(1)) if found else 0

        code = sass[symbol]
        report[names[symbol]] = Kernel(
            registers=number(r"Used (\d+) registers"),
            spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            stack_bytes=number(r"(\d+) bytes stack frame"),
            shared_bytes=number(r"(\d+) bytes smem"),
            loads_128=_count(r"\bLDG\.E\.128", code),
            stores_128=_count(r"\bSTG\.E\.128", code),
            local_accesses=_count(r"\b(?:LDL|STL)\b", code),
            opcodes=frozenset(
                re.findall(r"/\*[0-9a-f]+\*/ +(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", code)
            ),
        )
    return report
