"""What the CUDA kernels compile to on GPUs that are not there.

After a deliberate change ``python tests/codegen/_cuda.py`` rewrites the figures under its nvcc's
version; under a version without figures the other checks remain. What a build with CUDA has
compiled already is read from its objects; one file for one architecture takes nvcc 20 to 50 s.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _nvcc
from benchmarks._sass import Code, Usage

sys.path.insert(0, str(Path(__file__).parent / "codegen"))

import _cuda

ARCHITECTURES = list(_nvcc.ARCHITECTURES.values())
#: Compiled in every run; the others where a build has them, or in ``make test-all``.
ALWAYS = [("layer_norm", "sm_90a"), ("recurrent_lstm", "sm_90a")]
MOST_REGISTERS = 128  # what 512 threads leave each
CELLS = {"recurrent_lstm": 0, "recurrent_gru": 1, "recurrent_rnn": 2}


def _cases() -> list[Any]:
    found = []
    for name, arch in itertools.product(_cuda.FILES, ARCHITECTURES):
        quick = (name, arch) in ALWAYS or _nvcc.at_hand(_nvcc.source(name), arch)
        marks = () if quick else (pytest.mark.slow,)
        found.append(pytest.param((name, arch), id=f"{name}-{arch}", marks=marks))
    return found


@pytest.fixture(scope="module", params=_cases())
def compiled(request: pytest.FixtureRequest) -> tuple[str, str]:
    name, arch = request.param
    if _nvcc.nvcc() is None and not _nvcc.at_hand(_nvcc.source(name), arch):
        pytest.skip("no nvcc")
    return name, arch


@pytest.fixture
def codes(compiled: tuple[str, str]) -> dict[str, Code]:
    name, arch = compiled
    return _nvcc.report(_nvcc.source(name), arch)


@pytest.fixture
def usages(compiled: tuple[str, str]) -> dict[str, Usage]:
    return _cuda.usages(*compiled)


def test_nothing_spills(usages: dict[str, Usage]) -> None:
    assert usages
    for name, usage in usages.items():
        assert (usage.local_bytes, usage.local_accesses) == (0, 0), name
        assert 0 < usage.registers <= MOST_REGISTERS, name


def test_the_figures_are_those_recorded(
    compiled: tuple[str, str], usages: dict[str, Usage]
) -> None:
    """Fewer registers and instructions will do, more or narrower accesses will not."""
    if not _cuda.recorded():
        pytest.skip(f"no figures recorded for nvcc {_nvcc.release()}")
    file, arch = compiled
    known = {
        key.partition(": ")[2]: figures
        for key, figures in _cuda.recorded().items()
        if key.startswith(f"{arch} {file}: ")
    }
    assert set(usages) == set(known)
    for name, usage in usages.items():
        registers, loads, stores, loop = known[name]
        assert usage.registers <= registers, name
        assert usage.wide_loads >= loads, name
        assert usage.wide_stores >= stores, name
        assert usage.loop.instructions <= loop, name


def _layer_norm_accesses(name: str) -> tuple[int, int] | None:
    """The 128-bit loads and stores that the kernels with rows in registers must have.

    A vector of 8 is one access for a 16-bit dtype and two for float32, both present since the dtype
    is a run-time value; a vector of 4 is 128 bits for float32 only.
    """
    kernel, _, rest = name.rstrip(">").partition("<")
    if kernel not in ("forward_kernel", "backward_kernel"):
        return None
    vector, chunks, *residual = rest.split(", ")
    either, float32 = {"8": (3, 2), "4": (1, 1), "1": (0, 0)}[vector]
    if kernel == "forward_kernel":  # input weight bias residual; output new_residual
        added = int(residual == ["true"])
        return (3 + added) * int(chunks) * either, (1 + added) * int(chunks) * either
    # grad_output x grad_new_residual weight; grad_x grad_input and two rows of partial sums
    return 4 * int(chunks) * either, 2 * int(chunks) * (either + float32)


def test_layer_norm_reaches_memory_by_16_bytes(
    compiled: tuple[str, str], usages: dict[str, Usage]
) -> None:
    if compiled[0] != "layer_norm":
        pytest.skip("another family")
    for name, usage in usages.items():
        assert usage.shared_bytes <= 2048, name
        accesses = _layer_norm_accesses(name)
        if accesses is not None:
            assert (usage.wide_loads, usage.wide_stores) == accesses, name
        elif name.endswith(("<4>", "<8>")):
            assert min(usage.wide_loads, usage.wide_stores) > 0, name


def test_recurrent_kernels_are_what_the_plan_takes_them_for(
    compiled: tuple[str, str], codes: dict[str, Code], usages: dict[str, Usage]
) -> None:
    """Every instance, on tensor cores but for exact fp32, with copies and counted stores."""
    file, arch = compiled
    if file not in CELLS:
        pytest.skip("another family")
    assert set(codes) == {
        f"persistent_kernel<fastseq::recurrent::{name}<{CELLS[file]}, {arithmetic}, {columns}> >"
        for name in ("Forward", "Backward")
        for arithmetic, columns in ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (3, 1))
    }
    for name, code in codes.items():
        assert code.threads == 512, name
        assert code.shared_bytes == 0, name  # all of it is in the plan's layout
        assert ("HMMA" in code.opcodes) == (", 3, 1> >" not in name), name
        assert ("STAS" in code.opcodes) == (arch != "sm_80"), name  # a store that is counted
        assert "LDGSTS" in code.opcodes, name  # copies beside the arithmetic
        assert usages[name].wide_stores > 0, name
        if "Forward" in name:  # the weights; the backward's are columns, everything else is copied
            assert usages[name].wide_loads > 0, name


def test_an_object_that_is_older_than_its_sources_is_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    objects, sources = tmp_path / "build" / "objects", tmp_path / "csrc" / "cuda"
    objects.mkdir(parents=True)
    sources.mkdir(parents=True)
    kernel, built = sources / "kernel.cu", objects / "kernel_cuda.o"
    kernel.write_text("")
    monkeypatch.setattr(_nvcc, "ROOT", tmp_path)
    assert not _nvcc.at_hand(kernel, "sm_80")
    built.write_text("")
    built.with_suffix(".d").write_text("kernel.o: \\\n csrc/cuda/kernel.cu\n")
    built.with_suffix(".command").write_text("nvcc -gencode=arch=compute_80,code=sm_80 -c")
    later = kernel.stat().st_mtime + 10
    os.utime(built, (later, later))
    assert _nvcc.at_hand(kernel, "sm_80")
    assert not _nvcc.at_hand(kernel, "sm_90a")
    os.utime(kernel, (later + 10, later + 10))
    assert not _nvcc.at_hand(kernel, "sm_80")
