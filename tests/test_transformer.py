"""The Transformer's layers and stacks against torch's with the same weights."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq
from fastseq.backends import recorded

BATCH, TARGET, SOURCE, SIZE, HEADS, HIDDEN = 3, 6, 9, 8, 2, 16
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "callable": lambda x: F.silu(x) * torch.sigmoid(x)}


def both(name: str, *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's with the same weights, none of them at its trivial initial value."""
    theirs = getattr(nn, name)(*args, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = getattr(fastseq.nn, name)(*args, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def results(module: nn.Module, given: list[Tensor], **options: Any) -> list[Tensor]:
    """The output and gradients of inputs and parameters."""
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    output = module(*leaves, **options)
    weight = torch.linspace(-1, 1, output.numel()).view_as(output)
    grads = torch.autograd.grad((output * weight).sum(), [*leaves, *module.parameters()])
    return [output, *grads]


def agree(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-4) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == expected.dtype
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


def sequence(length: int, batch_first: bool = True) -> Tensor:
    return torch.randn(*((BATCH, length) if batch_first else (length, BATCH)), SIZE)


def padding(length: int) -> Tensor:
    lengths = torch.tensor([length, length - 2, 1])
    return torch.arange(length) >= lengths[:, None]


def causal(length: int, boolean: bool) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    return mask == -torch.inf if boolean else mask


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_encoder_layer(bias: bool, batch_first: bool, norm_first: bool, activation: str) -> None:
    ours, theirs = both(
        "TransformerEncoderLayer", SIZE, HEADS, HIDDEN, 0.0, ACTIVATIONS[activation],
        batch_first=batch_first, norm_first=norm_first, bias=bias,
    )  # fmt: skip
    x = [sequence(SOURCE, batch_first)]
    for training, mask, padded in itertools.product(
        (True, False), (None, "boolean", "float"), (False, True)
    ):
        ours.train(training)
        theirs.train(training)
        boolean = mask == "boolean"
        pads = padding(SOURCE)
        options = {
            "src_mask": causal(SOURCE, boolean) if mask else None,
            "src_key_padding_mask": (pads if boolean or not mask else as_float(pads))
            if padded
            else None,
        }
        agree(results(ours, x, **options), results(theirs, x, **options))
    options = {"src_mask": causal(SOURCE, False), "is_causal": True}
    agree(results(ours, x, **options), results(theirs, x, **options))


def as_float(out: Tensor) -> Tensor:
    return torch.zeros(out.shape).masked_fill(out, -torch.inf)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_decoder_layer(batch_first: bool, norm_first: bool, activation: str) -> None:
    ours, theirs = both(
        "TransformerDecoderLayer", SIZE, HEADS, HIDDEN, 0.0, ACTIVATIONS[activation],
        batch_first=batch_first, norm_first=norm_first,
    )  # fmt: skip
    given = [sequence(TARGET, batch_first), sequence(SOURCE, batch_first)]
    for training, masked in itertools.product((True, False), (False, True)):
        ours.train(training)
        theirs.train(training)
        options: dict[str, Any] = {}
        if masked:
            memory_mask = torch.rand(TARGET, SOURCE) < 0.2
            memory_mask[:, 0] = False
            options = {
                "tgt_mask": causal(TARGET, True),
                "memory_mask": memory_mask,
                "tgt_key_padding_mask": padding(TARGET),
                "memory_key_padding_mask": padding(SOURCE),
            }
        agree(results(ours, given, **options), results(theirs, given, **options))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_whole_transformer(training: bool, norm_first: bool) -> None:
    ours, theirs = both(
        "Transformer", SIZE, HEADS, 2, 2, HIDDEN, 0.0, batch_first=True, norm_first=norm_first
    )
    ours.train(training)
    theirs.train(training)
    given = [sequence(SOURCE), sequence(TARGET)]
    options = {
        "tgt_mask": causal(TARGET, True),
        "src_key_padding_mask": padding(SOURCE),
        "memory_key_padding_mask": padding(SOURCE),
    }
    agree(results(ours, given, **options), results(theirs, given, **options))
    agree(results(ours, given), results(theirs, given))
    assert {type(module).__module__.split(".")[0] for module in ours.modules()} <= {
        "fastseq", "torch",
    }  # fmt: skip
    assert not [m for m in ours.modules() if type(m) in fastseq.nn.DROP_IN]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm_first", [True, False])
def test_eval_is_what_training_is(norm_first: bool) -> None:
    """Without dropout: torch's fast path in eval gives 0 for padded rows, and this does not."""
    layer = fastseq.nn.TransformerEncoderLayer(
        SIZE, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=norm_first
    )
    encoder = fastseq.nn.TransformerEncoder(layer, 2)
    x, pads = sequence(SOURCE), padding(SOURCE)
    expected = encoder(x, src_key_padding_mask=pads)
    with torch.no_grad():
        output = encoder.eval()(x, src_key_padding_mask=pads)
        alone = layer.eval()(x, src_key_padding_mask=pads)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(alone, layer.train()(x, src_key_padding_mask=pads))


def test_nothing_but_padding_is_finite() -> None:
    ours, _ = both("TransformerEncoderLayer", SIZE, HEADS, HIDDEN, 0.0, batch_first=True)
    pads = padding(SOURCE)
    pads[1] = True
    for training in (True, False):
        found = results(ours.train(training), [sequence(SOURCE)], src_key_padding_mask=pads)
        assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_norms_are_fused_and_watched_ones_are_called(norm_first: bool, name: str) -> None:
    layer, _ = both(name, SIZE, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=norm_first)
    decoder = name == "TransformerDecoderLayer"
    given = [sequence(TARGET), sequence(SOURCE)] if decoder else [sequence(SOURCE)]
    with recorded() as decisions:
        expected = layer(*given)
    # Such small ones go to torch, and that is noted by the function's name.
    norms = [decision.op for decision in decisions if "norm" in decision.op]
    fused = (3 if decoder else 2) - norm_first
    assert norms == ["layer_norm"] * norm_first + ["add_layer_norm"] * fused
    seen: list[Tensor] = []
    layer.norm2.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(layer(*given), expected)
    assert len(seen) == 1
    layer.norm2 = nn.RMSNorm(SIZE)
    assert layer(*given).isfinite().all()


def test_dropout_in_training_only_and_by_the_seed() -> None:
    layer = fastseq.nn.TransformerEncoderLayer(SIZE, HEADS, HIDDEN, 0.5, batch_first=True)
    x = sequence(SOURCE)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)  # type: ignore[no-any-return]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    layer.eval()
    assert torch.equal(run(1), run(2))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool, norm_first: bool) -> None:
    ours, theirs = both(
        "TransformerEncoderLayer", SIZE, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=norm_first
    )
    ours.train(training)
    theirs.train(training)
    x = sequence(SOURCE)
    with torch.autocast("cpu", torch.bfloat16):
        mine, expected = (results(module, [x]) for module in (ours, theirs))
    assert mine[0].dtype == expected[0].dtype
    oracle = results(copy.deepcopy(theirs).double(), [x.double()])
    for a, b, truth in zip(mine, expected, oracle, strict=True):
        ulp = torch.finfo(torch.bfloat16).eps * truth.abs().max()
        assert (a - truth).abs().max() <= 2 * (b - truth).abs().max() + ulp


def test_other_inputs() -> None:
    """Unbatched; fp64 and bf16; a custom encoder stays as it is."""
    ours, theirs = both("TransformerEncoderLayer", SIZE, HEADS, HIDDEN, 0.0, batch_first=True)
    x = torch.randn(SOURCE, SIZE)
    agree(results(ours, [x]), results(theirs, [x]))
    agree(results(ours.double(), [x.double()]), results(theirs.double(), [x.double()]), 1e-10)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(SIZE, HEADS, HIDDEN), 1, enable_nested_tensor=False
    )
    model = fastseq.nn.Transformer(SIZE, HEADS, 1, 1, HIDDEN, custom_encoder=encoder)
    assert type(model.encoder) is nn.TransformerEncoder
    assert type(model.decoder) is fastseq.nn.TransformerDecoder


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_accelerate_swaps_whole_layers() -> None:
    theirs = nn.Transformer(SIZE, HEADS, 1, 1, HIDDEN, 0.0, batch_first=True)
    model = fastseq.accelerate(copy.deepcopy(theirs), verbose=False)
    assert not [module for module in model.modules() if type(module) in fastseq.nn.DROP_IN]
    given = [sequence(SOURCE), sequence(TARGET)]
    agree(results(model, given), results(theirs, given))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*given), theirs.eval()(*given))
    restored = fastseq.restore(model)
    assert not [m for m in restored.modules() if type(m).__module__.startswith("fastseq")]
    assert list(restored.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder",
        "TransformerDecoder", "Transformer",
    ],
)  # fmt: skip
def test_they_are_torchs(name: str) -> None:
    ours, theirs = getattr(fastseq.nn, name), getattr(nn, name)
    assert ours.__mro__[1] is theirs
    assert fastseq.nn.DROP_IN[theirs] is ours


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    layer = fastseq.nn.TransformerEncoderLayer(SIZE, HEADS, HIDDEN, 0.0, batch_first=True)
    x = sequence(SOURCE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    agree(results(compiled, [x]), results(layer, [x]))
