"""LayerNorm's CUDA kernels without a GPU: run in the emulation."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from simt import host as simt_host
from simt import layer_norm
from simt.layer_norm import Norm, check_backward, check_forward, run_backward, run_forward

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def host() -> Iterator[simt_host.Host]:
    if simt_host.compiler() is None:
        pytest.skip("no C++ compiler")
    with simt_host.Host(simt_host.build("layer_norm")) as running:
        yield running


PLAIN = [
    Norm(),
    Norm("bf16", output="bf16", weight="bf16", bias="bf16"),
    Norm("f16", output="f16", weight="f32", bias="f16", rms=True),
    Norm("f32", output="bf16", weight="f16", bias=None),
]
RESIDUAL = [
    Norm("bf16", "f32", "bf16", weight="bf16", bias=None, dropout=0.25, rms=True),
    Norm("f16", "f16", "f16", weight=None, bias="f16", dropout=0.5),
    Norm("bf16", "bf16", "f32", weight="f32", bias="bf16"),
    Norm("f32", "f32", "f32", dropout=0.1),
]
LENGTHS = [1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 769, 1024, 1128, 4099]
SHAPES = list(itertools.product([0, 1, 3, 37], LENGTHS))


# Over the shapes each test takes every norm in turn; the pairing changes with each length.
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rows", [0, 1, 3, 37])
def test_layer_norm_shapes(host: simt_host.Host, rows: int, length: int) -> None:
    turn = SHAPES.index((rows, length)) + rows
    for norm in (PLAIN[turn % 4], RESIDUAL[(turn // 4 + turn) % 4]):
        check_forward(host, norm, (rows, length))
        check_backward(host, norm, (rows, length))


@pytest.mark.parametrize("length", [64, 260])
@pytest.mark.parametrize("norm", PLAIN + RESIDUAL, ids=str)
def test_layer_norm_dtypes(host: simt_host.Host, norm: Norm, length: int) -> None:
    for layout in ("contiguous", "padded", "ragged", "shifted", "permuted", "broadcast"):
        changed = dataclasses.replace(norm, layout=layout)
        check_forward(host, changed, (13, length))
        check_backward(host, changed, (13, length))


# Rows that fill several vectors a thread, and rows too long for registers, for each vector width.
@pytest.mark.parametrize("length", [4096, 8192, 8193, 8196, 16400])
def test_layer_norm_long_rows(host: simt_host.Host, length: int) -> None:
    for norm in (PLAIN[1], RESIDUAL[0]) if length > 16384 else (*PLAIN[:2], *RESIDUAL[::3]):
        check_forward(host, norm, (2, length))
        check_backward(host, norm, (2, length))


@pytest.mark.parametrize(("norm", "length"), [(PLAIN[1], 264), (RESIDUAL[3], 769)], ids=str)
def test_layer_norm_rows_do_not_depend_on_the_batch(
    host: simt_host.Host, norm: Norm, length: int
) -> None:
    few, many = (run_forward(host, norm, (rows, length))[0] for rows in (2, 300))
    np.testing.assert_array_equal(few.values(), many.values()[:2])
    few, many = (run_backward(host, norm, (rows, length))["grad_x"] for rows in (2, 100))
    np.testing.assert_array_equal(few.values(), many.values()[:2])


# Without a sum over rows the grid is another, without a gradient of rows a part of the kernel is
# left out; long rows have a kernel for each.
@pytest.mark.parametrize("length", [65, 1024, 8196])
def test_layer_norm_gradients_do_not_depend_on_each_other(
    host: simt_host.Host, length: int
) -> None:
    norm = RESIDUAL[3]
    every = run_backward(host, norm, (9, length))
    for wanted in (["grad_x"], ["grad_input"], ["grad_weight"], ["grad_bias"]):
        some = run_backward(host, norm, (9, length), wanted=wanted)
        assert list(some) == wanted
        for name, value in some.items():
            np.testing.assert_array_equal(
                getattr(value, "data", value), getattr(every[name], "data", every[name])
            )


def test_layer_norm_mean_far_above_deviation(host: simt_host.Host) -> None:
    for length in (64, 1024, 8196):
        norm = Norm(mean=1000.0)
        check_forward(host, norm, (3, length))
        check_backward(host, norm, (3, length))


@pytest.mark.parametrize("length", [48, 769, 1024])
def test_layer_norm_same_bits_under_every_schedule(host: simt_host.Host, length: int) -> None:
    norm = RESIDUAL[0]
    forward, backward = set(), set()
    for seed in range(4):
        output, new_residual, _, rstd = run_forward(host, norm, (5, length), seed)
        assert new_residual is not None
        forward.add(output.data.tobytes() + new_residual.data.tobytes() + rstd.tobytes())
        result = run_backward(host, norm, (5, length), seed)
        parts = [getattr(value, "data", value) for value in result.values()]
        backward.add(b"".join(bytes(part) for part in parts))
    assert len(forward) == len(backward) == 1


def test_layer_norm_propagates_nan_and_infinity(
    host: simt_host.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = layer_norm.parameters

    def poisoned(norm: Norm, shape: tuple[int, int]) -> dict[str, np.ndarray]:
        given = original(norm, shape)
        given["input"][1, 5] = np.nan
        given["input"][2, 6] = np.inf
        return given

    monkeypatch.setattr(layer_norm, "parameters", poisoned)
    norm = Norm("bf16", output="bf16")
    for length in (40, 257):
        output = run_forward(host, norm, (4, length))[0].values()
        source = torch.from_numpy(poisoned(norm, (4, length))["input"])
        expected = torch.nn.functional.layer_norm(source, (length,)).numpy()
        np.testing.assert_array_equal(np.isnan(output), np.isnan(expected))
        assert np.isfinite(output[[0, 3]]).all()


def test_layer_norm_refusals(host: simt_host.Host) -> None:
    arguments = layer_norm.Arguments()
    arguments.integers += [1, 4]
    layer_norm.add_matrix(arguments, layer_norm.Matrix((1, 4), "f64").fill(np.ones((1, 4))))
    arguments.absent(3)
    arguments.absent(0)
    arguments.absent(0)
    arguments.integers += [-1, 0, 0]
    arguments.reals += [1.0, 1e-5]
    arguments.integers.append(0)
    layer_norm.add_matrix(arguments, layer_norm.Matrix((1, 4), "f64"))
    arguments.absent(3)
    arguments.absent(0)
    arguments.absent(0)
    error = host.call("layer_norm_forward", arguments.buffers, arguments.integers, arguments.reals)
    assert error == "layer_norm: the CUDA kernels have no float64"


@pytest.mark.slow  # for the time of the compiler
def test_layer_norm_has_no_race(host: simt_host.Host) -> None:
    with simt_host.Host(simt_host.build("layer_norm", races=True)) as running:
        for length in (3, 64, 257, 1128, 8196):
            for norm in (PLAIN[1], RESIDUAL[3]):
                check_forward(running, norm, (5, length))
                check_backward(running, norm, (5, length))
