"""accelerate and restore: what is swapped, what stays as it was, what a selection leaves."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastseq
from fastseq.explain import READY, SWAPPED

from .accelerated_model import TOKENS, Model, decisions


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


# --- the swap ------------------------------------------------------------------------------------


def test_swaps_exact_types_in_place_and_says_so(model, capsys):
    assert fastseq.accelerate(model) is model
    assert type(model.first) is fastseq.nn.LayerNorm
    assert type(model.layers[1][0]) is fastseq.nn.LayerNorm
    assert type(model.norm) is fastseq.nn.RMSNorm
    assert type(model.head) is nn.Linear
    # Three LayerNorm and one RMSNorm: the alias is no fifth.
    expected = "fastseq: accelerated 4 of 4 modules (3 LayerNorm, 1 RMSNorm)\n"
    assert capsys.readouterr().out == expected
    fastseq.accelerate(model)
    assert capsys.readouterr().out == expected


def test_is_silent_without_verbose(model, capsys):
    fastseq.accelerate(model, verbose=False)
    assert capsys.readouterr().out == ""


def test_a_model_that_is_itself_a_norm():
    norm = fastseq.accelerate(nn.LayerNorm(8), verbose=False)
    assert type(norm) is fastseq.nn.LayerNorm
    assert "(the model)" in str(fastseq.explain(norm))


def test_nothing_to_accelerate(capsys):
    fastseq.accelerate(nn.Linear(2, 2))
    assert "nothing to accelerate" in capsys.readouterr().out


def test_same_numbers_and_gradients(model):
    plain = copy.deepcopy(model)
    fastseq.accelerate(model, verbose=False)
    ours, theirs = model(TOKENS), plain(TOKENS)
    torch.testing.assert_close(ours, theirs)
    ours.pow(2).sum().backward()
    theirs.pow(2).sum().backward()
    for our, their in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-4, atol=1e-5)


def test_everything_of_the_model_stays(model):
    ran = []
    model.first.register_forward_hook(lambda *_: ran.append("hook"))
    model.first.register_full_backward_hook(lambda *_: ran.append("backward"))
    model.first.weight.requires_grad_(False)
    model.layers[0].eval()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    objects = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: id(weight) for name, weight in model.named_parameters()}
    flags = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())

    fastseq.accelerate(model, verbose=False)

    assert objects == {name: id(module) for name, module in model.named_modules()}
    assert parameters == {name: id(weight) for name, weight in model.named_parameters()}
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert not model.first.weight.requires_grad
    assert model.alias is model.norm
    assert model.head.weight is model.embedding.weight
    assert isinstance(model.first, nn.LayerNorm)
    assert repr(model.first) == repr(nn.LayerNorm(8))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    model.load_state_dict(state)

    before = model.norm.weight.detach().clone()
    model(TOKENS).sum().backward()
    optimizer.step()
    assert ran == ["hook", "backward"]
    assert not torch.equal(model.norm.weight, before)


def test_deepcopy_and_pickle(model):
    fastseq.accelerate(model, verbose=False)
    expected = model(TOKENS)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        assert type(copied.first) is fastseq.nn.LayerNorm
        assert copied.alias is copied.norm
        assert torch.equal(copied(TOKENS), expected)


def test_restore_brings_torchs_classes_back(model):
    before = {name: type(module) for name, module in model.named_modules()}
    dictionaries = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert fastseq.restore(fastseq.accelerate(model, verbose=False)) is model
    assert before == {name: type(module) for name, module in model.named_modules()}
    for name, module in model.named_modules():
        assert vars(module) == dictionaries[name]
    assert set(decisions(model).values()) == {READY}
    fastseq.restore(model)  # a second time there is nothing to do
    assert before == {name: type(module) for name, module in model.named_modules()}


def test_moves_dtypes_and_meta(model):
    fastseq.accelerate(model, verbose=False)
    assert model.double()(TOKENS).dtype == torch.float64
    assert model.to("meta")(TOKENS.to("meta")).shape == (3, 4, 11)


# --- the selection -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "swapped"),
    [
        ({"include": ["first"]}, {"first"}),
        ({"include": "layers.*"}, {"layers.0.0", "layers.1.0"}),
        ({"include": ["layers.1"]}, {"layers.1.0"}),
        ({"include": [nn.RMSNorm]}, {"norm"}),
        ({"include": nn.Sequential}, {"layers.0.0", "layers.1.0"}),
        ({"include": ["alias"]}, {"norm"}),
        ({"include": []}, set()),
        ({"exclude": ["layers"]}, {"first", "norm"}),
        ({"exclude": [nn.LayerNorm]}, {"norm"}),
        ({"exclude": ["alias", "first"]}, {"layers.0.0", "layers.1.0"}),
        ({"exclude": ["*"]}, set()),
        ({"include": ["layers.*"], "exclude": ["*.1.*"]}, {"layers.0.0"}),
        ({"filter_fn": lambda module, fqn: fqn.endswith(".0")}, {"layers.0.0", "layers.1.0"}),
        ({"filter_fn": lambda module, fqn: isinstance(module, nn.RMSNorm)}, {"norm"}),
    ],
)
def test_selection(model, selection, swapped):
    fastseq.accelerate(model, verbose=False, **selection)
    assert {fqn for fqn, decision in decisions(model).items() if decision == SWAPPED} == swapped
    assert len(decisions(model)) == 4


def test_summary_counts_what_is_left(model, capsys):
    fastseq.accelerate(model, exclude=["layers"])
    assert capsys.readouterr().out == (
        "fastseq: accelerated 2 of 4 modules (1 LayerNorm, 1 RMSNorm); 2 left as they are: "
        "fastseq.explain(model)\n"
    )


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("wrong", [[3], [int], [nn.LayerNorm(2)]])
def test_a_wrong_selection_names_itself(model, argument, wrong):
    with pytest.raises(TypeError, match=f"accelerate: {argument} must hold"):
        fastseq.accelerate(model, **{argument: wrong})
    assert set(decisions(model).values()) == {READY}


@pytest.mark.parametrize("function", [fastseq.accelerate, fastseq.restore])
def test_wants_a_module(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        function(3)


def test_an_error_in_the_filter_changes_nothing(model):
    def broken(module, fqn):
        if fqn == "norm":
            raise KeyError("mine")
        return True

    with pytest.raises(KeyError, match="mine"):
        fastseq.accelerate(model, filter_fn=broken)
    assert set(decisions(model).values()) == {READY}


# --- the backend ---------------------------------------------------------------------------------


def test_backend_is_forced(model):
    try:
        fastseq.accelerate(model, backend="reference", verbose=False)
        assert fastseq.current_backend() == "reference"
        ran = fastseq.explain(lambda: model(TOKENS).sum().backward()).calls
        assert {call.backend for call in ran} == {"reference"}
    finally:
        fastseq.use_backend("auto")


def test_auto_leaves_a_forced_backend(model):
    with fastseq.use_backend("reference"):
        fastseq.accelerate(model, verbose=False)
        assert fastseq.current_backend() == "reference"


def test_backend_unknown_or_unable(model, monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        fastseq.accelerate(model, backend="cudnn")
    unable = {"cuda": "torch sees no CUDA device"}
    monkeypatch.setitem(fastseq.accelerate.__globals__, "backends", lambda: unable)
    with pytest.raises(fastseq.BackendError, match=r"'cuda' cannot run here: torch sees no CUDA"):
        fastseq.accelerate(model, backend="cuda")
    assert fastseq.current_backend() == "auto"
    assert set(decisions(model).values()) == {READY}


def test_drop_in_classes_add_no_state():
    # What makes the swap right: torch's class with methods added, the same layout, no constructor
    # of its own (but for those that only swap what they contain, as accelerate does one by one).
    for theirs, ours in fastseq.nn.DROP_IN.items():
        *mixins, base = ours.__bases__
        assert base is theirs
        for mixin in mixins:
            assert mixin.__bases__ == (object,)
            assert not {"__init__", "__slots__"} & vars(mixin).keys()
        assert "__init__" not in vars(ours) or ours.__module__ == "fastseq.nn.transformer"
        assert "__slots__" not in vars(ours)
        assert ours.__module__.startswith("fastseq.nn")
        assert getattr(fastseq.nn, ours.__name__) is ours
        assert ours.__name__ == theirs.__name__
