"""explain: of a model without running it, and of a call."""

import pytest
import torch
from torch import nn

import fastseq
from fastseq.backends import Decision
from fastseq.explain import Explanation

from .accelerated_model import TOKENS, Model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def test_explain_changes_and_runs_nothing(model):
    model.forward = None  # would fail if it were called
    before = {name: type(module) for name, module in model.named_modules()}
    explanation = fastseq.explain(model)
    assert before == {name: type(module) for name, module in model.named_modules()}
    assert explanation.title == "Model: 0 of 4 modules on fastseq"
    rows = explanation.modules
    assert [row.fqn for row in rows] == ["first", "layers.0.0", "layers.1.0", "norm"]
    assert [row.type for row in rows] == ["LayerNorm"] * 3 + ["RMSNorm"]
    assert rows[3].names == ("norm", "alias")
    assert rows[3].module is model.norm
    assert list(explanation) == list(rows)
    assert len(explanation) == 4


def test_explanation_prints_a_table(model):
    fastseq.accelerate(model, exclude=["norm"], verbose=False)
    explanation = fastseq.explain(model)
    assert str(explanation) == repr(explanation)
    assert str(explanation).splitlines() == [
        "Model: 3 of 4 modules (3 LayerNorm) on fastseq",
        "  module      class      decision  why",
        "  first       LayerNorm  swapped   is fastseq.nn.LayerNorm",
        "  layers.0.0  LayerNorm  swapped   is fastseq.nn.LayerNorm",
        "  layers.1.0  LayerNorm  swapped   is fastseq.nn.LayerNorm",
        "  norm        RMSNorm    ready     accelerate makes it fastseq.nn.RMSNorm",
    ]


def test_explain_calls_forward_and_backward():
    norm = fastseq.nn.LayerNorm(8)
    x = torch.randn(2, 8)
    with fastseq.use_backend("torch"):
        explanation = fastseq.explain(lambda: norm(x).sum().backward())
    assert explanation.title == "2 fastseq calls"
    assert [call.backend for call in explanation.calls] == ["torch", "torch"]
    lines = str(explanation).splitlines()
    assert lines[2].split()[:4] == ["layer_norm", "forward", "1", "torch"]
    assert lines[3].split()[:4] == ["layer_norm", "backward", "1", "torch"]


def test_explain_says_why_not_another_backend():
    call = Decision("_layer_norm_fwd", "torch", (("cuda", "not built"), ("cpu", "no AVX2")))
    text = str(Explanation("2 fastseq calls", calls=(call, call)))
    expected = "  layer_norm forward  2      torch   not cuda: not built; not cpu: no AVX2"
    assert text.splitlines()[2] == expected


def test_explain_a_model_with_arguments_returns_its_result(model):
    fastseq.accelerate(model, verbose=False)
    explanation = fastseq.explain(model, TOKENS)
    assert torch.equal(explanation.result, model(TOKENS))
    # first, one in each of the two layers; norm after each layer and at the end
    assert len(explanation.calls) == 6


def test_explain_without_a_call():
    explanation = fastseq.explain(torch.add, torch.ones(2), 1)
    assert str(explanation) == "0 fastseq calls"
    assert torch.equal(explanation.result, torch.full((2,), 2.0))


@pytest.mark.parametrize("wrong", [3, "model", nn.LayerNorm])
def test_explain_wants_a_module_or_function(wrong):
    with pytest.raises(TypeError, match="explain: model_or_fn must be a module or a function"):
        fastseq.explain(wrong)


def test_explain_passes_errors_on():
    with pytest.raises(ZeroDivisionError):
        fastseq.explain(lambda: 1 / 0)
