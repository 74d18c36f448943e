"""CUDA kernels without a GPU: the emulation itself. Each family has its own file."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import _nvcc

sys.path.insert(0, str(Path(__file__).parent))
from simt import host as simt_host

ROOT = Path(__file__).resolve().parents[1]
Layout = Callable[[int, int], tuple[int, int]]


@pytest.fixture(scope="session")
def program() -> Path:
    if simt_host.compiler() is None:
        pytest.skip("no C++ compiler")
    return simt_host.build("checks")


@pytest.fixture(scope="session")
def checks(program: Path) -> Iterator[simt_host.Host]:
    with simt_host.Host(program) as running:
        yield running


# The emulation itself.


def floats(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def test_emulation_runs_correct_kernels(checks: simt_host.Host) -> None:
    source = floats(192)
    for seed in range(4):
        result = np.full_like(source, np.nan)
        assert checks.call("reverse", [source, result], [0, 0, 1, 0], seed=seed) is None
        np.testing.assert_array_equal(result.reshape(3, 64), source.reshape(3, 64)[:, ::-1])
    source, result = floats(64), np.zeros(64, np.float32)
    assert checks.call("warp_sum", [source, result], [0, 0, 1, 0]) is None
    sums = source.astype(np.float64).reshape(2, 32).sum(1)
    np.testing.assert_allclose(result.reshape(2, 32), sums[:, None].repeat(32, 1), rtol=1e-5)


def test_emulation_shows_a_missing_barrier(checks: simt_host.Host) -> None:
    source = floats(192)
    results = []
    for seed in range(4):
        result = np.zeros_like(source)
        checks.call("reverse_without_barrier", [source, result], [0, 0, 1, 0], seed=seed)
        results.append(result.tobytes())
        # What was read too early is the poison of fresh shared memory.
        assert np.isnan(result).any()
    assert len(set(results)) > 1


FAULTS = [
    ("dynamic_shared", [0, 0, 32], "heap-buffer-overflow"),
    ("static_shared", [0, 0, 1], "index 32 out of bounds"),
    ("global", [0, 0, 1], "heap-buffer-overflow"),
    ("global", [0, 0, -1], "heap-buffer-overflow"),
    ("misaligned", [0, 0, 1], "misaligned address"),
    ("missed_barrier", [0, 0], "simt: deadlock in block (0, 0, 0): 16 threads have returned"),
    ("divergent_barrier", [0, 0], "simt: divergent barrier"),
    ("missing_lane", [0, 0], "simt: deadlock in block (0, 0, 0): 1 threads have returned"),
    ("masked_lane", [0, 0], "takes no part in the exchange"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), FAULTS)
def test_emulation_reports_faults(
    program: Path, name: str, arguments: list[int], message: str
) -> None:
    with simt_host.Host(program) as running, pytest.raises(simt_host.Fault) as caught:
        running.call(name, [np.zeros(32, np.float32)], arguments)
    assert message in str(caught.value)


def test_sixteen_bit_conversions(checks: simt_host.Host) -> None:
    generator = np.random.default_rng(0)
    random_bits = generator.integers(0, 2**32, 40000, dtype=np.uint64).astype(np.uint32)
    # Ties and their neighbours, and the range where float16 is subnormal or overflows.
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        ties = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
    near = np.concatenate([ties.view(np.uint32) + np.uint32(d) for d in (0, 1, 2**32 - 1)])
    bfloat16_ties = (generator.integers(0, 65536, 10000).astype(np.uint32) << 16) | 0x8000
    values = np.concatenate([random_bits, near, bfloat16_ties]).astype(np.uint32).view(np.float32)
    wide = [np.zeros(65536, np.float32), np.zeros(65536, np.float32)]
    narrow = [np.zeros(len(values), np.uint16), np.zeros(len(values), np.uint16)]
    integers = [0, 0, 1, 0, 2, 0, 3, 0, 4, 0, len(values)]
    assert checks.call("conversions", [*wide, values, *narrow], integers) is None
    bits = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(wide[0], bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(wide[1], (bits.astype(np.uint32) << 16).view(np.float32))
    source = torch.from_numpy(values.copy())
    for result, dtype in zip(narrow, (torch.float16, torch.bfloat16), strict=True):
        converted = torch.from_numpy(result.view(np.int16)).view(dtype)
        torch.testing.assert_close(converted, source.to(dtype), rtol=0, atol=0, equal_nan=True)


# Blocks that run at once.

UNITS = 40  # of a block of the recurrence in tests/simt/checks_group.cpp


def recurrence(state: np.ndarray, steps: int) -> np.ndarray:
    """[groups, units]"""
    units = np.arange(state.shape[1], dtype=np.uint32)
    for _ in range(steps):
        state = (state.sum(1, dtype=np.uint32)[:, None] + units) * np.uint32(2654435761)
    return state


def words(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)


def run_cluster(host: simt_host.Host, name: str, clusters: int, size: int, seed: int) -> bool:
    """Whether the result was right."""
    steps = 6
    initial = words((clusters, size * UNITS), seed)
    result = np.zeros_like(initial)
    integers = [0, 0, 1, 0, clusters, size, steps]
    assert host.call(name, [initial, result], integers, seed=seed) is None
    return np.array_equal(result, recurrence(initial, steps))


def run_cooperative(host: simt_host.Host, name: str, blocks: int, seed: int) -> bool:
    steps = 6
    state = words((2, blocks * UNITS), seed)
    expected = recurrence(state[:1], steps)
    counter = np.zeros(1, np.uint32)
    assert host.call(name, [state, counter], [0, 0, 1, 0, blocks, steps], seed=seed) is None
    assert counter[0] == blocks * steps
    return np.array_equal(state[:1], expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
def test_emulation_runs_clusters(checks: simt_host.Host, size: int) -> None:
    for name in ("cluster", "transfer"):
        assert all(run_cluster(checks, name, 3, size, seed) for seed in range(4))


@pytest.mark.parametrize("blocks", [1, 2, 5, 40])
def test_emulation_runs_cooperative_grids(checks: simt_host.Host, blocks: int) -> None:
    assert all(run_cooperative(checks, "grid", blocks, seed) for seed in range(4))


# Each shows under every seed, though no more than one barrier of six is gone.
@pytest.mark.parametrize("fault", ["cluster_no_step", "cluster_one_buffer", "transfer_one_buffer"])
def test_emulation_shows_a_missing_cluster_barrier(checks: simt_host.Host, fault: str) -> None:
    assert not any(run_cluster(checks, fault, 1, 4, seed) for seed in range(8))


# Before the first barrier the peer may not run yet, after the last it may have returned.
@pytest.mark.parametrize(
    "fault", ["cluster_no_first", "cluster_no_last", "transfer_no_first", "transfer_no_last"]
)
def test_emulation_shows_access_to_a_block_that_does_not_run(program: Path, fault: str) -> None:
    for seed in range(4):
        with simt_host.Host(program) as running, pytest.raises(simt_host.Fault) as caught:
            run_cluster(running, fault, 1, 4, seed)
        not_yet = "a transfer's barrier that nobody has initialised"
        assert "use-after-poison" in str(caught.value) or not_yet in str(caught.value)


# A block's barrier in place of the cluster's; a wait left out; a byte count that is too small.
@pytest.mark.parametrize("fault", ["cluster_no_block", "transfer_no_step", "transfer_few_bytes"])
def test_emulation_shows_a_step_too_early(program: Path, fault: str) -> None:
    for seed in range(4):
        with simt_host.Host(program) as running:
            try:
                right = run_cluster(running, fault, 1, 4, seed)
            except simt_host.Fault:
                right = False
        assert not right


# A wait left out; a flag set by a block's first thread without a barrier for the others.
@pytest.mark.parametrize("fault", ["no_step", "no_block"])
def test_emulation_shows_a_missing_grid_barrier(checks: simt_host.Host, fault: str) -> None:
    assert not any(run_cooperative(checks, f"grid_{fault}", 5, seed) for seed in range(8))


@pytest.mark.parametrize("name", ["copy", "copy_no_wait", "copy_no_barrier"])
def test_emulation_copies_as_late_as_allowed(checks: simt_host.Host, name: str) -> None:
    source = floats(5 * 64).reshape(5, 64)
    for seed in range(8):
        result = np.zeros_like(source)
        assert checks.call(name, [source, result], [0, 0, 1, 0, 5], seed=seed) is None
        if name == "copy":
            np.testing.assert_array_equal(result, source[:, ::-1])
        else:
            assert np.isnan(result).any()


GROUP_FAULTS = [
    ("arrive_twice", "again, without a wait between"),
    ("wait_alone", "without having arrived"),
    ("arrive_apart", "threads of a warp arrive apart at the cluster's barrier"),
    ("leave_cluster", "32 threads have returned, 32 threads wait at the cluster's barrier"),
    ("no_such_rank", "shared memory of rank 2 in a cluster of 2 blocks"),
    ("peer_past_end", "heap-buffer-overflow"),
    ("poll", "deadlock in block (0, 0, 0) and 1 more: 64 threads poll memory"),
    ("half_warp_mma", "deadlock in block (0, 0, 0): 16 threads have returned"),
    ("ldmatrix_past_end", "heap-buffer-overflow"),
    ("wrong_mask", "lanes of one warp meet in different exchanges"),
]


@pytest.mark.parametrize(("name", "message"), GROUP_FAULTS)
def test_emulation_reports_faults_of_groups(program: Path, name: str, message: str) -> None:
    with simt_host.Host(program) as running, pytest.raises(simt_host.Fault) as caught:
        running.call(name, [np.full(32, 4 * (name == "peer_past_end"), np.uint32)], [0, 0])
    assert message in str(caught.value)


def test_emulation_reports_a_copy_past_the_end(program: Path) -> None:
    buffers = [np.zeros(64, np.float32), np.zeros(64, np.float32)]
    with simt_host.Host(program) as running, pytest.raises(simt_host.Fault) as caught:
        running.call("copy_past_end", buffers, [0, 0, 1, 0, 1])
    assert "heap-buffer-overflow" in str(caught.value)


def test_launch_errors(checks: simt_host.Host) -> None:
    def launch(
        blocks: int = 1, threads: int = 32, shared: int = 0, cluster: int = 1, cooperative: int = 0
    ) -> str | None:
        return checks.call("launch_error", [], [blocks, threads, shared, cluster, cooperative, 1])

    most = 227 << 10
    assert launch(16, 32, most, 16) is launch(1, 1024) is None
    assert launch(132, 1, most, cooperative=1) is None
    assert launch(132 * 32, 1, cooperative=1) is None  # 32 blocks on a multiprocessor
    assert launch(shared=most + 1) == "invalid argument"
    assert launch(threads=1025) == "invalid configuration argument"
    assert launch(0) == "invalid configuration argument"
    assert launch(17, cluster=17) == launch(5, cluster=4) == "invalid cluster size"
    too_large = "too many blocks in cooperative launch"
    assert launch(133, shared=most, cooperative=1) == too_large
    assert launch(132 * 2 + 1, 1024, cooperative=1) == too_large
    assert launch(132 * 32 + 1, 1, cooperative=1) == too_large
    # A launch that asks for no more than a plain one gets 48 KiB.
    assert checks.call("launch_error", [], [1, 32, 48 << 10, 1, 0, 0]) is None
    assert checks.call("launch_error", [], [1, 32, (48 << 10) + 1, 1, 0, 0]) == "invalid argument"


# Accesses that nothing puts in an order, found under any schedule.


@pytest.fixture(scope="session")
def racing(program: Path) -> Path:
    return simt_host.build("checks", races=True)


def run_check(host: simt_host.Host, name: str, seed: int) -> None:
    if name.startswith(("cluster", "transfer")):
        assert run_cluster(host, name, 1, 4, seed)
    elif name.startswith("grid"):
        assert run_cooperative(host, name, 5, seed)
    else:
        buffers = [np.zeros(320, np.float32) for _ in range(2)]
        assert host.call(name, buffers, [0, 0, 1, 0, 5], seed=seed) is None


@pytest.mark.parametrize("name", ["cluster", "transfer", "grid", "copy", "reverse", "atomics"])
def test_no_race_where_there_is_none(racing: Path, name: str) -> None:
    with simt_host.Host(racing) as running:
        for seed in range(4):
            run_check(running, name, seed)


@pytest.mark.parametrize(
    ("name", "accesses"),
    [
        ("cluster_no_first", {"reads", "writes"}),
        ("cluster_no_step", {"reads", "writes"}),
        ("cluster_one_buffer", {"reads", "writes"}),
        ("cluster_no_block", {"reads", "writes"}),
        ("transfer_no_step", {"reads", "writes"}),
        ("transfer_one_buffer", {"reads", "writes"}),
        ("grid_no_block", {"reads", "writes"}),
        ("copy_no_barrier", {"reads", "writes"}),
        ("reverse_without_barrier", {"reads", "writes"}),
        ("same_element", {"writes"}),
    ],
)
def test_races_are_found(racing: Path, name: str, accesses: set[str]) -> None:
    for seed in range(3):
        with simt_host.Host(racing) as running, pytest.raises(simt_host.Fault) as caught:
            run_check(running, name, seed)
        found = re.fullmatch(
            r"simt: race: thread \d+ of block \d+ (\w+) at (\S+:\d+).*, "
            r"thread \d+ of block \d+ (\w+) at (\S+:\d+).*\n",
            str(caught.value),
        )
        assert found is not None, caught.value
        assert {found[1], found[3]} == accesses
        for place in (found[2], found[4]):
            assert place.startswith(("checks", "sync.cuh"))


# Warps.


def test_votes_and_shuffles_in_parts_of_a_warp(checks: simt_host.Host) -> None:
    result = np.zeros((32, 8), np.uint32)
    assert checks.call("votes", [result], [0, 0]) is None
    lane = np.arange(32)
    within = lane % 8
    assert (result[:, 0] == sum(1 << k for k in range(0, 32, 3))).all()
    assert (result[:, 1] == 1).all()
    assert (result[:, 2] == 0).all()
    np.testing.assert_array_equal(result[:, 3], lane - within + 3)
    np.testing.assert_array_equal(result[:, 4], lane - 2 * (within >= 2))
    np.testing.assert_array_equal(result[:, 5], lane + 2 * (within < 6))
    np.testing.assert_array_equal(result[:, 6], lane ^ 4)
    # Across parts a lane may read from a lower one only.
    np.testing.assert_array_equal(result[:, 7], np.where(lane & 8, lane ^ 8, lane))


def test_atomics(checks: simt_host.Host) -> None:
    for seed in range(4):
        result = np.zeros(4 + 96, np.uint32)
        assert checks.call("atomics", [result], [0, 0], seed=seed) is None
        np.testing.assert_array_equal(result[:4], [96, 31, 0, 96])
        np.testing.assert_array_equal(np.sort(result[4:]), np.arange(96))


# Where PTX's tables for mma put element i of a lane (groupID = lane >> 2, threadID_in_group =
# lane % 4): a and b in its numbering of single elements, which fill registers lower half first.


def layout_a16(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if i in (0, 1, 4, 5) else (lane >> 2) + 8
    column = (lane % 4) * 2 + (i & 1) if i < 4 else (lane % 4) * 2 + (i & 1) + 8
    return row, column


def layout_b16(lane: int, i: int) -> tuple[int, int]:
    row = (lane % 4) * 2 + (i & 1) if i < 2 else (lane % 4) * 2 + (i & 1) + 8
    return row, lane >> 2


def layout_a_tf32(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if i in (0, 2) else (lane >> 2) + 8
    return row, lane % 4 if i < 2 else lane % 4 + 4


def layout_b_tf32(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 if i == 0 else lane % 4 + 4, lane >> 2


def layout_d(lane: int, i: int) -> tuple[int, int]:
    return lane >> 2 if i < 2 else (lane >> 2) + 8, (lane % 4) * 2 + (i & 1)


def in_registers(matrices: np.ndarray, elements: int, layout: Layout) -> np.ndarray:
    """[count, rows, columns] to [count, lane, element]"""
    places = np.array([[layout(lane, i) for i in range(elements)] for lane in range(32)])
    assert len(set(map(tuple, places.reshape(-1, 2)))) == matrices[0].size == 32 * elements
    return np.ascontiguousarray(matrices[:, places[..., 0], places[..., 1]])


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_mma_is_a_matrix_product(checks: simt_host.Host, kind: str) -> None:
    count, depth = 20, 8 if kind == "tf32" else 16
    generator = np.random.default_rng(1)
    a, b, d = (
        generator.standard_normal((count, *shape)).astype(np.float32)
        for shape in ((16, depth), (depth, 8), (16, 8))
    )
    for matrices in (a, b):  # so that one element alone decides some products
        matrices[1:4] = 0
        for matrix in matrices[1:4]:
            matrix[tuple(generator.integers(0, matrix.shape))] = 3.0
    if kind == "tf32":
        a_bits, b_bits = a.view(np.uint32), b.view(np.uint32)
        # The lower bits are not read.
        a, b = ((bits & 0xFFFFE000).view(np.float32) for bits in (a_bits, b_bits))
        left = in_registers(a_bits, 4, layout_a_tf32)
        right = in_registers(b_bits, 2, layout_b_tf32)
    else:
        dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
        a_half, b_half = (torch.from_numpy(matrix).to(dtype) for matrix in (a, b))
        a, b = a_half.float().numpy(), b_half.float().numpy()
        left = in_registers(a_half.view(torch.int16).numpy(), 8, layout_a16).view(np.uint32)
        right = in_registers(b_half.view(torch.int16).numpy(), 4, layout_b16).view(np.uint32)
    result = in_registers(d, 4, layout_d)
    integers = [0, 0, 1, 0, 2, 0, count]
    assert checks.call(f"mma_{kind}", [result, left, right], integers) is None
    exact = d.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)
    # One rounding, and of the fp64 sum at most a neighbour of it.
    expected = in_registers(exact, 4, layout_d)
    np.testing.assert_allclose(result, expected, rtol=2.0**-23, atol=1e-14)


@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(checks: simt_host.Host, matrices: int) -> None:
    source = np.arange(matrices * 64, dtype=np.uint16).reshape(matrices, 8, 8)
    for name, stored in (("", source), ("_transposed", source.transpose(0, 2, 1))):
        result = np.zeros((32, matrices), np.uint32)
        assert checks.call(f"ldmatrix_{matrices}{name}", [source, result], [0, 0, 1, 0]) is None
        for lane in range(32):
            row, column = lane // 4, lane % 4 * 2
            pair = stored[:, row, column] | stored[:, row, column + 1].astype(np.uint32) << 16
            np.testing.assert_array_equal(result[lane], pair)


def test_tf32_rounding(checks: simt_host.Host) -> None:
    bits = words((50000,), 0)
    bits[:5000] = bits[:5000] & 0xFFFFE000 | 0x1000  # halfway
    rounded = bits.copy()
    assert checks.call("round_tf32", [rounded], [0, 0, len(bits)]) is None
    with np.errstate(invalid="ignore"):
        values, results = (array.view(np.float32).astype(np.float64) for array in (bits, rounded))
    numbers = np.isfinite(values) & (np.abs(values) < 3.4e38)
    assert np.isnan(results[np.isnan(values)]).all()
    assert (rounded[numbers] & 0x1FFF == 0).all()
    step = np.exp2(np.maximum(np.floor(np.log2(np.abs(values[numbers]))), -126) - 10)
    half_away = np.sign(values[numbers]) * np.floor(np.abs(values[numbers]) / step + 0.5) * step
    np.testing.assert_array_equal(results[numbers], half_away)


# What nvcc makes of the checks.

# The emulation's own checks are CUDA, and its words become the instructions that they are for.
INSTRUCTIONS = {
    "cluster_kernel<0>": {"UCGABAR_ARV", "UCGABAR_WAIT"},
    "transfer_kernel<0>": {"STAS", "SYNCS"},
    "grid_kernel<0>": {"BAR", "MEMBAR", "CCTL"},  # CCTL: an acquire drops what L1 holds
    "copy_kernel<1, true>": {"LDGSTS", "LDGDEPBAR", "DEPBAR"},
    "mma_kernel<fastseq::Bf16>": {"HMMA"},
    "mma_kernel<fastseq::F16>": {"HMMA"},
    "mma_kernel<simt::Tf32>": {"HMMA"},
    "ldmatrix_kernel<4, false>": {"LDSM"},
    "ldmatrix_kernel<2, true>": {"LDSM"},
}


@pytest.mark.skipif(_nvcc.nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_checks_are_cuda(arch: str) -> None:
    folder = ROOT / "tests" / "simt"
    report = {}
    for name in ("checks_group", "checks_warp"):
        report |= _nvcc.report(folder / f"{name}.cpp", arch)
    for name, expected in INSTRUCTIONS.items():
        if arch == "sm_80" and name.startswith(("cluster", "transfer")):
            continue  # traps there
        assert expected <= report[name].opcodes, name
