"""What nvcc makes of the CUDA kernels: their machine code, for chips that are not there.

A cubin comes from the object file of a build that has the CUDA kernels, where it is newer than all
it was made from; else from nvcc, and is kept. One file for one chip takes nvcc 20 to 50 s.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import _sass

ROOT = Path(__file__).resolve().parent.parent
#: As setup.py has them.
FLAGS = ["-std=c++17", "-O3"]
#: What setup.py builds for, by the number that stands for it in reports.
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}
#: The families with CUDA kernels, and their files in csrc/cuda.
FAMILIES = {
    "layer_norm": ("layer_norm",),
    "recurrent": ("recurrent_lstm", "recurrent_gru", "recurrent_rnn"),
}
#: Kernels whose launch adds shared memory that only its plan knows.
DYNAMIC = ("persistent_kernel",)


class CompileError(RuntimeError):
    """nvcc or a tool beside it failed; the message has the command and what it said."""


def nvcc() -> str | None:
    return shutil.which("nvcc")


@functools.cache
def release() -> str:
    """Of nvcc, such as "13.0"; empty where there is none."""
    compiler = nvcc()
    found = re.search(r"release ([\d.]+)", _run([compiler, "--version"])) if compiler else None
    return found[1] if found else ""


def source(name: str) -> Path:
    """Of one of FAMILIES' files."""
    return ROOT / "csrc" / "cuda" / f"{name}.cu"


@functools.cache
def report(path: Path, arch: str) -> dict[str, _sass.Code]:
    """Every kernel of a CUDA file, compiled for one architecture (such as "sm_90a"), by its name
    without namespaces and parameters.

    Raises:
        CompileError: it does not compile, or there is no nvcc and no build that has it.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes = _sass.kernels(_built(path, arch, Path(folder)) or _compiled(path, arch))
    names = _short_names([code.symbol for code in codes])
    return {names[code.symbol]: code for code in codes}


def at_hand(path: Path, arch: str) -> bool:
    """Whether a report takes no compiling."""
    return _object(path, arch) is not None or _kept(path, arch).exists()


def _object(path: Path, arch: str) -> Path | None:
    """The object file of a build, if it has that architecture and nothing of it has changed."""
    found = ROOT / "build" / "objects" / f"{path.stem}_cuda.o"
    listed, made_by = found.with_suffix(".d"), found.with_suffix(".command")
    if not (found.exists() and listed.exists() and made_by.exists()):
        return None
    if path.parent != source("").parent or f"code={arch} " not in made_by.read_text():
        return None
    names = listed.read_text().replace("\\\n", " ").partition(": ")[2].split()
    files, made = [ROOT / name for name in names], found.stat().st_mtime
    fresh = all(file.exists() and file.stat().st_mtime < made for file in files)
    return found if fresh else None


def _built(path: Path, arch: str, folder: Path) -> Path | None:
    found = _object(path, arch)
    if found is None:
        return None
    _sass.cuobjdump("-xelf", arch, str(found), folder=folder)
    return next(folder.glob("*.cubin"), None)


def _kept(path: Path, arch: str) -> Path:
    """Where a compiled cubin is, named after all that it can have been made from."""
    digest = hashlib.sha256(" ".join([release(), *FLAGS]).encode())
    near = [*path.parent.glob("*"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    for file in sorted({file for file in near if file.suffix in (".h", ".cuh")} | {path}):
        digest.update(file.name.encode() + file.read_bytes())
    return ROOT / "build" / "cubins" / f"{path.stem}-{arch}-{digest.hexdigest()[:16]}.cubin"


def _compiled(path: Path, arch: str) -> Path:
    target = _kept(path, arch)
    if target.exists():
        return target
    compiler = nvcc()
    if compiler is None:
        raise CompileError(f"{path.name}: no nvcc on PATH, and no build has it for {arch}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # others may be at it
        partial = Path(folder) / "partial"
        _run(
            [compiler, *FLAGS, f"-arch={arch}", "-cubin", "-o", str(partial), "-x", "cu", str(path)]
        )
        partial.replace(target)
    return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def _short_names(symbols: list[str]) -> dict[str, str]:
    """``_ZN...`` to ``kernel<arguments>``, without namespaces and parameters."""
    demangled = _run(["c++filt", *symbols]).splitlines() if shutil.which("c++filt") else symbols
    short = {}
    for symbol, name in zip(symbols, demangled, strict=True):
        without = name.replace("(anonymous namespace)::", "").removeprefix("void ")
        without = re.sub(r"\((?:\w+::)+\w+\)(?=\d)", "", without)  # the type of an enumerator
        without = re.sub(r"\([\w:]+\)(?=\d)", "", without)  # an enum's number keeps no type
        short[symbol] = re.sub(r"^(\w+::)*", "", without.split("(")[0]).strip()
    return short
