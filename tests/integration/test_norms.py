"""Norms that are not torch's classes: which are recognised, and what becomes of them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

import fastseq
from fastseq.explain import FASTSEQ, LEFT, READY, SKIPPED, SWAPPED
from fastseq.integrations.norms import (
    LAYER,
    LAYER_PLUS_ONE,
    RMS,
    RMS_PLUS_ONE,
    AdaptedNorm,
    Recipe,
    recipe_of,
)


class Base(nn.Module):
    def __init__(self, size: int = 48, eps: float = 1e-6, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        if bias:
            self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps


class LlamaLikeNorm(Base):
    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(hidden_states.dtype)


class GemmaNorm(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class ManualLayerNorm(Base):
    """As written in many a tutorial."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = x.var(-1, keepdim=True, unbiased=False)
        return self.weight * (x - mean) / torch.sqrt(variance + self.eps) + self.bias


class LayerNormWithoutBias(nn.Module):
    """The epsilon is a number in the code."""

    def __init__(self, size: int = 48) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), None

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class WeightlessNorm(nn.Module):
    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class LayerNorm1P(nn.LayerNorm):
    """By one more than the weight; autocast makes it 16 bits."""

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        weight, bias = (t.to(input.dtype) for t in (self.weight + 1, self.bias))
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class InFp32(nn.LayerNorm):
    """A subclass that computes the same, wider."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).type_as(input)


class UnbiasedNorm(Base):
    """Bessel's correction and epsilon outside of the root: the annotated Transformer's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps)


class EpsilonOutsideNorm(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class DetachedNorm(Base):
    """The same results, other gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).detach() + self.eps)


class NoisyNorm(LlamaLikeNorm):
    """The same in eval only."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        y = super().forward(hidden_states)
        return y + torch.randn_like(y) if self.training else y


class GatedNorm(LlamaLikeNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * F.silu(gate))


class CountingNorm(LlamaLikeNorm):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class ScalarNorm(Base):
    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.weight


class RunningNorm(LlamaLikeNorm):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(48))


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """A map in front: the dimension is another."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mT).mT


class ImagesNorm(Base):
    """Rows in matrices, channels in images."""

    def forward(self, x: Tensor) -> Tensor:
        dim = 1 if x.ndim == 4 else -1
        y = x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + self.eps)
        return y * (self.weight[:, None, None] if x.ndim == 4 else self.weight)


RECOGNISED = [
    (LlamaLikeNorm, RMS),
    (lambda: LlamaLikeNorm(eps=1e-12), RMS),
    (GemmaNorm, RMS_PLUS_ONE),
    (lambda: ManualLayerNorm(bias=True), LAYER),
    (LayerNormWithoutBias, LAYER),
    (WeightlessNorm, RMS),
    (lambda: InFp32(48), LAYER),
    (lambda: LayerNorm1P(48), LAYER_PLUS_ONE),
]


@pytest.mark.parametrize(("make", "formula"), RECOGNISED)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "mixed", "fp16", "fp64"])
def test_a_recognised_norm_computes_the_same(make, formula, dtypes) -> None:
    """Values, gradients, dtypes: also of 16-bit inputs with fp32 weights."""
    norm = make()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    names = {"fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}
    dtype = names.get(dtypes, torch.bfloat16)
    norm = norm.to(torch.float32 if dtypes == "mixed" else dtype)
    ours = fastseq.accelerate(copy.deepcopy(norm), verbose=False)
    assert isinstance(ours, AdaptedNorm)
    assert isinstance(ours, type(norm))
    assert ours.recipe.formula == formula
    x = torch.randn(5, 48).to(dtype).requires_grad_()
    with fastseq.use_backend("reference"):  # `auto` leaves tensors this small to torch
        try:
            expected = norm(x)
        except RuntimeError as error:  # torch takes fewer mixtures of dtypes, and so do we
            with pytest.raises(type(error)):
                ours(x)
            return
        result = ours(x)
        assert result.dtype == expected.dtype
        upstream = torch.randn_like(expected)
        inputs = (x, *norm.parameters())
        wanted = torch.autograd.grad(expected, inputs, upstream)
        given = torch.autograd.grad(result, (x, *ours.parameters()), upstream)
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 5e-2
    for got, want in zip((result, *given), (expected, *wanted), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("make", "formula"), RECOGNISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_dtypes_are_the_same(make, formula, dtype) -> None:
    norm = make()
    ours = fastseq.accelerate(copy.deepcopy(norm), verbose=False)
    x = torch.randn(3, 48, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            expected = norm(x)
        except RuntimeError as error:
            with pytest.raises(type(error)):
                ours(x)
            return
        result = ours(x)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("make", "decision", "words"),
    [
        (UnbiasedNorm, LEFT, "computes neither"),
        (EpsilonOutsideNorm, LEFT, "computes neither"),
        (DetachedNorm, LEFT, "computes neither"),
        (NoisyNorm, LEFT, "computes neither"),
        (ImagesNorm, LEFT, "computes neither"),
        (GatedNorm, LEFT, "takes 2 arguments"),
        (CountingNorm, LEFT, "changes its own attributes"),
        (ScalarNorm, LEFT, "not one row"),
        (RunningNorm, LEFT, "has buffers: mean"),
        (lambda: ChannelsFirstLayerNorm(48), SKIPPED, "subclass"),
        (lambda: nn.GroupNorm(2, 4), LEFT, "no GroupNorm"),
        (lambda: nn.BatchNorm1d(4), LEFT, "no BatchNorm1d"),
    ],
)
def test_what_computes_something_else_stays_with_its_reason(make, decision, words) -> None:
    norm = make()
    kind = type(norm)
    fastseq.accelerate(norm, verbose=False)
    assert type(norm) is kind
    (row,) = fastseq.explain(norm).modules
    assert row.decision == decision
    assert words in row.reason


def test_strict_does_not_mind_what_fastseq_has_no_kernel_for() -> None:
    fastseq.accelerate(
        nn.Sequential(nn.BatchNorm1d(4), LlamaLikeNorm()), strict=True, verbose=False
    )
    with pytest.raises(RuntimeError, match="subclass"):
        fastseq.accelerate(ChannelsFirstLayerNorm(4), strict=True)


def test_the_trial_leaves_no_trace() -> None:
    norm = LlamaLikeNorm()
    norm.register_forward_hook(lambda *_: pytest.fail("the hook ran"))
    weight, attributes = norm.weight, dict(vars(norm))
    state = torch.get_rng_state()
    assert isinstance(recipe_of(norm), Recipe)
    assert torch.equal(state, torch.get_rng_state())
    assert vars(norm) == attributes
    assert torch.equal(norm.weight, torch.ones(48))
    assert norm.weight is weight
    assert weight.grad is None


def test_tried_wherever_the_caller_is() -> None:
    """In inference mode, under autocast, with another default dtype or device, of meta tensors."""
    with torch.inference_mode():
        assert isinstance(recipe_of(LlamaLikeNorm(eps=1e-3)), Recipe)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(recipe_of(LlamaLikeNorm(eps=2e-3)), Recipe)
    with torch.device("meta"):
        assert isinstance(recipe_of(LlamaLikeNorm(eps=3e-3)), Recipe)
    torch.set_default_dtype(torch.float64)
    try:
        assert isinstance(recipe_of(LlamaLikeNorm(eps=4e-3)), Recipe)
    finally:
        torch.set_default_dtype(torch.float32)


def test_settings_of_one_instance_are_not_taken_for_anothers() -> None:
    class SwitchNorm(Base):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, x: Tensor) -> Tensor:
            if self.kind == "layer":
                x = x - x.mean(-1, keepdim=True)
            y = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
            return y * 2 if self.kind == "twice" else y

    model = nn.ModuleList(SwitchNorm(kind) for kind in ("layer", "rms", "twice"))
    fastseq.accelerate(model, verbose=False)
    assert [getattr(m, "recipe", None) and m.recipe.formula for m in model] == [LAYER, RMS, None]


def test_changed_weights_and_epsilon_count() -> None:
    """The adapter reads them in each call."""
    norm = fastseq.accelerate(LlamaLikeNorm(), verbose=False)
    x = torch.randn(3, 48)
    with torch.no_grad():
        norm.weight.mul_(2)
    norm.eps = 0.5
    torch.testing.assert_close(norm(x), 2 * F.rms_norm(x, (48,), eps=0.5))
    torch.testing.assert_close(norm(hidden_states=x), norm(x))


def test_copies_pickles_and_restore() -> None:
    model = nn.Sequential(LlamaLikeNorm(), GemmaNorm())
    classes = [type(m) for m in model]
    fastseq.accelerate(model, verbose=False)
    swapped = [type(m) for m in model]
    assert [kind.__name__ for kind in swapped] == ["LlamaLikeNorm", "GemmaNorm"]
    x = torch.randn(3, 48)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        assert [type(m) for m in twin] == swapped
        assert torch.equal(twin(x), model(x))
    assert list(model.state_dict()) == ["0.weight", "1.weight"]
    fastseq.restore(model)
    assert [type(m) for m in model] == classes


def test_what_is_built_on_an_adapter_is_said_so() -> None:
    norm = fastseq.accelerate(LlamaLikeNorm(), verbose=False)
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    row = fastseq.explain(norm).modules[0]
    assert row.decision == FASTSEQ
    x = torch.randn(3, 48)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (48,), norm.weight, 1e-6))
    with pytest.warns(UserWarning, match="generated on top"):
        fastseq.restore(norm)
    before = LlamaLikeNorm()
    parametrize.register_parametrization(before, "weight", nn.Softplus())
    row = fastseq.explain(before).modules[0]
    assert row.decision == SKIPPED
    assert "accelerate before" in row.reason


def test_an_instance_forward_is_respected() -> None:
    norm = LlamaLikeNorm()
    norm.forward = lambda x: x
    assert fastseq.explain(norm).modules[0].decision == SKIPPED
    fastseq.accelerate(norm, verbose=False)
    assert type(norm) is LlamaLikeNorm
    del norm.forward
    assert fastseq.explain(norm).modules[0].decision == READY
    assert fastseq.explain(fastseq.accelerate(norm, verbose=False)).modules[0].decision == SWAPPED


def test_hooks_and_identity_stay() -> None:
    norm, seen = LlamaLikeNorm(), []
    norm.register_forward_hook(lambda *_: seen.append("ran"))
    weight = norm.weight
    assert fastseq.accelerate(norm, verbose=False) is norm
    assert norm.weight is weight
    norm(torch.randn(2, 48))
    assert seen == ["ran"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    model = nn.Sequential(LlamaLikeNorm(), GemmaNorm(), nn.Linear(48, 48))
    ours = fastseq.accelerate(copy.deepcopy(model), verbose=False)
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 7):
        x = torch.randn(rows, 48)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
