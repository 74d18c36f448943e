"""Builds ``fastseq._C``: one stable-ABI extension with C++ kernels and, given nvcc, CUDA ones.

The same file serves CPU-only and CUDA builds of torch from 2.10 on and Python from 3.10 on. nvcc is
called directly, because torch's own CUDAExtension refuses under a CPU build of torch.

FASTSEQ_CPP=0         build no extension: pure Python, kernels by Triton and torch
FASTSEQ_CUDA=0        leave the CUDA kernels out
FASTSEQ_NATIVE=1      CPU kernels for this machine's instruction set alone, in a third of the time
FASTSEQ_SANITIZE=1    build with address and undefined-behaviour sanitizers (see `make sanitize`)
FASTSEQ_CUDA_ARCHS    architectures to build, default "80 90a 100" (and PTX of the last)
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CXX = os.environ.get("CXX", "g++")
NVCC = None if os.environ.get("FASTSEQ_CUDA") == "0" else shutil.which("nvcc")
ARCHITECTURES = os.environ.get("FASTSEQ_CUDA_ARCHS", "80 90a 100").split()
BASE = ["-std=c++17", "-O3"]
if os.environ.get("FASTSEQ_SANITIZE") == "1":
    BASE += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]
# A kernel file of csrc/cpu is compiled once for each of these, in a namespace of that name.
INSTRUCTION_SETS = {"generic": []}
if platform.machine() == "x86_64":
    AVX2 = ["-mavx2", "-mfma", "-mf16c"]
    AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]
    AVX512 += ["-mprefer-vector-width=512"]
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX512}
    INSTRUCTION_SETS |= {"avx512_bf16": [*AVX512, "-mavx512bf16"]}
NATIVE = os.environ.get("FASTSEQ_NATIVE") == "1" and shutil.which(CXX) is not None
if NATIVE:
    command = [CXX, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    known = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    wanted = {
        name: {f"__{flag[2:].upper()}__" for flag in flags if flag.startswith(("-mavx", "-mf"))}
        for name, flags in INSTRUCTION_SETS.items()
    }
    widest = [name for name, macros in wanted.items() if macros <= {*known}][-1]
    INSTRUCTION_SETS = {widest: INSTRUCTION_SETS[widest]}
# csrc/cpu/<family>.cpp, what takes the compiler longest first.
CPU_KERNELS = [
    "recurrent",
    "softmax",
    "layer_norm",
    "cross_entropy",
    "additive_attention",
    "rotary_embedding",
    "attention",
    "feed_forward",
    "embedding",
]
# No fusing of products and sums where the compiler likes, which is not the same in every loop and
# would make a row's result depend on its batch: these files say fma() where they want one.
EXACT = {*CPU_KERNELS} - {"recurrent"}
# csrc/cuda/<family>.cu, and the parts of a family that has too many kernels for one file.
RECURRENT = [f"recurrent{part}" for part in ("", "_device", "_lstm", "_gru", "_rnn")]
CUDA_KERNELS = ["layer_norm", *RECURRENT]


class BuildExtension(build_ext):
    """Compiles what has changed, in parallel, then links with nvcc or the C++ compiler."""

    def build_extension(self, ext):
        import torch

        include = Path(torch.__file__).parent / "include"
        library = Path(torch.__file__).parent / "lib"
        objects = ROOT / "build" / "objects"
        objects.mkdir(parents=True, exist_ok=True)
        host = [CXX, *BASE, *WARNINGS, "-fPIC", "-fvisibility=hidden"]
        binding_flags = [
            "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the oldest torch served: 2.10
            f"-DFASTSEQ_BUILT_WITH_TORCH={torch.__version__}",  # another torch: compile again
            "-DPy_LIMITED_API=0x030A0000",
            *(f"-isystem{path}" for path in (include, include / "torch/csrc/api/include")),
            *(f"-I{path}" for path in self.include_dirs),
        ]
        if NVCC:
            names = " ".join(f"sm_{name}" for name in ARCHITECTURES)
            binding_flags += [
                "-DFASTSEQ_CUDA",
                "-DUSE_CUDA",
                f'-DFASTSEQ_CUDA_ARCHITECTURES="{names}"',
            ]

        # Object file: the command that makes it.
        commands = {"bindings": [*host, *binding_flags, "-c", "csrc/bindings.cpp"]}
        for name in ("scratch", "instruction_set"):
            commands[name] = [*host, "-c", f"csrc/cpu/{name}.cpp"]
        if NATIVE:
            commands["instruction_set"] += [
                f"-DFASTSEQ_ONLY_ISA={name}" for name in INSTRUCTION_SETS
            ]
        # No -ffast-math: NaN and Inf must come through. These two only drop errno and FP traps.
        math = ["-fno-math-errno", "-fno-trapping-math"]
        exact = ["-ffp-contract=off"]
        commands |= {
            f"{kernel}_{name}": [
                *(*host, *math, *(exact if kernel in EXACT else []), f"-DFASTSEQ_ISA={name}"),
                *(*flags, "-c", f"csrc/cpu/{kernel}.cpp"),
            ]
            for kernel in CPU_KERNELS
            for name, flags in INSTRUCTION_SETS.items()
        }
        if NVCC:
            targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
            last = ARCHITECTURES[-1]
            targets += [f"-gencode=arch=compute_{last},code=compute_{last}"]
            options = [*BASE, *targets, "-Xcompiler=-fPIC,-fvisibility=hidden"]
            commands |= {
                f"{kernel}_cuda": [NVCC, *options, "-c", f"csrc/cuda/{kernel}.cu"]
                for kernel in ["device", *CUDA_KERNELS]
            }
        outputs = [objects / f"{name}.o" for name in commands]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.compile, commands.values(), outputs))

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # nvcc links where it compiled: it knows its own toolkit. libtorch must stay a dependency
        # though nothing of it is named: a CUDA build's brings the weak CUDA symbols along.
        if NVCC:
            link = [NVCC, "-shared", "-cudart=static", "-Xlinker=--no-as-needed"]
        else:
            link = [CXX, "-shared", "-Wl,--no-as-needed"]
        link += [flag for flag in BASE if flag.startswith("-fsanitize")]
        libraries = [f"-L{library}", "-ltorch", "-ltorch_cpu"]
        self.run_tool([*link, *map(str, outputs), *libraries, "-o", str(target)])

    def compile(self, command, output):
        """Runs a command, unless its object is newer than every file it was made from."""
        listed, made_by = output.with_suffix(".d"), output.with_suffix(".command")
        command = [*command, "-MMD", "-MF", str(listed), "-o", str(output)]
        whole = output.exists() and listed.exists() and made_by.exists()
        if whole and made_by.read_text() == " ".join(command):
            files = listed.read_text().replace("\\\n", " ").partition(": ")[2].split()
            made = output.stat().st_mtime
            if all(Path(ROOT, f).exists() and Path(ROOT, f).stat().st_mtime < made for f in files):
                return
        made_by.unlink(missing_ok=True)
        started = time.time()
        self.run_tool(command)
        os.utime(output, (started, started))  # a file saved since then may have been read before
        made_by.write_text(" ".join(command))

    def run_tool(self, command):
        if self.verbose:
            print(" ".join(command))
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"fastseq: build failed\n{' '.join(command)}\n{result.stderr}")
        print(result.stderr, end="", file=sys.stderr)


if os.environ.get("FASTSEQ_CPP") == "0" or not shutil.which(CXX):
    print(f"fastseq: pure Python install (FASTSEQ_CPP=0, or no {CXX} found)", file=sys.stderr)
    setup()
else:
    setup(
        ext_modules=[Extension("fastseq._C", ["csrc/bindings.cpp"], py_limited_api=True)],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
