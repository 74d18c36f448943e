"""The report on generated code, and how machine code is read."""

import json
from pathlib import Path

import pytest

from benchmarks import codegen, gpu, report


def test_registers_bound_the_resident_threads():
    assert [report.resident_threads(n) for n in (32, 33, 64, 128, 255)] == [
        2048,
        1632,
        1024,
        512,
        256,
    ]


def test_every_rival_kernel_stands_beside_ours():
    path = Path(gpu.ROOT, "benchmarks", "results", "codegen", "rivals.json")
    found = json.loads(path.read_text())
    assert set(found["versions"]) == {"liger-kernel", "fla-core"}
    places = {
        package: {(e["operator"], e["length"]) for e in found["kernels"] if e["package"] == package}
        for package in ("fastseq", *found["versions"])
    }
    assert places["fastseq"] == places["liger-kernel"] | places["fla-core"]
    assert not [entry for entry in found["kernels"] if "failure" in entry]


def test_codegen_report_names_failures():
    where = {"operator": "layer_norm", "length": "64", "dtype": "bf16", "architecture": 90}
    assert "| CompilationError: x |" in codegen.markdown(
        [{**where, "failure": "CompilationError: x"}]
    )


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P2 BRA 0x0090 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0060*/                   MUFU.EX2 R4, R5 ;
        /*0070*/               @P0 BRA 0x0030 ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/              @!P1 BRA 0x0010 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0x00b0;
"""


def test_the_hottest_loop_is_found_and_bounded():
    pytest.importorskip("triton")
    from benchmarks import _sass, roofline

    lines = _sass._instructions(SASS)
    assert len(lines) == 12
    loop = _sass._loop(_sass._hottest(_sass.innermost(lines)), warps=8)
    assert loop == _sass.Loop(
        instructions=5, special=1, bytes=18, tensor_flops=2 * 2 * 64 * 128 * 16
    )
    straight = [line for line in lines if line[1] != "BRA"]
    assert not _sass.innermost(straight)
    assert _sass._loop([opcode for _, opcode, _ in straight], warps=4).bytes == 16 + 16 + 2 + 16

    kernel = _sass.Usage("kernel", 256, *[0] * 13, loop)
    bounds = roofline.estimate(kernel, 90)
    assert bounds.issue == 5 * 8 / 4
    assert bounds.special == 256 / 16
    # 132 multiprocessors at 1.755 GHz, 989 TFLOP/s, 4.8 TB/s: 4269 flops, 20.7 bytes a cycle.
    assert bounds.tensor == pytest.approx(2 * 2 * 64 * 128 * 16 / 4269, rel=1e-3)
    assert bounds.memory == pytest.approx(256 * 18 / 20.72, rel=1e-3)
    assert bounds.bound == "memory"
    assert bounds.memory_share == 1
