"""Builds the program that emulates CUDA kernels on the host, and talks to it.

The same ``.cu`` files that nvcc compiles are compiled here with the C++ compiler, the headers of
``tests/simt/include`` standing in for CUDA's, under the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import IO

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "simt"
# The other end of Host, and the emulation: what touches memory that kernels own, and the rest.
COMMON = [HERE / f"{name}.cpp" for name in ("server", "memory")]
SCHEDULER = [HERE / f"{name}.cpp" for name in ("fiber", "simt", "barrier", "warp", "launch")]
RECURRENT = (
    "recurrent", "recurrent_lstm", "recurrent_gru", "recurrent_rnn", "recurrent_device", "device",
)  # fmt: skip
# A program for each, so that a change in one compiles no other.
PROGRAMS = {
    "checks": [HERE / f"{name}.cpp" for name in ("checks", "checks_group", "checks_warp")],
    "latency": [HERE / "latency_server.cpp"],
    "layer_norm": [HERE / "layer_norm_server.cpp", ROOT / "csrc" / "cuda" / "layer_norm.cu"],
    "recurrent": [
        HERE / "recurrent_server.cpp",
        *(ROOT / "csrc" / "cuda" / f"{name}.cu" for name in RECURRENT),
    ],
}
FLAGS = ["-std=c++17", "-g1", "-Wall"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
KERNEL_FLAGS = [
    *FLAGS,
    "-O1",
    "-fno-strict-aliasing",  # kernels read memory as the vectors the hardware has
    "-ftrivial-auto-var-init=pattern",  # a variable nobody set has the same wrong value every time
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",  # words that a dtype's width leaves unused
]
# Half of the time of the tests is in it, and sanitizers would double that.
SCHEDULER_FLAGS = [*FLAGS, "-O2"]


class Fault(Exception):
    """The emulated program was stopped: by a sanitizer, or by the emulation's own checks."""


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(name: str, races: bool = False) -> Path:
    """The path of one of PROGRAMS; compiles what includes a file that has changed.

    ``races``: every access of a kernel to memory of its own is checked for an order with the others
    (``races.cpp``), in place of the sanitizers.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler")
    version = subprocess.run([cxx, "--version"], capture_output=True, check=True).stdout
    BUILD.mkdir(parents=True, exist_ok=True)
    sanitize = [] if races else SANITIZE
    scheduler = [*SCHEDULER_FLAGS, *([] if races else ["-DSIMT_SANITIZED"])]
    kernels = [*KERNEL_FLAGS, *(["-fsanitize=thread"] if races else SANITIZE)]
    compiled = [(source, scheduler) for source in [*SCHEDULER, HERE / "races.cpp"]]
    compiled += [(source, [*KERNEL_FLAGS, *sanitize]) for source in COMMON]
    compiled += [(source, kernels) for source in PROGRAMS[name]]
    objects = [_object(cxx, version, source, flags) for source, flags in compiled]
    digest = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()
    program = BUILD / f"{name}-{digest[:16]}"
    if not program.exists():
        _create(program, [cxx, *sanitize, *map(str, objects)])
    return program


def _object(cxx: str, version: bytes, source: Path, flags: list[str]) -> Path:
    """Beside an object lies what its last compilation included; its own name tells their contents.

    If none of those files has changed, neither has what they include.
    """
    listing = BUILD / f"{source.name}.included"
    command = [cxx, *flags, f"-I{HERE / 'include'}", "-x", "c++", str(source)]
    common = hashlib.sha256(version + " ".join(flags).encode())

    def target() -> Path:
        return BUILD / f"{source.stem}-{_digest(listing, common.copy())}.o"

    if not listing.exists() or not target().exists():
        _create(listing, [*command, "-MM", "-MT", "object"])
    if not target().exists():
        _create(target(), [*command, "-c"])
    return target()


def _digest(listing: Path, digest: hashlib._Hash) -> str:
    for name in sorted(listing.read_text().replace("\\\n", " ").split()[1:]):
        path = Path(name)
        digest.update(name.encode() + (path.read_bytes() if path.exists() else b""))
    return digest.hexdigest()[:16]


def _create(target: Path, command: list[str]) -> None:
    """Runs a compiler; several test processes may do so at once, so the result appears whole."""
    partial = target.with_suffix(f".{os.getpid()}.partial")
    command = [*command, "-o", str(partial)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    partial.replace(target)


class Host:
    """A running program; ``call`` runs one function in it. A fault ends it for good."""

    def __init__(self, program: Path) -> None:
        self._program = program
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        # Leaks are not what is looked for, and LeakSanitizer needs ptrace, which containers forbid.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": ""}
        self._process = subprocess.Popen(
            [str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def call(
        self,
        name: str,
        buffers: list[np.ndarray],
        integers: list[int],
        reals: list[float] | None = None,
        seed: int = 0,
    ) -> str | None:
        """Runs a function on copies of the buffers and copies them back; returns its error."""
        reals = reals or []
        message = [struct.pack("<q", len(name)), name.encode(), struct.pack("<q", seed)]
        message.append(struct.pack("<q", len(buffers)))
        for buffer in buffers:
            message += [struct.pack("<q", buffer.nbytes), buffer.tobytes()]
        message.append(struct.pack(f"<q{len(integers)}q", len(integers), *integers))
        message.append(struct.pack(f"<q{len(reals)}d", len(reals), *reals))
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"".join(message))
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        (length,) = struct.unpack("<q", self._read(8))
        error = self._read(length).decode()
        for buffer in buffers:
            data = np.frombuffer(self._read(buffer.nbytes), dtype=buffer.dtype)
            buffer[...] = data.reshape(buffer.shape)
        return error or None

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(count)
        if len(data) != count:
            self._fail()
        return data

    def _fail(self) -> None:
        self._process.wait()
        self._errors.seek(0)
        report = self._errors.read().decode(errors="replace")[:4000]
        raise Fault(re.sub("<([0-9a-f]+)>", self._line, report))

    def _line(self, address: re.Match[str]) -> str:
        """Where in the sources a call returns to, the innermost of inlined functions first."""
        before = f"{int(address[1], 16) - 1:x}"
        command = ["addr2line", "-i", "-s", "-e", str(self._program), before]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = re.findall(r"[^\s:]+:[0-9]+", found.stdout)
        return " in ".join(lines) or address[0]
