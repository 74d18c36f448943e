"""What accelerate leaves alone, and the reasons that explain gives."""

import copy
import warnings

import pytest
import torch
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.nn.utils.parametrize as parametrize
from torch import nn

import fastseq
from fastseq.explain import BYPASSES, FASTSEQ, READY, SKIPPED, SWAPPED

from .accelerated_model import TOKENS, Model, decisions, reason


class MyNorm(nn.LayerNorm):
    """A subclass that computes something else."""

    def forward(self, input):
        return super().forward(input) * 2


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


def test_distributed_data_parallel(process_group):
    torch.manual_seed(0)
    model = Model()
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
