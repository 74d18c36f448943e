"""Whole models: outputs, losses and every gradient, held to an fp64 run beside torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastseq
from fastseq.explain import FASTSEQ, LEFT, SKIPPED, SWAPPED
from integration.models import KINDS, PINNED, build

pytest.importorskip("transformers")

KERNELS = "cpu" if fastseq.backends()["cpu"].startswith("available") else "reference"


class InDouble(TorchFunctionMode):
    """Models that compute in fp32 whatever they get, in fp64 instead."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is Tensor.float:
            return args[0].double()

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        args = tuple(wide(value) for value in args)
        kwargs = {name: wide(value) for name, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


def run(model: nn.Module, batch: dict[str, Tensor], valid: str | None) -> dict[str, Tensor]:
    """Logits, loss and gradients, in fp64 to compare."""
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    logits = outputs.logits if valid is None else outputs.logits[batch[valid].bool()]
    results = {"logits": logits, "loss": outputs.loss}
    results |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().double() for name, tensor in results.items()}


def in_double(model: nn.Module, batch: dict[str, Tensor], valid: str | None) -> dict[str, Tensor]:
    wide = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    with InDouble():
        return run(model.double(), wide, valid)


def nudged(model: nn.Module, eps: float) -> nn.Module:
    """A copy whose parameters are each rounded up or down: what a model makes of roundings."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + signs * (eps / 2))
    return copied


def too_far(
    ours: dict[str, Tensor], torchs: list[dict[str, Tensor]], exact: dict[str, Tensor], eps: float
) -> list[str]:
    """Results whose largest or mean error is more than twice torch's, and some roundings of the
    largest value.

    torch's is the larger of two, one with nudged parameters: a whole model's error is a single
    draw, and a rounding early on may be most of it.

    What goes through a whole model has been rounded some tens of times on either way, not in the
    same places: eps times 32, and 4 for the mean of them. A bias is of the size of its weight: that
    of keys has a gradient of zero, summed from parts that are not.
    """
    failures = []
    for name, truth in exact.items():
        our, *their = (results[name] - truth for results in (ours, *torchs))
        layer = exact.get(name.removesuffix(".bias") + ".weight", truth)
        size = max(truth.abs().max().item(), layer.abs().max().item())
        for kind, measure, roundings in (
            ("max", lambda e: e.abs().max().item(), 32),
            ("rms", lambda e: e.pow(2).mean().sqrt().item(), 4),
        ):
            bound = 2 * max(map(measure, their)) + roundings * eps * size
            if not measure(our) <= bound:
                failures.append(f"{name}: {kind} error {measure(our):.2e}, allowed {bound:.2e}")
    return failures


#: What runs in `make test`: without dropout, eval and training differ in torch's fast paths alone.
USUAL = {(True, False): set(KINDS), (False, True): set(KINDS) - {"gpt2", "vit", "transformer"}}


@pytest.mark.parametrize(
    ("name", "training", "autocast"),
    [
        pytest.param(
            *(name, training, autocast),
            id=f"{name}-{'train' if training else 'eval'}-{'bf16' if autocast else 'fp32'}",
            marks=[] if name in USUAL.get((training, autocast), ()) else pytest.mark.slow,
        )
        for name in KINDS
        for training in (False, True)
        for autocast in (False, True)
    ],
)
def test_same_numbers_as_torch(name: str, training: bool, autocast: bool) -> None:
    """On our kernels, which `auto` leaves to torch where the tensors are as small as here."""
    model, batch = build(name)
    model.train(training)
    valid = KINDS[name].valid
    exact = in_double(copy.deepcopy(model), batch, valid)
    ours = fastseq.accelerate(copy.deepcopy(model), verbose=False)
    eps = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torchs = [run(m, batch, valid) for m in (model, nudged(model, eps))]
        with fastseq.use_backend(KERNELS):
            mine = run(ours, batch, valid)
        chosen = run(ours, batch, valid)
    assert all(results.keys() == exact.keys() for results in (mine, chosen, *torchs))
    assert name != "t5" or any("relative_attention_bias" in result for result in exact)
    assert not too_far(mine, torchs, exact, eps)
    assert not too_far(chosen, torchs, exact, eps)


@pytest.mark.parametrize("name", KINDS)
def test_every_norm_and_attention_is_accounted_for(name: str) -> None:
    model, _ = build(name)
    fastseq.accelerate(model, verbose=False, strict=PINNED)
    rows = {row.module: row for row in fastseq.explain(model).modules}
    for fqn, module in model.named_modules():
        concerns = "Norm" in type(module).__name__ or "Attention" in type(module).__name__
        if concerns and not any(inner in rows for inner in module.modules()):
            # A reparametrisation of a convolution, and a layer that is named after having none.
            assert type(module).__name__ in ("_WeightNorm", "Wav2Vec2NoLayerNormConvLayer"), fqn
    for row in rows.values():
        if not PINNED and row.decision == SKIPPED:
            assert "leaves no choice" in row.reason
            continue
        assert row.decision in (SWAPPED, FASTSEQ, LEFT), row
        assert row.reason
    swapped = {row.type for row in rows.values() if row.decision == SWAPPED}
    known = EXPECTED[name] & {row.type for row in rows.values() if row.decision != SKIPPED}
    assert (EXPECTED[name] if PINNED else known) <= swapped


#: What has to be on fastseq in each of them.
EXPECTED = {
    "bert": {"LayerNorm", "BertSelfAttention"},
    "gpt2": {"LayerNorm", "GPT2Attention"},
    "t5": {"T5LayerNorm", "T5Attention"},
    "vit": {"LayerNorm", "ViTAttention"},
    "whisper": {"LayerNorm", "WhisperAttention"},
    "llama": {"LlamaRMSNorm", "LlamaAttention"},
    "gemma2": {"Gemma2RMSNorm", "Gemma2Attention"},
    "gemma3": {"Gemma3RMSNorm", "Gemma3Attention"},
    "gpt_oss": {"GptOssRMSNorm", "GptOssAttention"},
    "wav2vec2": {"LayerNorm", "Wav2Vec2Attention"},
    "timm_vit": {"LayerNorm"},
    "transformer": {"LayerNorm", "MultiheadAttention", "Transformer", "CrossEntropyLoss"},
    "transformer_norm_first": {"TransformerEncoderLayer", "TransformerDecoderLayer"},
    "lstm_tagger": {"LSTM", "LayerNorm", "CrossEntropyLoss"},
    "conv_transformer": {"TransformerEncoder", "TransformerEncoderLayer"},
}


@pytest.mark.parametrize("name", KINDS)
def test_restore_brings_back_the_very_same_model(name: str) -> None:
    model, batch = build(name)
    classes = [type(module) for module in model.modules()]
    states = [dict(vars(module)) for module in model.modules()]
    with torch.no_grad():
        before = model(**batch).logits
        config = copy.deepcopy(getattr(model, "config", None))
        fastseq.accelerate(model, verbose=False)
        fastseq.restore(model)
        after = model(**batch).logits
    assert torch.equal(before, after)
    assert classes == [type(module) for module in model.modules()]
    assert [vars(module).keys() for module in model.modules()] == [s.keys() for s in states]
    if config is not None:
        assert model.config._attn_implementation == config._attn_implementation
        assert model.config.to_dict() == config.to_dict()
