"""The feed-forward block: its kernels on every backend, its function and its module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq
from fastseq import functional
from fastseq.backends import recorded
from fastseq.ops.feed_forward import backward_op, forward_op
from fastseq.random import keep_mask
from fastseq.reference import feed_forward as reference
from fastseq.reference.feed_forward import ACTIVATIONS
from fastseq.testing import OPERATORS
from fastseq.testing.check import check
from fastseq.testing.feed_forward import torch_feed_forward

from .ladder import DTYPES, INSTRUCTION_SETS, by_threads, expect_same_bits, in_a_process

OPERATOR = OPERATORS["feed_forward"]
SEED = torch.tensor([-(2**62) + 12345])


@pytest.mark.parametrize("backend", ["cpu", "triton", "torch", "reference", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend(backend: str, dtype: torch.dtype) -> None:
    kernel = backend in ("cpu", "triton")
    if kernel and dtype == torch.float64:
        pytest.skip("no fp64 kernel")
    for case in OPERATOR.cases:
        # Interpreted is slow; so are fp16 products on a CPU.
        few = dtype == torch.float16 or (backend == "triton" and dtype == torch.bfloat16)
        if case.large or (few and not case.quick) or (backend == "triton" and not case.tiny):
            continue
        outcome = check(OPERATOR, backend, dtype, case, "cpu")
        assert not outcome.failures, (case.name, outcome.failures)
        dropped_by_torch = backend == "torch" and "dropout_p" in case.sizes
        assert (outcome.skipped is None) != dropped_by_torch
        if kernel and case.name == "gelu":
            assert set(outcome.ran.values()) == {backend}
            assert len(outcome.ran) == 2


def arguments(
    dtype: torch.dtype = torch.float64, gated: bool = False, rows: int = 5, wide: int = 6
) -> list[Tensor]:
    length = 2 * wide if gated else wide
    shapes = (rows, 4), (length, 4), (length,), (3, wide), (3,)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_every_order(activation: str, dropout_p: float) -> None:
    given = arguments(gated=activation == "swiglu")

    def function(*given: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same mask in every call
        return functional.feed_forward(
            *given, activation=activation, dropout_p=dropout_p, training=True
        )

    with fastseq.use_backend("reference"):
        assert torch.autograd.gradcheck(function, given, check_forward_ad=True)
        if activation != "relu":
            assert torch.autograd.gradgradcheck(function, given)
    output = function(*given)
    once = torch.autograd.grad(output.pow(2).sum(), given, create_graph=True)
    assert all(gradient.requires_grad for gradient in once)
    tangents = tuple(torch.randn_like(g) for g in given)
    _, jvp = torch.func.jvp(function, tuple(given), tangents)
    vjp = torch.func.vjp(function, *given)[1]
    weight = torch.randn_like(output)
    both = sum((a * b).sum() for a, b in zip(vjp(weight), tangents, strict=True))
    torch.testing.assert_close((jvp * weight).sum(), both)
    by_row = torch.func.vmap(function, (0, None, None, None, None), randomness="same")
    if not dropout_p:
        torch.testing.assert_close(by_row(*given), output)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_what_is_dropped(backend: str) -> None:
    """The generator's mask, in forward and in what backward makes again, to the bit."""
    hidden = torch.rand(70, 131) + 0.5
    kept = keep_mask(SEED, (70, 131), 0.3)
    with fastseq.use_backend(backend):
        for activation in ACTIVATIONS[:-1]:
            output = forward_op(hidden, None, SEED, activation, 0.3)
            assert torch.equal(output != 0, kept)
            if activation == "relu":
                torch.testing.assert_close(output, hidden * kept / 0.7)
                given, seed = output, None
            else:
                given, seed = hidden, SEED
            wanted = (True, activation != "relu", True)
            grads = backward_op(torch.ones_like(hidden), given, None, seed, activation, 0.3, wanted)
            assert torch.equal(grads[0] != 0, kept)
            assert activation == "relu" or torch.equal(grads[1], output)
            torch.testing.assert_close(grads[2], grads[0].sum(0))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_does_not_depend_on_others(backend: str, activation: str) -> None:
    size = 82 if activation == "swiglu" else 41
    hidden, bias, grad = torch.randn(40, size), torch.randn(size), torch.randn(40, 41)
    arguments = (SEED, activation, 0.2)
    with fastseq.use_backend(backend):
        whole = forward_op(hidden, bias, *arguments)
        part = forward_op(hidden[:13], bias, *arguments)
        assert torch.equal(whole[:13], part)
        grads = backward_op(grad, hidden, bias, *arguments, (True, False, False))
        parts = backward_op(grad[:13], hidden[:13], bias, *arguments, (True, False, False))
        assert torch.equal(grads[0][:13], parts[0])


def test_results_do_not_depend_on_threads() -> None:
    hidden, bias, grad = torch.randn(900, 300), torch.randn(300), torch.randn(900, 300)

    def call() -> list[Tensor]:
        output = forward_op(hidden, bias, SEED, "gelu", 0.1)
        return [output, *backward_op(grad, hidden, bias, SEED, "gelu", 0.1, (True,) * 3)]

    with fastseq.use_backend("cpu"):
        expect_same_bits(by_threads(call))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_rows_apart(backend: str, activation: str) -> None:
    """Strided and permuted, rows are read where they are."""
    size = 48 if activation == "swiglu" else 24
    hidden, grad = torch.randn(5, 3, size + 8), torch.randn(5, 3, 24 + 8)
    for view in (lambda t: t[..., 8:], lambda t: t[..., 3:-5], lambda t: t[..., 8:].mT.mT[::2]):
        h, g = view(hidden).transpose(0, 1), view(grad).transpose(0, 1)
        with fastseq.use_backend(backend):
            results, expected = (
                (
                    forward_op(h, None, SEED, activation, 0.2),
                    *backward_op(g, h, None, SEED, activation, 0.2, (True,) * 3),
                )
                for h, g in ((h, g), (h.contiguous(), g.contiguous()))
            )
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        assert all(result.is_contiguous() for result in results)


@pytest.mark.parametrize(("activation", "columns"), [("gelu", 1024), ("swiglu", 1029)])
def test_what_is_stored_past_the_cache(activation: str, columns: int) -> None:
    """Outputs of 16 MiB and more take other instructions, where their rows are aligned."""
    hidden, grad = torch.randn(2100, 2 * columns), torch.randn(2100, 2 * columns)
    if activation == "swiglu":
        grad = grad[:, :columns].contiguous()
    arguments = (None, None, activation, 0.0)
    results = []
    for backend in ("cpu", "torch"):
        with fastseq.use_backend(backend):
            output = forward_op(hidden, *arguments)
            results.append((output, *backward_op(grad, hidden, *arguments, (True,) * 3)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-4)


ACCURACY = """
import torch, fastseq
from fastseq.ops.feed_forward import backward_op, forward_op
from fastseq.reference import feed_forward as reference
from fastseq.backends import backends
z = torch.cat((torch.linspace(-14, 14, 200_001), torch.logspace(-30, 0, 1001))).view(1, -1)
ulp = torch.finfo(torch.float32).eps
for activation in ("gelu", "gelu_tanh", "silu"):
    grad = torch.ones_like(z)
    with fastseq.use_backend("cpu"):
        value = forward_op(z, None, None, activation, 0.0)
        slope, again, _ = backward_op(grad, z, None, None, activation, 0.0, (True, True, False))
    assert torch.equal(value, again)
    true_slope, true = reference.activate_backward(grad.double(), z.double(), None, activation)
    # torch's lose the tail below -8, in fp64 too.
    x = z.double()
    if activation == "gelu":
        true = x * torch.erfc(x * -(0.5**0.5)) / 2
    elif activation == "gelu_tanh":
        true = x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    # Far below 0 it is the rounded argument of the exponential that counts, and that it may be 0
    # where it is no normal number.
    allowed = ulp * true.abs() * (5 + 0.15 * z.abs() ** 3) + z.abs() * 1.3e-38
    assert ((value - true).abs() <= allowed).all(), activation
    assert (slope - true_slope).abs().max() <= 4 * ulp, activation
print(backends()["cpu"])
"""


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_activations_are_accurate(instruction_set: str) -> None:
    in_a_process(ACCURACY, instruction_set)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_wide_tensor_is_saved(activation: str) -> None:
    rows, wide = 64, 96
    given = arguments(torch.float32, activation == "swiglu", rows, wide)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        fastseq.use_backend("cpu"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        functional.feed_forward(*given, activation=activation, dropout_p=0.5, training=True)
    named = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept = [size for pointer, size in saved.items() if pointer not in named and size > 8]
    assert kept == [4 * rows * wide * (2 if activation == "swiglu" else 1)]


def test_weights_that_are_one_tensor() -> None:
    """Tied, the second the first transposed: both gradients reach it."""
    x = torch.randn(7, 5, requires_grad=True)
    weight = torch.randn(9, 5, requires_grad=True)
    grad = torch.randn(7, 5)
    with fastseq.use_backend("cpu"):
        ours = functional.feed_forward(x, weight, None, weight.mT, None, activation="gelu")
        grads = torch.autograd.grad(ours, (x, weight), grad)
    theirs = F.gelu(x @ weight.mT) @ weight
    expected = torch.autograd.grad(theirs, (x, weight), grad)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_autocast(backend: str) -> None:
    given = arguments(torch.float32)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16), fastseq.use_backend(backend):
            output = function(*given, activation="gelu")
        return [output, *torch.autograd.grad(output.float().pow(2).sum(), given)]

    for mine, theirs in zip(run(functional.feed_forward), run(torch_feed_forward), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


def served(*given: Any, **options: Any) -> dict[str, str]:
    with recorded() as decisions:
        functional.feed_forward(*given, **options)
    return {decision.op: decision.backend for decision in decisions}


def test_what_auto_chooses() -> None:
    small = arguments(torch.float32)
    large = arguments(torch.float32, rows=2048 * torch.get_num_threads(), wide=1024)
    gated = arguments(torch.float32, True, 256 * torch.get_num_threads(), 1024)
    ours, torchs = {"_feed_forward_fwd": "cpu"}, {"feed_forward": "torch"}
    assert served(*small, activation="gelu") == torchs
    assert served(*large, activation="gelu") == ours
    with torch.no_grad():
        assert served(*large, activation="gelu") == torchs
        assert served(*gated, activation="swiglu") == ours
    assert served(*large, activation="relu") == torchs
    assert served(*large, activation="relu", dropout_p=0.1) == torchs
    assert served(*small, activation="relu", dropout_p=0.1, training=True) == ours
    assert served(*(t.double() for t in large), activation="gelu") == torchs


def test_tensors_that_are_torchs() -> None:
    class Theirs(Tensor):
        pass

    given = arguments(torch.float32)
    given[0] = given[0].detach().as_subclass(Theirs)
    with recorded() as decisions:
        output = functional.feed_forward(*given, activation="silu")
    assert type(output) is Theirs
    assert [(d.op, d.backend) for d in decisions] == [("feed_forward", "torch")]


X, W1, W2 = torch.randn(2, 3, 4), torch.randn(6, 4), torch.randn(5, 6)
FF = functional.feed_forward
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: FF(X, W1, None, W2, None, activation="elu"), ValueError, "relu, gelu.*'elu'"),
    (lambda: FF(X, W1, None, W2, None, dropout_p=1.5), ValueError, "dropout_p.*1.5"),
    (lambda: FF(X[..., :3], W1, None, W2, None), RuntimeError, r"weight1 must be \[F, 3\]"),
    (lambda: FF(X[0, 0, 0], W1, None, W2, None), RuntimeError, "dimension of features"),
    (lambda: FF(X, W1, None, W2[:, :5], None), RuntimeError, r"weight2 must be \[E, 6\]"),
    (lambda: FF(X, W1, None, W2, None, activation="swiglu"), RuntimeError, r"\[E, 3\]"),
    (lambda: FF(X, W1[:5], None, W2, None, activation="swiglu"), RuntimeError, "2F rows.*5"),
    (lambda: FF(X, W1, W1[0], W2, None), RuntimeError, r"bias1 must be \[6\], got \[4\]"),
    (lambda: FF(X, W1, None, W2, W1[0]), RuntimeError, r"bias2 must be \[5\], got \[4\]"),
    (lambda: FF(X, W1, None, W2.half(), None), RuntimeError, "weight2.*float32.*float16"),
    (lambda: FF(X, W1.to("meta"), None, W2, None), RuntimeError, "weight1.*device cpu.*meta"),
    (lambda: FF(X.long(), W1, None, W2, None), RuntimeError, "input must be fp32.*int64"),
    (lambda: fastseq.nn.FeedForward(4, 6, "elu"), ValueError, "activation must be one of"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_module(bias: bool, activation: str) -> None:
    module = fastseq.nn.FeedForward(8, 12, activation, bias=bias)
    assert module.linear1.weight.shape == (24 if activation == "swiglu" else 12, 8)
    names = [f"linear{i}.{name}" for i in (1, 2) for name in ("weight", "bias")]
    assert list(module.state_dict()) == [n for n in names if bias or "bias" not in n]
    x = torch.randn(2, 5, 8)
    first, second = module.linear1, module.linear2
    expected = torch_feed_forward(
        x, first.weight, first.bias, second.weight, second.bias, activation=activation
    )
    torch.testing.assert_close(module(x), expected)
    with fastseq.use_backend("cpu"), recorded() as decisions:
        torch.testing.assert_close(module(x), expected)
    assert [d.op for d in decisions] == ["_feed_forward_fwd"]
    # One by one, where somebody watches.
    seen: list[Tensor] = []
    first.register_forward_hook(lambda module, args, output: seen.append(output))
    with fastseq.use_backend("cpu"), recorded() as decisions:
        torch.testing.assert_close(module(x), expected)
    assert (len(seen), decisions) == (1, [])


def test_module_drops_in_training_only() -> None:
    module = fastseq.nn.FeedForward(4, 64, "gelu", dropout=0.5)
    x = torch.randn(3, 4)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(x)  # type: ignore[no-any-return]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    module.eval()
    assert torch.equal(run(1), run(2))


class Adapted(nn.Linear):
    """A Linear with something added, as adapters are."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1.0


SERVED = [
    ("relu", "relu"), ("gelu", "gelu"), (F.relu, "relu"), (torch.relu, "relu"), (F.silu, "silu"),
    (nn.ReLU(), "relu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.SiLU(), "silu"),
    (F.leaky_relu, None), (nn.ELU(), None), (lambda x: F.relu(x) + 0, None),
]  # fmt: skip


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(("activation", "name"), SERVED)
def test_layers_use_it(decoder: bool, activation: Any, name: str | None) -> None:
    kind = "TransformerDecoderLayer" if decoder else "TransformerEncoderLayer"
    options = {"activation": activation, "batch_first": True, "dropout": 0.0}
    theirs = getattr(nn, kind)(8, 2, 16, **options)
    ours = getattr(fastseq.nn, kind)(8, 2, 16, **options)
    ours.load_state_dict(theirs.state_dict())
    given = (torch.randn(2, 3, 8),) * (2 if decoder else 1)
    with recorded() as decisions:
        output = ours(*given)
    torch.testing.assert_close(output, theirs(*given))
    calls = [d.op for d in decisions if "feed_forward" in d.op]
    assert calls == (["feed_forward"] if name else [])
    if name:
        with fastseq.use_backend("cpu"):
            torch.testing.assert_close(ours(*given), output)


@pytest.mark.parametrize("what", ["subclass", "instance", "parametrized", "hook", "dropout"])
def test_layers_call_what_was_changed(what: str) -> None:
    theirs = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
    if what == "subclass":
        theirs.linear1.__class__ = Adapted
    elif what == "instance":
        forward = theirs.linear2.forward
        theirs.linear2.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    elif what == "parametrized":
        nn.utils.parametrizations.weight_norm(theirs.linear1)
    elif what == "hook":
        theirs.linear2.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    else:
        theirs.dropout = nn.Identity()  # type: ignore[assignment]
    x = torch.randn(2, 3, 8)
    expected = theirs(x)
    theirs.__class__ = fastseq.nn.TransformerEncoderLayer
    with fastseq.use_backend("cpu"), recorded() as decisions:
        torch.testing.assert_close(theirs(x), expected)
    assert decisions
    assert not [d for d in decisions if "feed_forward" in d.op]


def test_reference_is_torchs() -> None:
    for activation in ACTIVATIONS:
        given = arguments(gated=activation == "swiglu")
        ours = reference.feed_forward(*given, activation)
        torch.testing.assert_close(ours, torch_feed_forward(*given, activation=activation))
