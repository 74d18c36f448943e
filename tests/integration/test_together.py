"""What people do with models, done with accelerated ones: compile, checkpoint, export, copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq.explain import LEFT, READY, SWAPPED
from integration.models import Inputs, Seq2Seq, Tagger, build

pytest.importorskip("transformers")

#: What a whole model makes of other roundings: of one pass, of some steps of training, in fp16.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
AFTER_STEPS = {"rtol": 1e-3, "atol": 1e-3}
IN_FP16 = {"rtol": 2e-2, "atol": 2e-2}
#: The same kernels on the same numbers, but for the order in which gradients are added up.
REPEATED = {"rtol": 1e-6, "atol": 1e-6}

WHOLE = ["bert", "gpt2", "llama", "gemma2", "t5", "vit", "timm_vit", "transformer", "lstm_tagger"]


def both(name: str) -> tuple[nn.Module, nn.Module, Inputs]:
    """The model as it is, an accelerated copy, and a batch."""
    model, batch = build(name)
    return model, fastseq.accelerate(copy.deepcopy(model), verbose=False), batch


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model: nn.Module, batch: Inputs, *, steps: int = 3, seed: int = 0) -> list[float]:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def sizes(batch: Inputs, rows: int) -> Inputs:
    return {name: tensor[:rows] for name, tensor in batch.items()}


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "timm_vit", "transformer"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("bert", "gpt2", "gemma2", "t5", "vit")
        ),
    ],
)
def test_compiles_whole_where_torchs_own_does(name: str) -> None:
    """In one graph, forward and backward. A packed LSTM is none in torch either, nor is a loop over
    experts."""
    model, ours, batch = both(name)
    if name == "gpt2":  # else the library logs a warning, which is no graph
        ours.loss_type = "ForCausalLM"
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    result, expected = compiled(**batch), model(**batch)
    assert_close(result.loss, expected.loss, **CLOSE)
    result.loss.backward()
    expected.loss.backward()
    assert_close(gradients(ours), gradients(model), **CLOSE)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_compiles_for_every_batch_at_once(name: str) -> None:
    model, ours, batch = both(name)
    frames: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        frames.append(1)
        return graph.forward

    compiled = torch.compile(ours, dynamic=True, backend=backend)
    many = {n: torch.cat((t, t.roll(1, 0), t[:1])) for n, t in batch.items()}
    with torch.no_grad():
        for rows in (2, 3, 4, 5):
            assert_close(
                compiled(**sizes(many, rows)).logits, model(**sizes(many, rows)).logits, **CLOSE
            )
    reached = len(frames)
    with torch.no_grad():
        compiled(**sizes({n: torch.cat((t, t)) for n, t in many.items()}, 7))
    assert len(frames) == reached


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_for_every_length_at_once() -> None:
    """Without a mask: causal attention is told from decoding by the number of queries."""
    model, ours, batch = both("llama")
    compiled = torch.compile(ours, dynamic=True, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for length in (13, 7, 9):
            ids = batch["input_ids"][:, :length]
            expected = model(input_ids=ids, use_cache=False).logits
            assert_close(compiled(input_ids=ids, use_cache=False).logits, expected, **CLOSE)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_tagger_compiles_with_torchs_own_breaks() -> None:
    model, ours, batch = both("lstm_tagger")
    compiled = torch.compile(ours, backend="aot_eager")
    assert_close(compiled(**batch).loss, model(**batch).loss, **CLOSE)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compiles_by_inductor(name: str) -> None:
    model, ours, batch = both(name)
    compiled = torch.compile(ours, fullgraph=True)
    assert_close(train(compiled, batch), train(model, batch), **AFTER_STEPS)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5", "transformer", "lstm_tagger"])
def test_training_goes_the_same_way(name: str) -> None:
    model, ours, batch = both(name)
    assert_close(train(ours, batch), train(model, batch), **AFTER_STEPS)
    assert_close(ours.state_dict(), model.state_dict(), **AFTER_STEPS)


class Checkpointed(nn.Module):
    """Every layer of torch's encoder inside a checkpoint."""

    def __init__(self, encoder: nn.TransformerEncoder, *, reentrant: bool | None) -> None:
        super().__init__()
        self.encoder, self.reentrant = encoder, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder.layers:
            if self.reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_dropout_again(reentrant: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.4, batch_first=True)
    encoder = fastseq.accelerate(nn.TransformerEncoder(layer, 2), verbose=False).train()
    x = torch.randn(2, 9, 32, requires_grad=True)
    results = []
    for how in (None, reentrant):
        encoder.zero_grad()
        x.grad = None
        torch.manual_seed(7)
        loss = Checkpointed(encoder, reentrant=how)(x).pow(2).sum()
        loss.backward()
        results.append((loss.detach(), x.grad, gradients(encoder)))
    assert_close(results[0], results[1], **REPEATED)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_checkpoints_of_the_library_draw_the_same_dropout_again(name: str) -> None:
    _, ours, batch = both(name)
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    results = []
    for enabled in (False, True):
        if enabled:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours.train().zero_grad()
        torch.manual_seed(3)
        loss = ours(**batch).loss
        loss.backward()
        results.append((loss.detach(), gradients(ours)))
    assert_close(results[0], results[1], **REPEATED)
    torch.manual_seed(4)
    assert not torch.equal(ours(**batch).loss, results[0][0])


def test_gradients_accumulate() -> None:
    model, ours, batch = both("vit")
    model(**batch).loss.backward()
    for row in range(2):
        (ours(**{n: t[row : row + 1] for n, t in batch.items()}).loss / 2).backward()
    assert_close(gradients(ours), gradients(model), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16])
def test_scaler_and_autocast(dtype: torch.dtype) -> None:
    def run(model: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler, losses = torch.amp.GradScaler("cpu", init_scale=256.0), []
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            assert torch.isfinite(norm)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert scaler.get_scale() == 256.0
        return losses

    model, ours, batch = both("llama")
    assert_close(run(ours), run(model), **IN_FP16)


# --- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "strict"),
    [
        *(("bert", False), ("llama", True), ("transformer", False)),
        *(
            pytest.param(name, strict, marks=pytest.mark.slow)
            for name, strict in (("bert", True), ("llama", False), ("vit", True), ("t5", False))
        ),
    ],
)
def test_exports(name: str, strict: bool) -> None:
    model, ours, batch = both(name)
    if name in ("bert", "llama"):
        ours.config.use_cache = model.config.use_cache = False

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ours

        def forward(self, **inputs: Tensor) -> Tensor:
            return self.model(**inputs).logits

    with torch.no_grad():
        program = torch.export.export(Logits(), (), kwargs=batch, strict=strict)
        names = {str(node.target) for node in program.graph.nodes}
        assert any(name.startswith("fastseq._") for name in names)
        assert_close(program.module()(**batch), model(**batch).logits, **CLOSE)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traces_to_a_graph_without_fastseq() -> None:
    model, ours, batch = both("bert")
    ours.config.return_dict = False
    traced = torch.jit.trace(ours, (batch["input_ids"],))
    assert "fastseq::" not in str(traced.inlined_graph)
    assert_close(traced(batch["input_ids"])[0], model(batch["input_ids"]).logits, **CLOSE)


# --- copies, states, wrappers --------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_copies_pickles_and_states(name: str) -> None:
    model, ours, batch = both(name)
    with torch.no_grad():
        expected = ours(**batch).logits
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
            assert torch.equal(twin(**batch).logits, expected)
            fastseq.restore(twin)
            left = [row for row in fastseq.explain(twin) if "leaves no choice" not in row.reason]
            assert {row.decision for row in left} <= {READY, LEFT}
            assert SWAPPED in {row.decision for row in fastseq.explain(ours)}
    assert list(ours.state_dict()) == list(model.state_dict())
    for source, target in ((ours, model), (model, ours)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(0.01)
        target.load_state_dict(source.state_dict(), strict=True)
        with torch.no_grad():
            assert_close(target(**batch).logits, source(**batch).logits, **CLOSE)


def test_averaged_copies() -> None:
    model, ours, batch = both("llama")
    averages = []
    for each in (model, ours):
        average = AveragedModel(each, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for seed in range(2):
            train(each, batch, steps=1, seed=seed)
            average.update_parameters(each)
        averages.append(average.eval())
    rows = {row.decision for row in fastseq.explain(averages[1])}
    assert rows == {SWAPPED}
    assert_close(averages[1](**batch).logits, averages[0](**batch).logits, **AFTER_STEPS)


@pytest.mark.parametrize("before", [False, True])
def test_weight_norm_and_parametrisations(before: bool) -> None:
    """Of linear layers, before accelerating and after; norms say what to do instead."""

    def wrap(model: nn.Module) -> None:
        for module in list(model.modules()):
            if type(module) is nn.Linear:
                nn.utils.parametrizations.weight_norm(module)

    model, batch = build("llama")
    ours = copy.deepcopy(model)
    if before:
        wrap(ours)
    fastseq.accelerate(ours, verbose=False)
    if not before:
        wrap(ours)
    wrap(model)
    model(**batch).loss.backward()
    ours(**batch).loss.backward()
    assert_close(gradients(ours), gradients(model), **CLOSE)
    for module in list(ours.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    assert_close(ours(**batch).loss, model(**batch).loss, **CLOSE)


class LoRA(nn.Module):
    """A low-rank addition to a frozen layer, in its place."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


@pytest.mark.parametrize("name", ["llama", "bert", "transformer"])
@pytest.mark.parametrize("before", [False, True])
def test_low_rank_wrappers(name: str, before: bool) -> None:
    def wrap(model: nn.Module) -> None:
        torch.manual_seed(5)
        model.requires_grad_(False)
        for module in list(model.modules()):
            # torch's attention reads its output projection's weight, whoever wraps it.
            if isinstance(module, nn.MultiheadAttention):
                continue
            for child, layer in list(module.named_children()):
                if type(layer) is nn.Linear:
                    setattr(module, child, LoRA(layer))

    model, batch = build(name)
    ours = copy.deepcopy(model)
    if before:
        wrap(ours)
    fastseq.accelerate(ours, verbose=False)
    if not before:
        wrap(ours)
    wrap(model)
    # In eval torch's fast path of the encoder wants the wrapped layer's weight.
    model.train(name == "transformer")(**batch).loss.backward()
    ours.train(name == "transformer")(**batch).loss.backward()
    assert gradients(ours)
    assert_close(gradients(ours), gradients(model), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "bert", "timm_vit", "lstm_tagger"])
def test_functional_call(name: str) -> None:
    model, ours, batch = both(name)
    with torch.no_grad():
        values = {n: p + 0.05 for n, p in model.named_parameters()}
        call = torch.func.functional_call
        assert_close(
            call(ours, values, (), batch).logits, call(model, values, (), batch).logits, **CLOSE
        )


@pytest.mark.parametrize("name", ["llama", "timm_vit"])
def test_gradients_of_each_sample(name: str) -> None:
    """torch.func.grad under vmap over a functional call."""
    model, ours, batch = both(name)
    batch.pop("attention_mask", None)  # the library looks at its values
    results = []
    for each in (model, ours):
        values = {n: p.detach() for n, p in each.named_parameters()}

        def loss(values: Any, sample: Inputs, each: nn.Module = each) -> Tensor:
            inputs = {n: t[None] for n, t in sample.items()}
            if name == "llama":
                inputs["use_cache"] = False
            return torch.func.functional_call(each, values, (), inputs).loss

        results.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, batch))
    assert_close(results[1], results[0], **CLOSE)


@pytest.mark.parametrize(
    "make", [lambda: Seq2Seq(norm_first=True, dropout=0.3), lambda: Tagger(0.3)]
)
def test_dropout_of_whole_models_is_reproduced_by_the_seed(make: Callable[[], nn.Module]) -> None:
    _, batch = build("transformer")
    batch["labels"] = F.pad(batch["labels"], (0, 4), value=-100)
    ours = fastseq.accelerate(make(), verbose=False).train()
    start = copy.deepcopy(ours.state_dict())
    losses = []
    for seed in (1, 1, 2):
        ours.load_state_dict(start)
        losses.append(train(ours, batch, seed=seed))
    assert losses[0] == losses[1] != losses[2]


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "bert", "timm_vit"])
def test_cuda_graphs(name: str) -> None:
    model, ours, batch = both(name)
    model, ours = model.cuda(), ours.cuda()
    batch = {n: t.cuda() for n, t in batch.items()}
    batch.pop("attention_mask", None)  # the library looks at its values, which waits for the device
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                ours(**batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = ours(**batch).logits
        key = next(n for n in batch if n != "labels")
        batch[key].copy_(batch[key].roll(1, 0))
        graph.replay()
        assert_close(logits, model(**batch).logits, **AFTER_STEPS)
