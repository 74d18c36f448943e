"""accelerate, explain and restore: what is swapped, what is not, what stays, what is said."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.nn.utils.parametrize as parametrize
from torch import nn

import fastseq
from fastseq.backends import Decision
from fastseq.explain import BYPASSES, FASTSEQ, READY, SKIPPED, SWAPPED, Explanation


class MyNorm(nn.LayerNorm):
    """A subclass that computes something else."""

    def forward(self, input):
        return super().forward(input) * 2


class Model(nn.Module):
    """A bit of everything; `norm` is reached under two names, the head is tied."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.first = nn.LayerNorm(8)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in "ab")
        self.norm = nn.RMSNorm(8)
        self.alias = self.norm
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.first(self.embedding(tokens))
        for layer in self.layers:
            x = self.alias(x + layer(x))
        return self.head(self.norm(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


TOKENS = torch.arange(12).reshape(3, 4) % 11


def decisions(model):
    return {row.fqn: row.decision for row in fastseq.explain(model).modules}


def reason(model, fqn):
    return next(row.reason for row in fastseq.explain(model).modules if row.fqn == fqn)


class Calls:
    """Counts how often fastseq's LayerNorm runs; a hook would itself disable torch's fast path."""

    def __init__(self, monkeypatch):
        self.count = 0
        forward = fastseq.nn.LayerNorm.forward

        def counted(module, input):
            self.count += 1
            return forward(module, input)

        monkeypatch.setattr(fastseq.nn.LayerNorm, "forward", counted)


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


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


# --- what is not swapped, and why ----------------------------------------------------------------


def test_subclass_is_left_alone():
    model = nn.Sequential(MyNorm(8), nn.LayerNorm(8))
    fastseq.accelerate(model, verbose=False)
    assert type(model[0]) is MyNorm
    assert decisions(model) == {"0": SKIPPED, "1": SWAPPED}
    assert reason(model, "0").startswith("subclass")


def test_fastseqs_own_modules_are_named_as_such():
    class Mine(fastseq.nn.LayerNorm):
        pass

    model = nn.Sequential(fastseq.nn.AddLayerNorm(8), Mine(8), fastseq.nn.RMSNorm(8))
    assert decisions(model) == {"0": FASTSEQ, "1": FASTSEQ, "2": SWAPPED}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastseq.restore(model)
    assert [type(module) for module in model] == [fastseq.nn.AddLayerNorm, Mine, nn.RMSNorm]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized_before():
    model = nn.Sequential(nn.LayerNorm(8))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    before = type(model[0])
    fastseq.accelerate(model, verbose=False)
    assert type(model[0]) is before
    assert decisions(model) == {"0": SKIPPED}
    assert "dynamic class: ParametrizedLayerNorm" in reason(model, "0")


def test_parametrized_after(calls):
    model = fastseq.accelerate(nn.Sequential(nn.LayerNorm(8)), verbose=False)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    assert decisions(model) == {"0": FASTSEQ}
    x = torch.randn(2, 8)
    torch.testing.assert_close(model(x), 2 * nn.functional.layer_norm(x, (8,)))
    assert calls.count == 1
    with pytest.warns(UserWarning, match=r"restore: left 0 as it is.*ParametrizedLayerNorm"):
        fastseq.restore(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(fastseq.restore(model)[0]) is nn.LayerNorm


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_fully_shard(process_group):
    model = nn.Sequential(nn.LayerNorm(8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))
    plain = copy.deepcopy(model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for module in (model[0], model[1], model):
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    fastseq.accelerate(model, verbose=False)
    assert decisions(model) == {"0": SKIPPED, "1.0": SWAPPED}
    assert "dynamic class: FSDPLayerNorm" in reason(model, "0")
    x = torch.randn(2, 8)
    torch.testing.assert_close(model(x), plain(x))
    model(x).pow(2).sum().backward()
    plain(x).pow(2).sum().backward()
    grad = model[1][0].weight.grad.full_tensor()
    torch.testing.assert_close(grad, plain[1][0].weight.grad)


def test_instance_forward():
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    model[0].forward = lambda x: x
    fastseq.accelerate(model, verbose=False)
    assert type(model[0]) is nn.LayerNorm
    assert decisions(model) == {"0": SKIPPED, "1": SWAPPED}
    assert "del module.forward" in reason(model, "0")
    model[1].forward = lambda x: x  # set afterwards it hides ours just as well
    assert decisions(model) == {"0": SKIPPED, "1": SKIPPED}
    del model[0].forward
    fastseq.accelerate(model, verbose=False)
    assert decisions(model) == {"0": SWAPPED, "1": SKIPPED}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "compile", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2, 8))]
)
def test_torchscript(compile):
    compiled = compile(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))
    fastseq.accelerate(compiled, verbose=False)
    assert decisions(compiled) == {"0": SKIPPED}
    assert reason(compiled, "0").startswith("TorchScript")
    assert compiled(torch.randn(2, 8)).shape == (2, 8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trace_of_an_accelerated_model_runs_without_fastseq():
    model = fastseq.accelerate(nn.Sequential(nn.LayerNorm(8)), verbose=False)
    traced = torch.jit.trace(model, torch.randn(2, 8))
    assert "fastseq" not in str(traced.inlined_graph).replace("__torch__.fastseq", "")
    x = torch.randn(2, 8)
    torch.testing.assert_close(traced(x), nn.functional.layer_norm(x, (8,)))


def test_compiled_wrapper_is_searched_and_notices():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    fastseq.accelerate(compiled, verbose=False)
    assert decisions(compiled) == {"_orig_mod.0": SWAPPED}
    assert fastseq.explain(compiled, x).calls
    torch.testing.assert_close(compiled(x), before)
    fastseq.restore(compiled)
    assert not fastseq.explain(compiled, x).calls


def test_distributed_data_parallel(process_group, model):
    plain = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    fastseq.accelerate(wrapped, verbose=False)
    assert decisions(wrapped)["module.first"] == SWAPPED
    wrapped(TOKENS).pow(2).sum().backward()
    plain(TOKENS).pow(2).sum().backward()
    torch.testing.assert_close(model.first.weight.grad, plain.first.weight.grad)


def test_wrapped_like_lora():
    class Adapter(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.base_layer(x) * self.scale

    model = nn.Sequential(Adapter(nn.LayerNorm(8)))
    fastseq.accelerate(model, verbose=False)
    assert decisions(model) == {"0.base_layer": SWAPPED}
    assert type(model[0]) is Adapter


def test_strict_raises_before_anything_changes():
    model = nn.Sequential(nn.LayerNorm(8), MyNorm(8))
    with pytest.raises(RuntimeError, match=r"strict=True.*\n  1 \(MyNorm\): subclass"):
        fastseq.accelerate(model, strict=True)
    assert decisions(model) == {"0": READY, "1": SKIPPED}
    fastseq.accelerate(model, strict=True, exclude=[MyNorm], verbose=False)
    assert decisions(model) == {"0": SWAPPED, "1": SKIPPED}


# --- torch's encoder layer, which in eval does the work of its children --------------------------


def encoder_layer(**changes):
    options = {"dim_feedforward": 16, "batch_first": True, "dropout": 0.0} | changes
    return nn.TransformerEncoderLayer(8, nhead=2, **options)


def test_fast_path_bypasses_swapped_norms_and_explain_says_so(calls, capsys):
    class Renamed(nn.TransformerEncoderLayer):
        """Not swapped itself, as it might compute something else."""

    model = nn.Sequential(encoder_layer())
    model[0].__class__ = Renamed
    inside = ("0.norm1", "0.norm2", "0.self_attn")
    assert decisions(model) == {"0": BYPASSES, **dict.fromkeys(inside, READY)}
    fastseq.accelerate(model)
    assert "1 TransformerEncoderLayer bypass them in eval" in capsys.readouterr().out
    assert decisions(model) == {"0": BYPASSES, **dict.fromkeys(inside, SWAPPED)}
    assert "in eval 0 bypasses it" in reason(model, "0.norm1")
    assert "torch.backends.mha.set_fastpath_enabled(False)" in reason(model, "0")

    x = torch.randn(2, 3, 8)
    model(x)
    assert calls.count == 2
    model.eval()
    with torch.no_grad():
        fast = model(x)
        assert calls.count == 2  # this is what is reported
        torch.backends.mha.set_fastpath_enabled(False)
        try:  # and this is the advice
            torch.testing.assert_close(model(x), fast)
            assert calls.count == 4
            assert BYPASSES not in decisions(model).values()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def with_hook(layer):
    layer.norm1.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        encoder_layer(batch_first=False),
        encoder_layer(activation=torch.tanh),
        encoder_layer(bias=False),
        with_hook(encoder_layer()),
    ],
    ids=["not batch_first", "activation", "no bias", "hook"],
)
def test_no_bypass_is_reported_where_torch_takes_no_fast_path(layer, calls):
    fastseq.accelerate(layer, filter_fn=lambda m, _: type(m) is nn.LayerNorm, verbose=False)
    assert decisions(layer) == {
        "": READY, "self_attn": READY, "norm1": SWAPPED, "norm2": SWAPPED,
    }  # fmt: skip
    assert "bypasses" not in reason(layer, "norm1")
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(2, 3, 8))
    assert calls.count == 2


def test_a_layer_that_is_swapped_whole_bypasses_nothing(calls):
    layer = encoder_layer()
    assert set(decisions(layer).values()) == {READY}
    assert "bypasses" not in str(fastseq.explain(layer))
    norms = copy.deepcopy(layer)
    fastseq.accelerate(norms, filter_fn=lambda m, _: type(m) is nn.LayerNorm, verbose=False)
    assert "never calls norm1, norm2" in reason(norms, "")
    fastseq.accelerate(norms, verbose=False)
    assert set(decisions(norms).values()) == {SWAPPED}
    assert "bypasses" not in str(fastseq.explain(norms))
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(norms.eval()(x), layer.eval()(x))


# --- explain -------------------------------------------------------------------------------------


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


def test_drop_in_classes_add_no_state():
    # What makes the swap right: one base, the same layout, and no constructor of its own (but for
    # those that only swap what they contain, as accelerate does one by one).
    for theirs, ours in fastseq.nn.DROP_IN.items():
        assert ours.__bases__ == (theirs,)
        assert "__init__" not in vars(ours) or ours.__module__ == "fastseq.nn.transformer"
        assert "__slots__" not in vars(ours)
        assert ours.__module__.startswith("fastseq.nn")
        assert getattr(fastseq.nn, ours.__name__) is ours
        assert ours.__name__ == theirs.__name__
