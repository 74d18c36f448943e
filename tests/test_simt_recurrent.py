"""The persistent recurrent kernels without a GPU: their plan, and every kernel run on the host."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastseq import _extension

sys.path.insert(0, str(Path(__file__).parent))
from simt import host as simt_host
from simt import recurrent_faults, recurrent_table
from simt.recurrent import (
    A100,
    Layer,
    check_backward,
    check_forward,
    parameters,
    plan,
    run_backward,
    run_both_backward,
    run_both_forward,
    run_forward,
)

KINDS = ("lstm", "gru", "tanh", "relu")
ARITHMETICS = ("bf16", "f16", "tf32", "f32")
FEW = (2, 232448, 16)  # so few multiprocessors that blocks take two tiles of rows in turns


@pytest.fixture(scope="session")
def host() -> Iterator[simt_host.Host]:
    if simt_host.compiler() is None:
        pytest.skip("no C++ compiler")
    with simt_host.Host(simt_host.build("recurrent")) as running:
        yield running


def check(host: simt_host.Host, layer: Layer, seed: int = 0) -> None:
    made = check_forward(host, layer, seed)
    check_backward(host, layer, made, seed)


# The plan.


def plan_or_none(host: simt_host.Host, layer: Layer, backward: bool) -> dict[str, int] | None:
    try:
        return plan(host, layer, backward)
    except ValueError:
        return None


@pytest.mark.parametrize("backward", [False, True])
def test_plans_fit_the_chip(host: simt_host.Host, backward: bool) -> None:
    served = 0
    for kind, arithmetic in itertools.product(("lstm", "gru", "tanh"), ARITHMETICS):
        element = 2 if arithmetic.endswith("16") else 4
        for hidden, batch in itertools.product((1, 33, 128, 200, 256, 512, 640, 1000), (1, 64)):
            layer = Layer(kind, arithmetic, batch=batch, hidden=hidden)
            for chip in (layer.chip, A100):
                found = plan_or_none(host, dataclasses.replace(layer, chip=chip), backward)
                if found is None:
                    # What is turned down is large: its weights, or backward the state.
                    gates = layer.gates * hidden * element
                    assert gates * hidden > chip[0] * chip[1] or gates * 16 > chip[1] / 2, layer
                    continue
                served += 1
                assert found["shared_bytes"] <= chip[1]
                limit = chip[0] if found["exchange"] == 2 else chip[2]
                assert found["blocks"] <= limit
                assert found["threads"] == 32 * found["tiles"] * found["splits"] <= 512
                assert found["units"] * found["blocks"] >= hidden
                assert found["groups"] * found["rows"] >= batch
                inner = (layer.gates if backward else 1) * hidden
                assert found["chunks"] * found["partners"] * 64 >= inner * element
                assert found["split_chunks"] * found["splits"] >= found["chunks"]
                assert found["weight_bytes"] * found["blocks"] >= layer.gates * hidden**2 * element
    assert served > 60


def test_how_a_sum_is_taken_does_not_depend_on_the_batch(host: simt_host.Host) -> None:
    for kind, hidden, backward in itertools.product(KINDS[:3], (64, 192, 512), (False, True)):
        order = set()
        for batch in (1, 8, 9, 64, 100):
            found = plan(host, Layer(kind, batch=batch, hidden=hidden), backward)
            order.add((found["units"], found["splits"], found["split_chunks"], found["chunks"]))
        assert len(order) == 1


def test_a_block_then_a_cluster_then_a_grid(host: simt_host.Host) -> None:
    for backward in (False, True):
        exchanges = [
            plan(host, Layer(hidden=hidden), backward)["exchange"] for hidden in (64, 400, 900)
        ]
        assert exchanges == [0, 1, 2]
        # Without clusters.
        for hidden, exchange in ((64, 0), (400, 2)):
            found = plan(host, Layer(hidden=hidden, chip=A100), backward)
            assert found["exchange"] == exchange


def test_plans_that_are_turned_down(host: simt_host.Host) -> None:
    with pytest.raises(ValueError, match="weights and the state do not fit on the chip"):
        plan(host, Layer(hidden=4096), False)
    with pytest.raises(ValueError, match="more rows than fit the chip"):
        plan(host, Layer(hidden=512, batch=4096), False)
    with pytest.raises(ValueError, match="without elements"):
        plan(host, Layer(batch=0), False)


def on_device(
    host: simt_host.Host, layer: Layer, number: int = 1, backward: bool = False
) -> dict[str, int]:
    """The plan that asks the runtime of an emulated GPU, which is not the current one."""
    figures = np.zeros(8, np.int64)
    task = layer.task()[:5]
    error = host.call("plan_on_device", [figures], [int(backward), number, *task, 0, 0])
    if error is not None:
        raise ValueError(error)
    names = ("exchange", "blocks", "asked", "current", "allowed", "bytes", "partners", "at_once")
    return dict(zip(names, figures.tolist(), strict=True))


def test_the_plan_on_a_device_asks_that_device() -> None:
    if simt_host.compiler() is None:
        pytest.skip("no C++ compiler")
    with simt_host.Host(simt_host.build("recurrent")) as host:
        layer = Layer(hidden=512)
        assert host.call("device", [], [1, 132, 232448, 9, 16]) is None
        whole = on_device(host, layer)
        assert (whole["exchange"], whole["blocks"]) == (1, 16)
        assert (whole["asked"], whole["current"]) == (1, 0)
        assert on_device(host, layer)["asked"] == 1  # remembered
        # A smaller layer's plan takes nothing back from the same kernel.
        assert on_device(host, Layer(hidden=40))["allowed"] >= whole["bytes"]
        # No room for sixteen, nor for eight: smaller clusters, then a grid.
        for largest, batch, expected in ((8, 2, (1, 8)), (1, 4, (2, 24))):
            assert host.call("device", [], [1, 132, 232448, 9, largest]) is None
            found = on_device(host, Layer(hidden=384, batch=batch))
            assert (found["exchange"], found["blocks"]) == expected, largest
        # Other generations: of 12 clusters have eight blocks, of 8 none.
        for major, shared, expected in ((12, 101376, (1, 8)), (8, 166912, (2, 0))):
            assert host.call("device", [], [1, 108, shared, major, 16]) is None
            found = on_device(host, Layer(hidden=256, batch=major))
            assert found["exchange"] == expected[0], major
            assert found["blocks"] == expected[1] or expected[1] == 0
        with pytest.raises(ValueError, match="do not fit on the chip"):
            on_device(host, Layer(hidden=4096))
        # Clusters within a grid: as many partners as find room, of which more than eight only
        # where no fewer serve; and no more groups in a launch than run at once.
        large = Layer(hidden=1792)
        for largest, batch, partners in ((16, 8, 8), (4, 16, 4)):
            assert host.call("device", [], [1, 132, 232448, 9, largest]) is None
            found = on_device(host, dataclasses.replace(large, batch=batch), backward=True)
            assert (found["exchange"], found["blocks"]) == (2, 112)
            assert found["partners"] == partners, largest
        assert host.call("device", [], [1, 132, 232448, 9, 15]) is None
        twice = Layer("gru", hidden=1280, batch=16)
        assert plan(host, twice, True)["at_once"] == 2  # the estimate
        found = on_device(host, twice, backward=True)
        assert (found["blocks"], found["partners"], found["at_once"]) == (40, 8, 1)
        assert host.call("device", [], [1, 132, 232448, 9, 1]) is None
        with pytest.raises(ValueError, match="do not fit on the chip"):
            on_device(host, dataclasses.replace(large, batch=17), backward=True)


@pytest.mark.skipif(_extension.UNAVAILABLE is not None, reason="needs the extension")
def test_documented_plans_are_the_plans() -> None:
    text = recurrent_table.DOCUMENT.read_text()
    _, _, rest = text.partition(recurrent_table.BEGIN)
    assert rest.partition(recurrent_table.END)[0] == recurrent_table.table()


# The kernels. What every test takes is a sample of all combinations; the slow test takes more.

ODD = [
    # steps, batch, hidden, blocks
    (1, 1, 1, 1),
    (2, 3, 7, 1),
    (3, 9, 33, 1),
    (5, 8, 64, 1),
    (2, 2, 120, 1),
    (3, 3, 33, 2),
    (4, 5, 50, 4),
    (3, 9, 100, 8),
    (3, 2, 70, 16),
    (40, 2, 24, 1),
    (40, 1, 40, 2),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_shapes(host: simt_host.Host, kind: str, shape: tuple[int, int, int, int]) -> None:
    steps, batch, hidden, blocks = shape
    turn = ODD.index(shape) + KINDS.index(kind)
    layer = Layer(kind, ARITHMETICS[turn % 4], steps, batch, hidden, blocks)
    check(host, layer, seed=turn)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("kind", KINDS)
def test_arithmetics(host: simt_host.Host, kind: str, arithmetic: str) -> None:
    for blocks, splits in ((1, 2), (2, 1), (4, 2)):
        check(host, Layer(kind, arithmetic, 3, 3, 60, blocks, splits))


FULL = {"lengths": (4, 0, 1, 3, 9), "batch": 5, "steps": 4}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changed",
    [
        {"reverse": True},
        FULL,
        {**FULL, "reverse": True},
        {**FULL, "reverse": True, "blocks": 4, "bptt": 2},
        {"keep": True},
        {"keep": True, "arithmetic": "tf32", "blocks": 2},
        {"bptt": 2, "steps": 5},
        {"grad_clip": 0.05, "steps": 4},
        {"transposed": True},
        {"shifted": True, "hidden": 48},
        {"hidden": 48, "batch": 8, "blocks": 2},
        {"chip": FEW, "batch": 19, "hidden": 48},
        {"chip": FEW, "batch": 13, "hidden": 36, "blocks": 2, "splits": 2, "arithmetic": "f16"},
    ],
    ids=str,
)
def test_options(host: simt_host.Host, kind: str, changed: dict[str, object]) -> None:
    layer = dataclasses.replace(Layer(kind), **changed)
    if "chip" in changed:
        assert plan(host, layer, False)["strands"] == plan(host, layer, True)["strands"] == 2
    check(host, layer)


GRIDS = [
    {"steps": 5, "hidden": 100, "blocks": 4},
    {"steps": 3, "hidden": 50, "arithmetic": "f32", "blocks": 2, "splits": 2},
    {"steps": 40, "batch": 1, "hidden": 24, "arithmetic": "f16"},
    # Two launches, of two tiles of rows each.
    {"steps": 4, "batch": 19, "hidden": 64, "blocks": 4, "chip": (6, 232448, 1), "reverse": True},
    {**FULL, "hidden": 48, "arithmetic": "tf32"},
    # Two tiles of rows in turns; of the second, no rows or some.
    {"steps": 3, "hidden": 40, "blocks": 2, "strands": 2, "arithmetic": "f16"},
    {"steps": 5, "batch": 13, "hidden": 48, "strands": 2, "splits": 1, "bptt": 2},
    {"steps": 1, "batch": 9, "hidden": 30, "strands": 2},
    # Clusters that share the product; the last block has none of 33 units.
    {"steps": 5, "hidden": 100, "blocks": 8, "splits": 1, "partners": 4, "arithmetic": "f16"},
    {"steps": 3, "hidden": 60, "blocks": 4, "splits": 2, "partners": 2, "arithmetic": "f32"},
    {**FULL, "hidden": 33, "blocks": 4, "splits": 1, "partners": 2, "reverse": True, "bptt": 2},
    {"batch": 13, "hidden": 64, "blocks": 4, "splits": 1, "partners": 2, "strands": 2},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", GRIDS, ids=str)
def test_grids(host: simt_host.Host, kind: str, changed: dict[str, object]) -> None:
    layer = dataclasses.replace(Layer(kind, exchange="grid"), **changed)
    if "chip" in changed:
        found = plan(host, layer, True)
        assert (found["strands"], found["waves"]) == (2, 2)
    else:
        found = plan(host, layer, False)
        assert found["strands"] == max(1, layer.strands)
        assert found["partners"] == max(1, layer.partners)
    for seed in range(3):
        check(host, layer, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_registers_and_in_shared_memory(host: simt_host.Host, kind: str) -> None:
    # One split, so that a warp has more chunks of weights than registers for them.
    layer = Layer(kind, steps=2, batch=2, hidden=290 if kind in ("tanh", "relu") else 168, blocks=4)
    layer = dataclasses.replace(layer, splits=1)
    assert plan(host, layer, False)["split_chunks"] > 4
    check(host, layer)
    shared = dataclasses.replace(layer, arithmetic="f32", exchange="grid", partners=2)
    assert plan(host, shared, False)["split_chunks"] > 4
    check(host, shared)


def test_a_large_layer_by_partners(host: simt_host.Host) -> None:
    """What no block has room for otherwise, as the plan for an H200 has it."""
    for kind, arithmetic, hidden in (
        ("lstm", "bf16", 1792), ("lstm", "f16", 1920), ("lstm", "f32", 1024), ("gru", "f32", 1024)
    ):  # fmt: skip
        layer = Layer(kind, arithmetic, hidden=hidden, batch=8)
        found = plan(host, layer, True)
        assert found["partners"] > 1
        assert found["chunks"] * found["partners"] * 64 >= layer.gates * hidden * (
            2 if arithmetic.endswith("16") else 4
        )
        with pytest.raises(ValueError, match="do not fit"):
            plan(host, dataclasses.replace(layer, partners=1), True)
        # How a sum is taken does not depend on the batch.
        many = plan(host, dataclasses.replace(layer, batch=16), True)
        for name in ("units", "partners", "splits", "split_chunks", "chunks"):
            assert many[name] == found[name]


SIDE_BY_SIDE = [
    {"exchange": "block", "blocks": 1, "splits": 2, "lengths": (3, 1, 0)},
    {"blocks": 2, "batch": 9},
    {"blocks": 4, "keep": True, "hidden": 64, "batch": 8},
    {"exchange": "grid", "blocks": 2, "arithmetic": "f16", "batch": 9},
    # A group at a time: the other direction's launch comes after.
    {"exchange": "grid", "blocks": 4, "hidden": 60, "chip": (5, 232448, 1), "steps": 5},
    {"chip": FEW, "batch": 19, "blocks": 2, "arithmetic": "tf32"},
    # Three tiles of rows in turns by two: the fourth is nobody's, not the other direction's.
    {"exchange": "grid", "blocks": 2, "batch": 19, "hidden": 40, "strands": 2, "splits": 1},
    {"exchange": "grid", "blocks": 4, "hidden": 60, "partners": 2, "splits": 1},
]


@pytest.mark.parametrize("changed", SIDE_BY_SIDE, ids=str)
def test_both_directions_have_the_bits_of_each_alone(
    host: simt_host.Host, changed: dict[str, object]
) -> None:
    turn = SIDE_BY_SIDE.index(changed)
    first = dataclasses.replace(Layer(KINDS[turn % 3]), **changed)
    second = dataclasses.replace(first, reverse=True, draw=1, shifted=turn % 2 == 0)
    assert plan(host, first, False, directions=2)["waves"] >= plan(host, first, False)["waves"]
    made = run_both_forward(host, (first, second), turn)
    found = run_both_backward(host, (first, second), made, turn)
    for i, layer in enumerate((first, second)):
        alone = run_forward(host, layer, turn)
        for mine, other in ((alone, made[i]), (run_backward(host, layer, alone, turn), found[i])):
            assert set(mine) == set(other)
            for name, value in mine.items():
                np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_directions_that_are_not_alike(host: simt_host.Host) -> None:
    first = Layer("lstm", blocks=2)
    with pytest.raises(ValueError, match="of one shape and one batch"):
        run_both_forward(host, (first, dataclasses.replace(first, steps=2)))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_lengths_past_32_bits(host: simt_host.Host, kind: str) -> None:
    """They are clamped as they come, in 64 bits: cast to 32 first, these would be 1, 0, 2 and 3."""
    lengths = (2**32 + 1, -(2**32), -(2**32) + 2, -(2**40) + 3, 2, -1, 2**63 - 1, -(2**63))
    for reverse in (False, True):
        layer = Layer(kind, steps=3, batch=8, hidden=24, lengths=lengths, reverse=reverse)
        check(host, layer)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_gradients_that_are_not_given(host: simt_host.Host, kind: str) -> None:
    layer = Layer(kind, blocks=2)
    made = check_forward(host, layer)
    names = ("grad_output", "grad_cells", "grad_h_n", "grad_c_n")
    for absent in (*((name,) for name in names), names[:3]):
        check_backward(host, layer, made, absent=absent)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_inference_has_the_same_bits(host: simt_host.Host, kind: str) -> None:
    layer = Layer(kind, blocks=2, lengths=(3, 1, 2))
    saved, bare = run_forward(host, layer), run_forward(host, layer, save=False)
    assert set(bare) == set(saved) - {"gates", "cells"}
    for name, value in bare.items():
        np.testing.assert_array_equal(value, saved[name])


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_row_does_not_depend_on_its_batch(host: simt_host.Host, kind: str) -> None:
    few = Layer(kind, batch=3, hidden=48, blocks=2)
    many = dataclasses.replace(few, batch=20, chip=FEW)
    assert plan(host, many, True)["strands"] == 2 != plan(host, few, True)["strands"]
    given = parameters(many)
    mine = {
        name: value if name in ("weight_hh", "bias_hh") else value[..., :3, :]
        for name, value in given.items()
    }
    all_rows = run_forward(host, many)
    own = run_forward(host, few, **mine)
    back_all = run_backward(host, many, all_rows)
    back_own = run_backward(host, few, {**mine, **own})
    for every, own_rows in ((all_rows, own), (back_all, back_own)):
        for name, value in own_rows.items():
            np.testing.assert_array_equal(value, every[name][..., :3, :], err_msg=name)


@pytest.mark.parametrize(
    ("exchange", "blocks", "splits"),
    [("block", 1, 1), ("block", 1, 2), ("cluster", 2, 1), ("cluster", 4, 2), ("cluster", 16, 1),
     ("grid", 4, 1), ("partners", 4, 1)],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS[:3])
def test_same_bits_under_every_schedule(
    host: simt_host.Host, kind: str, exchange: str, blocks: int, splits: int
) -> None:
    layer = Layer(kind, "bf16", 6, 8, 64, blocks, splits, exchange=exchange)
    if exchange == "partners":
        layer = dataclasses.replace(layer, exchange="grid", partners=2)
    results = set()
    for seed in range(8):
        made = run_forward(host, layer, seed)
        found = run_backward(host, layer, made, seed)
        results.add(b"".join(v.tobytes() for v in (*made.values(), *found.values())))
    assert len(results) == 1


def test_nan_stays_in_its_row(host: simt_host.Host) -> None:
    layer = Layer("gru", blocks=2)
    x = parameters(layer)["gates_x"]
    x[1, 1, 5] = np.nan
    made = run_forward(host, layer, gates_x=x)
    assert np.isnan(made["output"][1:, 1]).any()
    assert np.isfinite(made["output"][:, [0, 2]]).all()
    found = run_backward(host, layer, made)
    assert np.isnan(found["gates_x"][:, 1]).any()
    assert np.isfinite(found["gates_x"][:, [0, 2]]).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_every_combination(host: simt_host.Host, kind: str, arithmetic: str) -> None:
    sizes = itertools.product((1, 2, 7), (1, 8, 17), (1, 31, 64, 90), (1, 2, 4, 8, 16))
    for turn, (steps, batch, hidden, blocks) in enumerate(sizes):
        layer = Layer(kind, arithmetic, steps, batch, hidden, blocks, reverse=turn % 2 == 1)
        check(host, layer, seed=turn)


# That the tests would notice.


@pytest.fixture(scope="session")
def faulty() -> Path:
    if simt_host.compiler() is None:
        pytest.skip("no C++ compiler")
    return recurrent_faults.build()


@pytest.mark.parametrize("name", recurrent_faults.FAULTS)
def test_a_missing_order_is_noticed(faulty: Path, name: str) -> None:
    exchange = "grid" if "grid" in name or "partner" in name else "cluster"
    for seed in range(16):
        with simt_host.Host(faulty) as host:
            number = list(recurrent_faults.FAULTS).index(name)
            assert host.call("fault", [], [number]) is None
            layer = Layer("lstm", "bf16", 6, 8, 64, 2, 1 + seed % 2, exchange=exchange)
            if "strand" in name:
                layer = dataclasses.replace(layer, batch=16, strands=2)
            if "partner" in name:
                layer = dataclasses.replace(layer, hidden=100, blocks=8, splits=1, partners=4)
            try:
                if "direction" in name:
                    other = dataclasses.replace(layer, draw=1)
                    made = run_both_forward(host, (layer, other), seed)[1]
                    np.testing.assert_array_equal(made["h_n"], run_forward(host, other)["h_n"])
                else:
                    check(host, layer, seed)
            except (AssertionError, simt_host.Fault):
                return
    pytest.fail("nothing was noticed under any schedule")


def test_without_a_fault_nothing_is_noticed(faulty: Path) -> None:
    with simt_host.Host(faulty) as host:
        for seed in range(16):
            for exchange in ("cluster", "grid"):
                layer = Layer("lstm", "bf16", 6, 8, 64, 2, 1 + seed % 2, exchange=exchange)
                check(host, layer, seed)
                if exchange == "grid":
                    check(host, dataclasses.replace(layer, batch=16, strands=2), seed)
                    wide = dataclasses.replace(layer, hidden=100, blocks=8, splits=1)
                    check(host, dataclasses.replace(wide, partners=4), seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_races(kind: str) -> None:
    """Every two accesses to one place are ordered, whatever the schedule."""
    if simt_host.compiler() is None:
        pytest.skip("no C++ compiler")
    with simt_host.Host(simt_host.build("recurrent", races=True)) as host:
        for turn, (arithmetic, (exchange, blocks, splits)) in enumerate(
            itertools.product(
                ARITHMETICS,
                (("block", 1, 2), ("cluster", 4, 1), ("grid", 2, 2), ("partners", 4, 1)),
            )
        ):
            partners = 2 if exchange == "partners" else 0
            layer = Layer(kind, arithmetic, 5, 5, 64, blocks, splits, partners=partners)
            layer = dataclasses.replace(layer, exchange="grid" if partners else exchange)
            layer = dataclasses.replace(layer, strands=1 + turn % 2)
            layer = dataclasses.replace(layer, lengths=(5, 0, 2, 4, 5), reverse=turn % 2 == 1)
            check(host, layer, seed=turn)
