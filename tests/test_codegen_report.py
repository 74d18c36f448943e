"""The report on generated code, and how machine code is read."""

import json
from pathlib import Path

import pytest

from benchmarks import _nvcc, _sass, codegen, gpu, report, roofline

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
LOOP = _sass.Loop(instructions=5, special=1, bytes=18, tensor_flops=2 * 2 * 64 * 128 * 16)


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


def test_occupancy_is_the_least_of_four_limits():
    def of(architecture, threads, registers, shared_bytes):
        usage = _sass.Usage("kernel", threads, registers, 0, 0, 0, shared_bytes, *[0] * 8, LOOP)
        return roofline.occupancy(usage, architecture)

    assert of(90, 128, 32, 0) == 1
    assert of(90, 512, 128, 0) == 0.25  # registers for one block
    assert of(90, 512, 65, 0) == 0.25  # 72 are allotted, for one block and three quarters
    assert of(90, 32, 16, 0) == 0.5  # 32 blocks at most
    assert of(90, 256, 32, 100 << 10) == 0.25  # two blocks' shared memory in 228 KiB
    assert of(80, 256, 32, 100 << 10) == 0.125  # and one block's in 164


def test_cuda_kernels_stand_in_the_report(monkeypatch, capsys, tmp_path):
    lines = _sass._instructions(SASS)
    code = _sass.Code("_Zkernel", 40, 0, 256, 512, lines)
    plan = _sass.Code("_Zplan", 128, 8, 0, 512, lines)
    found = {"kernel<8>": code, "persistent_kernel<0>": plan}
    asked = []

    def report(path, arch):
        asked.append((path.name, arch))
        if arch == "sm_100":
            raise _nvcc.CompileError("layer_norm.cu: no nvcc on PATH\nand more")
        return found

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_nvcc, "report", report)
    arguments = ["layer_norm", "softmax", "--kernels", "cuda", "--out", str(tmp_path)]
    assert codegen.main(arguments) == 1  # one spills
    assert asked == [("layer_norm.cu", arch) for arch in ("sm_80", "sm_90a", "sm_100")]
    printed = capsys.readouterr().out
    assert "| layer_norm |  |  | 90 | kernel<8> | 512 | 40 | 75% | 0 | 256 | 12 |" in printed
    assert "| persistent_kernel<0> | 512 | 128 | 25% | 8 | 0 + plan |" in printed
    assert "CompileError: layer_norm.cu: no nvcc on PATH |" in printed
    assert "5 kernels, 3 that spill or do not compile" in printed
    kernels = json.loads((tmp_path / "codegen.json").read_text())["kernels"]
    assert [kernel["architecture"] for kernel in kernels] == [80, 80, 90, 90, 100]


def test_codegen_report_names_failures():
    where = {"operator": "layer_norm", "length": "64", "dtype": "bf16", "architecture": 90}
    assert "| CompilationError: x |" in codegen.markdown(
        [{**where, "failure": "CompilationError: x"}]
    )


def test_the_hottest_loop_is_found_and_bounded():
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
