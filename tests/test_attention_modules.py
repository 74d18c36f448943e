"""MultiheadAttention against torch's with the same weights, in every combination of options."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq

MASKS = (None, "boolean", "float", "boolean of heads", "float of heads")
PADDINGS = (None, "boolean", "float")
#: What the module is built with.
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": False},
    {"kdim": 6, "vdim": 10},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "bias": False},
)
BATCH, QUERIES, KEYS, SIZE, HEADS = 3, 5, 7, 8, 2


def pair(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    theirs = nn.MultiheadAttention(SIZE, HEADS, **options)
    for parameter in theirs.parameters():  # biases are 0 at first
        nn.init.normal_(parameter, std=0.5)
    ours = fastseq.nn.MultiheadAttention(SIZE, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def masks(mask: str | None, padding: str | None, batched: bool) -> dict[str, Tensor]:
    """Masks that leave every query a key, so that torch has no NaN."""
    found: dict[str, Tensor] = {}
    if mask:
        of_heads = mask.endswith("heads")
        leading = ((BATCH if batched else 1) * HEADS,) if of_heads else ()
        out = torch.rand(*leading, QUERIES, KEYS) < 0.3
        out[..., 0] = False
        found["attn_mask"] = out if mask.startswith("boolean") else as_float(out)
    if padding:
        out = torch.rand(*((BATCH,) if batched else ()), KEYS) < 0.3
        out[..., 0] = False
        found["key_padding_mask"] = out if padding == "boolean" else as_float(out)
    return found


def as_float(out: Tensor) -> Tensor:
    return torch.randn(out.shape).masked_fill(out, -torch.inf)


def inputs(module: nn.MultiheadAttention, batched: bool, attention: str) -> list[Tensor]:
    """``self``: one tensor; ``memory``: key is value; ``apart``: three."""

    def tensor(length: int, size: int) -> Tensor:
        if not batched:
            return torch.randn(length, size)
        shape = (BATCH, length, size) if module.batch_first else (length, BATCH, size)
        return torch.randn(shape)

    if attention == "self":
        return [tensor(KEYS, SIZE)] * 3
    key = tensor(KEYS, module.kdim)
    return [tensor(QUERIES, SIZE), key, key if attention == "memory" else tensor(KEYS, module.vdim)]


def results(module: nn.MultiheadAttention, given: list[Tensor], **options: Any) -> list[Tensor]:
    """Output, weights and gradients of inputs and parameters."""
    leaves = {id(tensor): tensor.clone().requires_grad_() for tensor in given}
    output, weights = module(*(leaves[id(tensor)] for tensor in given), **options)
    loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(0, 1, weights.numel()).view_as(weights)).sum()
    wanted = [*leaves.values(), *module.parameters()]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [output, *([] if weights is None else [weights]), *(g for g in grads if g is not None)]


def agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.shape == expected.shape
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: ", ".join(kind) or "plain")
def test_every_combination(kind: dict[str, Any], batch_first: bool, batched: bool) -> None:
    """Masks, weights, averages, train and eval; outputs and gradients."""
    ours, theirs = pair(batch_first=batch_first, **kind)
    apart = "kdim" in kind
    for training, mask, padding, (need, average) in itertools.product(
        (True, False), MASKS, PADDINGS, ((False, True), (True, True), (True, False))
    ):
        ours.train(training)
        theirs.train(training)
        given = inputs(ours, batched, "apart" if apart else "memory")
        options = {
            "need_weights": need,
            "average_attn_weights": average,
            **masks(mask, padding, batched),
        }
        agree(results(ours, given, **options), results(theirs, given, **options))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("attention", ["self", "memory", "apart"])
def test_where_queries_keys_and_values_come_from(attention: str, batch_first: bool) -> None:
    ours, theirs = pair(batch_first=batch_first)
    given = inputs(ours, True, attention)
    for need in (True, False):
        options = {"need_weights": need}
        agree(results(ours, given, **options), results(theirs, given, **options))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", [None, "boolean"])
def test_is_causal(padding: str | None, need_weights: bool) -> None:
    ours, theirs = pair(batch_first=True)
    given = inputs(ours, True, "self")
    causal = nn.Transformer.generate_square_subsequent_mask(KEYS)
    options: dict[str, Any] = {"attn_mask": causal, "is_causal": True, "need_weights": need_weights}
    if padding:
        options["key_padding_mask"] = torch.zeros(BATCH, KEYS, dtype=torch.bool)
        options["attn_mask"] = causal == -torch.inf
        options["key_padding_mask"][:, -2:] = True
    agree(results(ours, given, **options), results(theirs, given, **options))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["boolean", "float", "boolean of heads"])
def test_what_is_wholly_masked_out_is_0(kind: str, training: bool, need_weights: bool) -> None:
    """An entry of nothing but padding: torch gives NaN in some of these modes."""
    ours, _ = pair(batch_first=True)
    ours.train(training)
    given = [torch.randn(BATCH, n, SIZE) for n in (QUERIES, KEYS, KEYS)]
    if kind == "boolean of heads":
        out = torch.zeros(BATCH, HEADS, QUERIES, KEYS, dtype=torch.bool)
        out[1] = True
        options = {"attn_mask": out.flatten(0, 1)}
    else:
        out = torch.zeros(BATCH, KEYS, dtype=torch.bool)
        out[1] = True
        options = {"key_padding_mask": out if kind == "boolean" else as_float(out)}
    found = results(ours, given, need_weights=need_weights, **options)
    assert all(tensor.isfinite().all() for tensor in found)
    torch.testing.assert_close(found[0][1], ours.out_proj.bias.expand(QUERIES, SIZE))
    grad_query = found[2 if need_weights else 1]
    assert not grad_query[1].any()
    assert grad_query[0].any()
    with torch.no_grad():
        assert ours(*given, need_weights=need_weights, **options)[0].isfinite().all()


def test_weights_dropout_is_torchs() -> None:
    ours, theirs = pair(dropout=0.4, batch_first=True)
    given = inputs(ours, True, "memory")
    torch.manual_seed(3)
    mine = ours(*given)
    torch.manual_seed(3)
    expected = theirs(*given)
    torch.testing.assert_close(mine, expected)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(*given), theirs(*given))


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast_gives_torchs_dtypes(need_weights: bool) -> None:
    ours, theirs = pair(batch_first=True)
    given = inputs(ours, True, "self")
    options = masks(None, "boolean", True) | {"need_weights": need_weights}
    with torch.autocast("cpu", torch.bfloat16):
        mine, expected = ours(*given, **options), theirs(*given, **options)
    for a, b in zip(mine, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    ours, theirs = pair(batch_first=True, add_bias_kv=True, dtype=dtype)
    given = [tensor.to(dtype) for tensor in inputs(ours, True, "memory")]
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    for a, b in zip(results(ours, given), results(theirs, given), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_nested_tensors_go_to_torch() -> None:
    ours, theirs = pair(batch_first=True)
    given = torch.nested.nested_tensor([torch.randn(3, SIZE), torch.randn(5, SIZE)])
    ours.eval(), theirs.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine, _ = ours(given, given, given, need_weights=False)
        expected, _ = theirs(given, given, given, need_weights=False)
    for a, b in zip(mine.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, b)


def test_it_is_torchs_module() -> None:
    ours, theirs = pair(kdim=6, add_bias_kv=True)
    assert type(ours).__mro__[1] is nn.MultiheadAttention
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    torch.manual_seed(0)
    one = nn.MultiheadAttention(SIZE, HEADS).in_proj_weight
    torch.manual_seed(0)
    assert torch.equal(fastseq.nn.MultiheadAttention(SIZE, HEADS).in_proj_weight, one)
    model = fastseq.accelerate(nn.Sequential(copy.deepcopy(theirs)), verbose=False)
    assert type(model[0]) is fastseq.nn.MultiheadAttention
    assert type(fastseq.restore(model)[0]) is nn.MultiheadAttention


def test_one_tensor_as_query_key_and_value_compiles_whole() -> None:
    """The compiler takes no tensor twice for one node."""
    x = torch.randn(1, 2, 5, 4, requires_grad=True)

    def attend(x: Tensor) -> Tensor:
        return fastseq.functional.attention(x, x, x, causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = [(y, *torch.autograd.grad(y.sum(), x)) for y in (compiled(x), attend(x))]
    torch.testing.assert_close(*results)


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    ours, _ = pair(batch_first=True)
    given = inputs(ours, True, "self")
    options = masks(None, "boolean", True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for mine, expected in zip(compiled(*given, **options), ours(*given, **options), strict=True):
        torch.testing.assert_close(mine, expected)


X = torch.randn(BATCH, KEYS, SIZE)
BAD: tuple[tuple[tuple[Tensor, ...], dict[str, Any]], ...] = (
    ((X[None], X, X), {}),
    ((X, X[0], X), {}),
    ((X[..., :6], X, X), {}),
    ((X, X, X[:, :5]), {}),
    ((X, X, X), {"attn_mask": torch.zeros(5, 5)}),
    ((X, X, X), {"attn_mask": torch.zeros(BATCH, KEYS, KEYS)}),
    ((X, X, X), {"attn_mask": torch.zeros(KEYS, KEYS).long()}),
    ((X, X, X), {"key_padding_mask": torch.zeros(BATCH, 5).bool()}),
    ((X, X, X), {"key_padding_mask": torch.zeros(BATCH, KEYS).long()}),
    ((X, X, X), {"is_causal": True}),
)


@pytest.mark.parametrize(("given", "options"), BAD)
def test_errors_have_torchs_class(given: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    ours, theirs = pair(batch_first=True)
    with pytest.raises(Exception) as torchs:  # noqa: PT011 - whichever class it is
        theirs(*given, **options)
    with pytest.raises(type(torchs.value)):
        ours(*given, **options)
