"""The layer_norm family: every backend against the fp64 oracle, autograd, transforms, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from fastseq import functional
from fastseq.backends import recorded
from fastseq.random import bits, draw_seed, keep_mask
from fastseq.testing.layer_norm import OPERATORS as FAMILY

from .ladder import (
    CPU,
    DTYPES,
    INSTRUCTION_SETS,
    by_threads,
    cases,
    expect_pass,
    expect_same_bits,
    expect_verified,
)

NAMES = [operator.name for operator in FAMILY]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_cpu_kernels(name: str, dtype: torch.dtype) -> None:
    expect_pass(name, "cpu", dtype, cases(name, tiny=False))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_triton_kernels_interpreted(name: str, dtype: torch.dtype) -> None:
    expect_pass(name, "triton", dtype, cases(name, tiny=True))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_other_candidates(name: str, dtype: torch.dtype, backend: str) -> None:
    expect_pass(name, backend, dtype, cases(name, tiny=True))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_instruction_set(instruction_set: str) -> None:
    expect_verified(instruction_set, "layer_norm", "--quick")


def test_results_do_not_depend_on_threads() -> None:
    x = torch.randn(3000, 100, requires_grad=True)
    weight = torch.randn(100, requires_grad=True)
    grad = torch.randn(3000, 100)

    def call() -> list[Tensor]:
        output = functional.layer_norm(x, (100,), weight)
        return [output, *torch.autograd.grad(output, (x, weight), grad)]

    with fastseq.use_backend("cpu"):
        expect_same_bits(by_threads(call))


# --- autograd ------------------------------------------------------------------------------------


def add(name: str, x: Tensor, r: Tensor, weight: Tensor, **options: float) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)  # one mask for all evaluations of a numerical gradient
    function = getattr(functional, name)
    return function(x, r, weight.shape, weight, eps=0.1, **options)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("rms", [False, True])
def test_gradients_are_derivatives(backend: str, rms: bool) -> None:
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 2, 5), (2, 5), (2, 5))
    )
    residual = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if rms:
            return functional.rms_norm(x, (2, 5), weight, 0.1)
        return functional.layer_norm(x, (2, 5), weight, bias, 0.1)

    def added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        name = "add_rms_norm" if rms else "add_layer_norm"
        return add(name, x, residual, weight, dropout_p=0.3)

    with fastseq.use_backend(backend):
        for check_gradient in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            if rms:
                assert check_gradient(lambda x, w: plain(x, w, bias), (x, weight))
            else:
                assert check_gradient(plain, (x, weight, bias))
            assert check_gradient(added, (x, residual, weight))
        assert torch.autograd.gradcheck(
            added, (x, residual, weight), check_forward_ad=True, check_batched_grad=False
        )


def test_one_tensor_in_two_roles_gets_both_gradients() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def twice(x: Tensor) -> Tensor:
        output, new_residual = functional.add_layer_norm(x, x, (6,), eps=0.1)
        return output * new_residual

    with fastseq.use_backend("cpu"):
        assert torch.autograd.gradcheck(twice, (x,))
        assert torch.autograd.gradgradcheck(twice, (x,))


def test_either_output_of_add_may_go_unused() -> None:
    x, r = torch.randn(5, 64, requires_grad=True), torch.randn(5, 64, requires_grad=True)
    with fastseq.use_backend("cpu"):
        output, new_residual = functional.add_layer_norm(x, r, (64,))
        (only_stream,) = torch.autograd.grad(new_residual.sum(), x, retain_graph=True)
        (only_output,) = torch.autograd.grad(output.pow(2).sum(), r)
    assert torch.equal(only_stream, torch.ones_like(x))
    expected = r.detach().requires_grad_()
    F.layer_norm(x.detach() + expected, (64,)).pow(2).sum().backward()
    torch.testing.assert_close(only_output, expected.grad)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_wanted_gradients_are_computed(wanted: str) -> None:
    tensors = {"x": torch.randn(300, 64), "weight": torch.randn(64), "bias": torch.randn(64)}
    tensors[wanted].requires_grad_()
    with fastseq.use_backend("cpu"):
        ours = functional.layer_norm(tensors["x"], (64,), tensors["weight"], tensors["bias"])
    theirs = F.layer_norm(tensors["x"], (64,), tensors["weight"], tensors["bias"])
    grad = torch.randn(300, 64)
    (a,) = torch.autograd.grad(ours, tensors[wanted], grad)
    (b,) = torch.autograd.grad(theirs, tensors[wanted], grad)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_func_transforms(name: str) -> None:
    """grad, vmap, jvp and their compositions give what torch's own function gives."""
    ours, theirs = getattr(functional, name), getattr(F, name)
    x, weight, tangent = torch.randn(3, 4, 8), torch.randn(8), torch.randn(3, 4, 8)

    def values(function: object) -> list[Tensor]:
        def norm(x: Tensor) -> Tensor:
            return function(x, (8,), weight, eps=0.1)  # type: ignore[operator]

        def loss(x: Tensor) -> Tensor:
            return norm(x).pow(3).sum()

        return [
            torch.func.vmap(norm)(x),
            torch.func.vmap(norm, in_dims=1, out_dims=1)(x),
            torch.func.grad(loss)(x),
            torch.func.vmap(torch.func.grad(loss))(x),
            torch.func.jvp(norm, (x,), (tangent,))[1],
            torch.func.jvp(torch.func.grad(loss), (x,), (tangent,))[1],
            torch.func.jacrev(norm)(x[0, :1]),
        ]

    with fastseq.use_backend("cpu"):
        mine = values(ours)
    for a, b in zip(mine, values(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_checkpointing_draws_the_same_dropout_mask() -> None:
    from torch.utils.checkpoint import checkpoint

    x, r = torch.randn(20, 64, requires_grad=True), torch.randn(20, 64)

    def block(x: Tensor) -> Tensor:
        return functional.add_layer_norm(x, r, (64,), dropout_p=0.5)[0]

    grads = []
    for function in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(function(x).pow(2).sum(), x)[0])
    assert torch.equal(*grads)


# --- dropout -------------------------------------------------------------------------------------


def test_random_bits_are_uniform_and_independent_of_the_shape() -> None:
    seed = torch.tensor([-123456789012345])
    drawn = bits(seed, 1000, 512)
    assert torch.equal(drawn[:7, :33], bits(seed, 7, 33))
    assert not torch.equal(drawn, bits(seed + 1, 1000, 512))
    # 512000 bits of each place: a fair coin strays 5 standard deviations once in a million.
    for place in range(32):
        ones = ((drawn >> place) & 1).double().mean()
        assert abs(ones - 0.5) < 5 * 0.5 / 512000**0.5
    neighbours = torch.stack([drawn[:, :-1].flatten(), drawn[:, 1:].flatten()]).double()
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 5 / 511000**0.5
    rows = torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]).double()
    assert abs(torch.corrcoef(rows)[0, 1]) < 5 / 511000**0.5


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_kernels_draw_the_twins_mask(backend: str) -> None:
    """x = 1 and residual = 0: the new residual is the scaled mask itself."""
    shape, p = (3, 5, 67), 0.25
    torch.manual_seed(9)
    mask = keep_mask(draw_seed(CPU), shape, p)
    torch.manual_seed(9)
    with fastseq.use_backend(backend):
        _, drawn = functional.add_layer_norm(
            torch.ones(shape), torch.zeros(shape), (67,), dropout_p=p
        )
    assert torch.equal(drawn, mask / (1 - p))
    assert abs(mask.float().mean() - 0.75) < 0.06


def test_dropout_off_outside_training_and_whole_at_one() -> None:
    x, r = torch.randn(4, 64), torch.randn(4, 64)
    _, kept = functional.add_layer_norm(x, r, (64,), dropout_p=0.9, training=False)
    assert torch.equal(kept, x + r)
    _, dropped = functional.add_layer_norm(x, r, (64,), dropout_p=1.0)
    assert torch.equal(dropped, r)


# --- dtypes --------------------------------------------------------------------------------------


def test_residual_dtypes() -> None:
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    for residual, wide, expected in (
        (x, False, torch.bfloat16),
        (x, True, torch.float32),
        (x.float(), False, torch.float32),
    ):
        output, stream = functional.add_layer_norm(x, residual, (64,), residual_in_fp32=wide)
        assert (output.dtype, stream.dtype) == (torch.bfloat16, expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast_gives_the_dtypes_torch_gives(device: str, dtype: torch.dtype) -> None:
    """On fake tensors, so that CUDA's rule is tested without one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    enabled, half = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    try:
        with FakeTensorMode():
            x, weight = (torch.empty(n, device=device, dtype=dtype) for n in ((4, 8), 8))
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.bfloat16)
            for name in ("layer_norm", "rms_norm"):
                theirs = getattr(F, name)(x, (8,), weight)
                assert getattr(functional, name)(x, (8,), weight).dtype == theirs.dtype
    finally:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, half)


@pytest.mark.parametrize("parameter_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_any_dtype(dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    """Also where the call is so small that torch's op, which takes fewer mixtures, is preferred."""
    x, weight = torch.randn(4, 8, dtype=dtype), torch.randn(8).to(parameter_dtype)
    expected = F.layer_norm(x.double(), (8,), weight.double())
    output = functional.layer_norm(x, (8,), weight)
    stream, _ = functional.add_layer_norm(x, torch.zeros_like(x), (8,), weight)
    assert output.dtype == stream.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(stream.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_eps_of_rms_norm_is_torchs(dtype: torch.dtype) -> None:
    x = torch.full((2, 64), 1e-4, dtype=dtype)
    with fastseq.use_backend("cpu"):
        ours = functional.rms_norm(x, (64,))
    torch.testing.assert_close(ours, F.rms_norm(x, (64,)))


# --- what torch must take, and what nobody can ---------------------------------------------------


def test_subclasses_go_to_torch() -> None:
    class Tagged(Tensor):
        pass

    x = torch.randn(4, 8).as_subclass(Tagged)
    with recorded() as decisions:
        output = functional.layer_norm(x, (8,))
    assert type(output) is Tagged
    assert [d.backend for d in decisions] == ["torch"]


def test_default_device_mode_keeps_the_kernels() -> None:
    """torch.set_default_device is a function mode: it must not push calls to torch."""
    with torch.device("cpu"), fastseq.use_backend("cpu"), recorded() as decisions:
        functional.layer_norm(torch.randn(4, 8), (8,))
    assert [d.backend for d in decisions] == ["cpu"]


def test_traced_and_scripted_modules_run_torchs_op() -> None:
    module = fastseq.nn.LayerNorm(64)
    x = torch.randn(3, 64)
    expected = F.layer_norm(x, (64,), module.weight, module.bias)
    for graph in (torch.jit.trace(module, x), torch.jit.script(module)):
        assert "fastseq::" not in str(graph.graph)
        torch.testing.assert_close(graph(x), expected)
    rms = torch.jit.script(fastseq.nn.RMSNorm(64))
    torch.testing.assert_close(rms(x), F.rms_norm(x, (64,), rms.weight))


def test_complex_numbers_go_where_torch_takes_them() -> None:
    x = X.cfloat() * (1 + 2j)
    torch.testing.assert_close(functional.rms_norm(x, (8,)), F.rms_norm(x, (8,)))
    with pytest.raises(NotImplementedError):
        functional.layer_norm(x, (8,))


def test_rows_of_length_zero() -> None:
    x = torch.empty(3, 0, requires_grad=True)
    weight = torch.empty(0, requires_grad=True)
    output = functional.layer_norm(x, (0,), weight)
    output.sum().backward()
    assert output.shape == (3, 0)
    assert weight.grad is not None
    assert weight.grad.shape == (0,)


X = torch.randn(4, 8)
BAD = [
    (lambda: functional.layer_norm(X, (7,)), RuntimeError, "normalized_shape"),
    (lambda: functional.layer_norm(X, ()), RuntimeError, "normalized_shape"),
    (lambda: functional.layer_norm(X, 8), TypeError, "normalized_shape"),
    (lambda: functional.layer_norm(X, (4, 4, 8)), RuntimeError, "normalized_shape"),
    (lambda: functional.layer_norm(X, (8,), torch.ones(7)), RuntimeError, "weight"),
    (lambda: functional.layer_norm(X, (8,), None, torch.ones(8, 1)), RuntimeError, "bias"),
    (
        lambda: functional.layer_norm(X, (8,), torch.ones(8, device="meta")),
        RuntimeError,
        "weight.*device",
    ),
    (lambda: functional.layer_norm(X.long(), (8,)), NotImplementedError, "input.*int64"),
    (lambda: functional.rms_norm(X.bool(), (8,)), NotImplementedError, "input"),
    (lambda: functional.rms_norm(X, (8,), torch.ones(8).long()), NotImplementedError, "weight"),
    (lambda: functional.add_layer_norm(X, X[:2], (8,)), RuntimeError, "residual.*shape"),
    (lambda: functional.add_layer_norm(X, X[:, :1], (8,)), RuntimeError, "residual.*shape"),
    (lambda: functional.add_layer_norm(X, X.half(), (8,)), RuntimeError, "residual.*dtype"),
    (
        lambda: functional.add_layer_norm(X, X.to("meta"), (8,)),
        RuntimeError,
        "residual.*device",
    ),
    (lambda: functional.add_layer_norm(X, X, (8,), dropout_p=1.5), ValueError, "dropout_p"),
    (lambda: functional.add_rms_norm(X, X, (8,), dropout_p=-0.1), ValueError, "dropout_p"),
    (
        lambda: functional.add_rms_norm(X, X, (8,), dropout_p=float("nan")),
        ValueError,
        "dropout_p",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_errors_have_torchs_class(name: str) -> None:
    ours, theirs = getattr(functional, name), getattr(F, name)
    for arguments in (
        (X, (7,)),
        (X, ()),
        (X, 8),
        (X, (8,), torch.ones(7)),
        (X.long(), (8,)),
    ):
        with pytest.raises(Exception) as torchs:  # noqa: PT011 - whichever class it is
            theirs(*arguments)
        with pytest.raises(type(torchs.value)):
            ours(*arguments)


# --- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("affine", [True, False])
def test_modules_are_torchs(name: str, affine: bool) -> None:
    ours = getattr(fastseq.nn, name)((3, 5), eps=1e-3, elementwise_affine=affine)
    theirs = getattr(torch.nn, name)((3, 5), eps=1e-3, elementwise_affine=affine)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(70, 40, 3, 5)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["AddLayerNorm", "AddRMSNorm"])
def test_add_modules(name: str) -> None:
    module = getattr(fastseq.nn, name)(64, dropout=0.5, residual_in_fp32=True)
    base = getattr(torch.nn, name.removeprefix("Add"))(64, eps=module.eps)
    base.load_state_dict(module.state_dict())
    assert "dropout=0.5" in repr(module)
    x, r = torch.randn(9, 64).bfloat16(), torch.randn(9, 64).bfloat16()
    output, stream = module.bfloat16()(x, r)
    assert stream.dtype == torch.float32
    assert not torch.equal(stream, x.float() + r.float())
    output, stream = module.eval()(x, r)
    assert torch.equal(stream, x.float() + r.float())
    expected = base(stream)
    torch.testing.assert_close(output.float(), expected, rtol=0.01, atol=0.01)


def test_rows_of_any_kind_beside_each_other_in_bf16() -> None:
    """Whether a row's moments can be had in one sweep is decided for each row alone."""
    x = torch.randn(8, 1000).bfloat16()
    x[1] += 300  # E[x^2] - E[x]^2 would cancel
    x[2] = 7
    x[3] = 0
    x[4] *= 1e18
    x[5] *= 1e-30
    x[6, 3], x[7, 2] = math.nan, math.inf
    with fastseq.use_backend("cpu"):
        found = functional.layer_norm(x, (1000,))
        alone = torch.cat([functional.layer_norm(row[None], (1000,)) for row in x])
    torch.testing.assert_close(found, alone, rtol=0, atol=0, equal_nan=True)
    assert found[6:].isnan().any(1).all()
    for row in (0, 1, 2, 3, 5):
        truth = F.layer_norm(x[row].double(), (1000,))
        theirs = F.layer_norm(x[row], (1000,))
        assert (found[row] - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-6
