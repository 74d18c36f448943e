"""What the Triton kernels compile to on GPUs that are not there: registers, spills, wide accesses.

Compiling cannot share a process with the interpreter, so ``python tests/codegen`` does it. After
a deliberate change, ``python tests/codegen FAMILY --record`` rewrites the family's figures under
its Triton's version; under a version without figures the other checks remain.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from fastseq.kernels.common import shared_memory_limit
from fastseq.kernels.layer_norm_backward import BACKWARD_LIMIT, backward_launch

HERE = Path(__file__).resolve().parent / "codegen"
VERSION = ".".join(triton.__version__.split(".")[:2])
FAMILIES = sorted(path.stem for path in HERE.glob("[!_]*.py"))
RECORDED = {
    key: figures
    for family in FAMILIES
    for key, figures in json.loads((HERE / "recorded" / f"{family}.json").read_text())
    .get(VERSION, {})
    .items()
}

#: Registers the compiler may take beyond those recorded.
SLACK = 8
#: Local accesses, of all instructions at most. Triton 3.6 keeps 32 addresses a thread for dk and dv
#: of attention (docs/attention-kernels.md).
SPILLED = {"3.6": 0.11}.get(VERSION, 0.03)


def _measure(*options: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE), *options]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=3000
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def _runs() -> Iterator[Any]:
    for family in FAMILIES:
        yield pytest.param((family,), id=family)
        yield pytest.param((family, "--full"), marks=pytest.mark.slow, id=f"{family}-full")


@pytest.fixture(scope="module", params=_runs())
def usages(request: pytest.FixtureRequest) -> list[dict]:
    measured = _measure(*request.param)
    assert {usage["architecture"] for usage in measured} == {80, 90, 100}
    return measured


def _offenders(usages: list[dict], holds) -> str:
    return "\n".join(str(usage) for usage in usages if not holds(usage))


def test_shared_memory_is_within_the_chips_limit(usages):
    assert not _offenders(
        usages, lambda u: u["shared_bytes"] <= shared_memory_limit(u["architecture"])
    )


def test_nothing_spills(usages):
    """No local memory, but for what is recorded of kernels at the limit of 64 or 128 registers.

    There the compiler moves a few registers out of the way once a tile; one program less on every
    SM, the alternative, would cost far more. It must stay below SPILLED of the instructions.
    """

    def holds(usage: dict) -> bool:
        _, recorded, *_ = RECORDED.get(usage["key"], (0, 30))
        accesses = usage["local_accesses"]
        return accesses <= recorded and accesses <= SPILLED * usage["instructions"]

    assert not _offenders(usages, holds)


#: The most local accesses a loop has, of attention kernels at the limit of their registers:
#: decoding within a window on Blackwell (7 of 785 instructions), head_dim 128 on an A100, most of
#: all packed (9 of some 700). Norms, softmax and cross-entropy have none on any chip.
IN_LOOPS = {
    "sm_100 attention_chunk_kernel: attention decode window": 7,
    "sm_80 attention_forward_kernel: attention forward": 3,
    "sm_80 attention_forward_kernel: attention forward packed": 9,
    "sm_80 attention_forward_kernel: attention forward descriptors packed": 9,
}
if VERSION == "3.6":
    IN_LOOPS["sm_90 attention_kv_kernel: attention backward causal fp32"] = 191
    IN_LOOPS["sm_100 attention_kv_kernel: attention backward causal fp32"] = 117


def test_nothing_spills_in_a_loop(usages):
    """What the test above lets pass is done once a tile, not once a step."""
    if not RECORDED:
        pytest.skip(f"no figures recorded for Triton {VERSION}")

    def holds(usage: dict) -> bool:
        known = [most for start, most in IN_LOOPS.items() if usage["key"].startswith(start)]
        return usage["loop_local"] <= max(known, default=0)

    assert not _offenders(usages, holds)


def test_accesses_are_wide_and_products_on_tensor_cores(usages):
    assert not _offenders(usages, lambda u: all(u[name] > 0 for name in u["expected"]))

    def holds(usage: dict) -> bool:
        _, _, loads, stores = RECORDED.get(usage["key"], (0, 0, 0, 0))
        return usage["wide_loads"] >= loads and usage["wide_stores"] >= stores

    assert not _offenders(usages, holds)


def test_descriptors_bring_tiles_by_the_copy_engine(usages):
    """From Hopper on, into the same products, with no fewer tensor cores than pointers have."""
    if not any("descriptors" in usage["key"] for usage in usages):
        pytest.skip("no such kernels in this family")
    tiles = ("attention_forward_kernel", "attention_kv_kernel", "attention_q_kernel")
    by_pointers = {usage["key"]: usage for usage in reversed(usages)}  # the first of a key
    for usage in reversed(usages):
        if "descriptors" not in usage["key"] or usage["kernel"] not in tiles:
            continue
        described = by_pointers[usage["key"]]
        assert (described["bulk_loads"] > 0) == (usage["architecture"] >= 90), usage["key"]
        pointers = by_pointers.get(usage["key"].replace(" descriptors", ""))
        if pointers is not None and usage["architecture"] >= 90:
            assert described["wide_loads"] < pointers["wide_loads"], usage["key"]
            assert described["tensor_cores"] == pointers["tensor_cores"], usage["key"]
            assert described["local_accesses"] <= pointers["local_accesses"], usage["key"]


def test_registers_are_not_above_the_recorded_figure(usages):
    if not RECORDED:
        pytest.skip(f"no figures recorded for Triton {VERSION}")
    missing = [usage["key"] for usage in usages if usage["key"] not in RECORDED]
    assert not missing, f"record them: python tests/codegen --record: {missing[:3]}"
    assert not _offenders(usages, lambda u: u["registers"] <= RECORDED[u["key"]][0] + SLACK)


def test_programs_of_the_backward_are_all_resident(usages):
    """The persistent backward launches as many programs as an SM is meant to hold: it must."""

    def holds(usage: dict) -> bool:
        row_length = int(usage["key"].split()[-1])
        launch = backward_launch(row_length, 4, usage["architecture"], BACKWARD_LIMIT)
        registers = -(-usage["registers"] // 8) * 8  # allotted by eights
        return launch.programs * usage["threads"] * registers <= 65536

    names = ("backward_kernel", "backward_split_kernel")
    backward = [u for u in usages if "_norm" in u["key"] and u["kernel"] in names]
    if not backward:
        pytest.skip("no persistent kernels in this family")
    assert not _offenders(backward, holds)
