"""Internals of the Triton layer_norm that its public tests do not reach, in the interpreter."""

from __future__ import annotations

import pytest
import torch

import fastseq
from fastseq import functional
from fastseq import random as twin

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastseq.kernels import common, layer_norm, layer_norm_backward
from fastseq.kernels.common import INTERPRETED, RowStrides, random_bits, row_key

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="Triton's interpreter is off (TRITON_INTERPRET=1)"
)


@pytest.fixture
def short_limits(monkeypatch):
    """Rows above 64 elements are split, into tiles of 64 or fewer."""
    monkeypatch.setattr(layer_norm, "FORWARD_LIMIT", 128)
    monkeypatch.setattr(layer_norm_backward, "BACKWARD_LIMIT", 64)


def _gradients(call, inputs, grads):
    outputs = call(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads[: len(outputs)])]


@needs_interpreter
@pytest.mark.parametrize("row_length", [65, 128, 160, 257])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("rms", [False, True])
def test_split_rows(short_limits, row_length, rows, rms):
    assert layer_norm.forward_launch(row_length, 4, layer_norm.FORWARD_LIMIT).split
    assert layer_norm_backward.backward_launch(
        row_length, 8, 90, layer_norm_backward.BACKWARD_LIMIT
    ).split
    inputs = [
        torch.randn(rows, row_length) + 100,
        torch.randn(rows, row_length),
        torch.randn(row_length),
        *([] if rms else [torch.randn(row_length)]),
    ]
    grads = [torch.randn(rows, row_length) for _ in range(2)]
    norm = functional.add_rms_norm if rms else functional.add_layer_norm

    def call(input, residual, *parameters):
        return norm(input, residual, (row_length,), *parameters)

    oracle = _gradients(
        call, [t.double().requires_grad_() for t in inputs], [g.double() for g in grads]
    )
    with fastseq.use_backend("triton"):
        results = _gradients(call, [t.requires_grad_() for t in inputs], grads)
    # Around a mean of 100 an input is rounded by 100 * 2^-24; what follows has the size of 1 to 30.
    for result, expected in zip(results, oracle, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=2e-5, atol=1e-4)


@needs_interpreter
@pytest.mark.parametrize("length", [40, 200])
def test_dropout_draws_the_same_mask_in_either_direction_and_path(short_limits, length):
    """The gradient of what was dropped is 0, and of what was kept that of the residual, scaled."""
    input = torch.randn(5, length, requires_grad=True)
    residual = torch.zeros(5, length, requires_grad=True)
    with fastseq.use_backend("triton"):
        _, new = functional.add_layer_norm(input, residual, (length,), dropout_p=0.4)
        grad_input, grad_residual = torch.autograd.grad(
            new, (input, residual), torch.rand(5, length) + 1
        )
    kept = new.detach() != 0
    assert 0.4 < kept.float().mean() < 0.8
    torch.testing.assert_close(grad_input, grad_residual * kept / 0.6)


@needs_interpreter
@pytest.mark.parametrize("length", [33, 200])
def test_a_row_does_not_depend_on_the_others(short_limits, length):
    x = torch.randn(9, length)
    grad = torch.randn(9, length)

    def run(rows):
        leaf = x[rows].requires_grad_()
        output = functional.layer_norm(leaf, (length,))
        return output, *torch.autograd.grad(output, leaf, grad[rows])

    with fastseq.use_backend("triton"):
        for whole, part in zip(run(slice(None)), run(slice(6, 8)), strict=True):
            assert torch.equal(whole[6:8], part)


@triton.jit
def _bits_kernel(seed, rows, output, M: tl.constexpr, N: tl.constexpr):
    row = tl.load(rows + tl.arange(0, M))
    column = tl.arange(0, N)
    first, second = row_key(tl.load(seed), row)
    bits = random_bits(first[:, None], second[:, None], column[None, :])
    tl.store(output + tl.arange(0, M)[:, None] * N + column[None, :], bits.to(tl.int64))


@needs_interpreter
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
def test_random_bits_are_the_twins(seed):
    seed = torch.tensor([seed])
    output = torch.empty(16, 64, dtype=torch.int64)
    _bits_kernel[(1,)](seed, torch.arange(16), output, M=16, N=64)
    assert torch.equal(output, twin.bits(seed, 16, 64))


@needs_interpreter
def test_random_bits_of_rows_beyond_32_bits():
    """The twin counts rows from 0, so its formula is written out here with Python's integers."""
    mask = 0xFFFFFFFF

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D & mask
        x ^= x >> 15
        x = x * 0x846CA68B & mask
        return x ^ x >> 16

    seed, column = 0x123456789ABCDEF, 7
    rows = [5, 2**31 + 3, 2**32 - 1, 2**32, 2**40 + 5, 2**62]
    expected = []
    for row in rows:
        first = mix(mix(seed & mask) ^ (row & mask))
        second = mix(mix(first + (seed >> 32) & mask) ^ row >> 32)
        x = column + first & mask
        x = (x ^ x >> 16) * 0x7FEB352D & mask ^ second
        x = (x ^ x >> 15) * 0x846CA68B & mask
        expected.append(x ^ x >> 16)
    output = torch.empty(8, 8, dtype=torch.int64)
    _bits_kernel[(1,)](torch.tensor([seed]), torch.tensor([*rows, 0, 0]), output, M=8, N=8)
    assert output[: len(rows), column].tolist() == expected


def test_row_strides():
    x = torch.empty(6, 4, 8)
    assert common.row_strides(None, 8) == RowStrides(None, None, 0)
    assert common.row_strides(x, 8) == RowStrides(None, None, 8)
    assert common.row_strides(x[:, :, :5], 5) == RowStrides(None, None, 8)
    assert common.row_strides(x[:, :3], 8) == RowStrides(3, 32, 8)
    assert common.row_strides(x.transpose(0, 1), 8) == RowStrides(6, 8, 32)
    assert common.row_strides(x[:1, :1].expand(6, 4, 8), 8) == RowStrides(None, None, 0)


def test_vector_width():
    def width(*tensors):
        length = tensors[0].shape[-1]
        strides = tuple(common.row_strides(t[None], length) for t in tensors)
        return common.vector_width(length, strides, *tensors)

    x = torch.empty(4, 768, dtype=torch.bfloat16)
    assert width(x) == 8
    assert width(x.float()) == 8
    assert width(x, x.float()) == 8
    assert width(torch.empty(4, 769)) == 1
    assert width(torch.empty(4, 760, dtype=torch.bfloat16)) == 8  # no multiple of 16
    assert width(torch.empty(4, 756, dtype=torch.bfloat16)) == 4
    assert width(x[:, 2:-6]) == 2  # rows begin on 4 bytes
    assert width(torch.empty(4, 769, dtype=torch.bfloat16)[:, :-1]) == 1  # odd stride


@pytest.mark.parametrize("row_length", [*range(1, 70), 769, 4096, 8192, 8193, 65536, 2**18])
def test_launches_cover_a_row(row_length):
    for size in (2, 4):
        launch = layer_norm.forward_launch(row_length, size, layer_norm.FORWARD_LIMIT)
        assert launch.split or launch.block_n >= row_length
        assert launch.block_m * launch.block_n >= 32
        for architecture in (80, 89, 90, 100, 120):
            launch = layer_norm_backward.backward_launch(
                row_length, 3 * size, architecture, layer_norm_backward.BACKWARD_LIMIT
            )
            assert launch.split or launch.block_n >= row_length
            assert launch.programs * launch.num_warps <= 64


@needs_interpreter
@pytest.mark.parametrize("length", [40, 200])
def test_rows_too_small_for_a_normal_variance(short_limits, length):
    """With an eps of 0 the variance may be subnormal, and takes the scaled reciprocal root."""
    x = torch.randn(3, length) * 1e-20
    with fastseq.use_backend("triton"):
        output = functional.layer_norm(x, (length,), eps=0.0)
    expected = torch.nn.functional.layer_norm(x.double(), (length,), eps=0.0)
    # A variance of 1e-40 is a sum of subnormal squares, each rounded to a multiple of 1.4e-45.
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)
