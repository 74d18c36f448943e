"""The attention interface of Hugging Face transformers: masks, caches, packing, generation."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastseq
import fastseq.integrations.transformers as integration
from fastseq.explain import READY, SKIPPED, SWAPPED
from integration.models import KINDS, PINNED, Seq2Seq, build

transformers = pytest.importorskip("transformers")

DECODERS = ["gpt2", "llama", "gemma2", "gemma3", "gpt_oss"]


@pytest.fixture(autouse=True)
def _registered() -> None:
    integration.register()


def accelerated(model: nn.Module) -> nn.Module:
    return fastseq.accelerate(copy.deepcopy(model), verbose=False)


# --- registration --------------------------------------------------------------------------------


def test_registers_function_and_mask_once() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)
    integration.register()
    assert (dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)) == before
    assert ALL_ATTENTION_FUNCTIONS["fastseq"] is integration.attention_forward
    assert "fastseq" in ALL_MASK_ATTENTION_FUNCTIONS


def test_importing_fastseq_does_not_import_transformers() -> None:
    code = "import sys, fastseq, torch; fastseq.accelerate(torch.nn.LayerNorm(4), verbose=False);"
    code += "fastseq.explain(torch.nn.LayerNorm(4)); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_transformers_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'transformers>=4\.57'"):
        integration.register()


def test_older_versions_keep_their_attention_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("llama")
    expected = model(**batch).logits
    monkeypatch.delattr(transformers.PreTrainedModel, "_can_set_attn_implementation")
    with pytest.raises(ImportError, match=r"transformers 4\.57 or newer, got "):
        integration.register()
    fastseq.accelerate(model, verbose=False)
    for row in fastseq.explain(model):
        attention = row.type == "LlamaAttention"
        assert row.decision == (SKIPPED if attention else SWAPPED)
        assert not attention or "is older than 4.57" in row.reason
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_chosen_by_name_like_any_other() -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.LlamaModel._from_config(config, attn_implementation="fastseq")
    assert model.config._attn_implementation == "fastseq"
    calls = fastseq.explain(model, torch.arange(9)[None])
    assert "scaled_dot_product_attention" in {call.op for call in calls} or any(
        "attention" in call.op for call in calls
    )
    fastseq.restore(model)
    assert model.config._attn_implementation == "sdpa"


# --- accelerate and restore ----------------------------------------------------------------------


#: Before it, T5's attention was no choice.
ON_PINNED = pytest.mark.skipif(not PINNED, reason="other models than of transformers 5.23")


@ON_PINNED
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_restore_brings_back_what_was_set(implementation: str) -> None:
    model, _ = build("t5")
    model.set_attn_implementation(implementation)
    fastseq.accelerate(model, verbose=False)
    assert model.config._attn_implementation == "fastseq"
    assert model.encoder.config._attn_implementation == "fastseq"
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in (model, *twins):
        fastseq.restore(twin)
        for part in (twin, twin.encoder, twin.decoder):
            assert part.config._attn_implementation == implementation


def test_what_somebody_has_set_since_stays() -> None:
    model, _ = build("llama")
    fastseq.accelerate(model, verbose=False)
    model.set_attn_implementation("eager")
    fastseq.restore(model)
    assert model.config._attn_implementation == "eager"
    fastseq.accelerate(model, verbose=False)
    fastseq.restore(model)
    assert model.config._attn_implementation == "eager"


@ON_PINNED
def test_a_part_of_a_model_with_a_configuration_of_its_own() -> None:
    model, _ = build("t5")
    fastseq.accelerate(model, include="encoder", verbose=False)
    assert model.encoder.config._attn_implementation == "fastseq"
    assert model.decoder.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"
    decisions = {row.decision for row in fastseq.explain(model.decoder)}
    assert decisions == {READY}
    fastseq.accelerate(model, verbose=False)
    assert model.decoder.config._attn_implementation == "fastseq"
    fastseq.restore(model)
    assert model.encoder.config._attn_implementation == "sdpa"
    assert model.decoder.config._attn_implementation == "sdpa"


def test_some_attention_of_one_configuration_is_none() -> None:
    """There is one setting for all layers: excluding one excludes all, norms apart."""
    model, _ = build("llama")
    fastseq.accelerate(model, exclude="model.layers.0", verbose=False)
    assert model.config._attn_implementation == "sdpa"
    rows = {row.fqn: row for row in fastseq.explain(model)}
    assert rows["model.layers.1.self_attn"].decision == READY
    assert "together" in rows["model.layers.1.self_attn"].reason
    assert rows["model.layers.1.input_layernorm"].decision == SWAPPED
    assert rows["model.layers.0.input_layernorm"].decision == READY


def test_a_model_inside_of_a_model_of_ones_own() -> None:
    inner, _ = build("llama")
    model = nn.ModuleDict(
        {"text": inner, "head": nn.LayerNorm(4), "other": Seq2Seq(norm_first=True)}
    )
    fastseq.accelerate(model, verbose=False)
    assert inner.config._attn_implementation == "fastseq"
    fastseq.restore(model)
    assert inner.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("Bloom", {"n_layer": 1, "n_head": 4, "vocab_size": 9}, "leaves no choice"),
        ("DebertaV2", {"num_hidden_layers": 1, "num_attention_heads": 4}, "leaves no choice"),
    ],
)
def test_models_that_leave_no_choice_are_skipped_with_the_reason(name, settings, words) -> None:
    config = getattr(transformers, f"{name}Config")(hidden_size=32, **settings)
    model = getattr(transformers, f"{name}Model")(config)
    fastseq.accelerate(model, verbose=False)
    rows = [row for row in fastseq.explain(model) if "Attention" in row.type]
    assert [row.decision for row in rows] == [SKIPPED]
    assert words in rows[0].reason
    with pytest.raises(RuntimeError, match=words):
        fastseq.accelerate(model, strict=True)


def test_an_implementation_that_was_asked_for_is_kept() -> None:
    model, _ = build("llama")
    model.set_attn_implementation("flex_attention")
    fastseq.accelerate(model, verbose=False)
    assert model.config._attn_implementation == "flex_attention"
    row = next(row for row in fastseq.explain(model) if "Attention" in row.type)
    assert row.decision == SKIPPED
    assert "flex_attention" in row.reason
    attention = next(m for m in model.modules() if type(m).__name__ == "LlamaAttention")
    row = fastseq.explain(attention).modules[0]
    assert row.decision == SKIPPED
    assert "whole model" in row.reason


def test_saved_models_do_not_know(tmp_path) -> None:
    model, batch = build("llama")
    ours = accelerated(model)
    ours.save_pretrained(tmp_path)
    assert "fastseq" not in (tmp_path / "config.json").read_text()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    model.load_state_dict(ours.state_dict())
    ours.load_state_dict(model.state_dict())


def test_the_weights_of_attention_where_they_are_asked_for() -> None:
    model, batch = build("llama")
    ours = accelerated(model)
    model.set_attn_implementation("eager")
    expected = model(**batch, output_attentions=True)
    got = ours(**batch, output_attentions=True)
    seen = batch["attention_mask"].bool()
    assert len(got.attentions) == 2
    for our, their in zip(got.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(our.transpose(1, 2)[seen], their.transpose(1, 2)[seen])
    torch.testing.assert_close(got.logits[seen], expected.logits[seen], rtol=1e-4, atol=1e-5)


# --- the function against the library's own ------------------------------------------------------

B, H, HK, LQ, LK, D = 2, 4, 2, 5, 9, 8


def arguments(*, queries: int = LQ, keys: int = LK, heads: int = HK):
    query = torch.randn(B, H, queries, D, requires_grad=True)
    key, value = (torch.randn(B, heads, keys, D, requires_grad=True) for _ in "kv")
    return query, key, value


def module(**attributes: object) -> nn.Module:
    made = nn.Module()
    vars(made).update(num_key_value_groups=H // HK, **attributes)
    return made


def random_mask() -> torch.Tensor:
    mask = torch.rand(B, 1, LQ, LK) > 0.4
    mask[..., 0] = True
    return mask


MASKS = {
    "none": lambda: None,
    "boolean": random_mask,
    "additive": lambda: torch.where(random_mask(), 0.0, torch.finfo(torch.float32).min),
    "per_head": lambda: random_mask().expand(B, H, LQ, LK),
    "longer": lambda: torch.cat((random_mask(), torch.ones(B, 1, LQ, 3, dtype=torch.bool)), -1),
}
EXTRAS = {
    "plain": {},
    "scaled": {"scaling": 0.3},
    "bidirectional": {"is_causal": False},
    "bias": {"position_bias": True},
    "softcap": {"softcap": 1.5},
    "sinks": {"s_aux": True},
    "all": {"scaling": 0.7, "position_bias": True, "softcap": 2.0, "s_aux": True},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", [False, True])
def test_the_function_is_the_formula(mask: str, extra: str, weights: bool) -> None:
    """Results and gradients, sinks' and biases' too."""
    query, key, value = arguments()
    attention_mask, options = MASKS[mask](), dict(EXTRAS[extra])
    learned = {}
    if options.pop("position_bias", False):
        learned["position_bias"] = torch.randn(1, H, LQ, LK, requires_grad=True)
    if options.pop("s_aux", False):
        learned["s_aux"] = torch.randn(H, requires_grad=True)
    output, given = integration.attention_forward(
        module(), query, key, value, attention_mask, **options, **learned, output_attentions=weights
    )
    assert (given is not None) == weights
    assert output.shape == (B, LQ, H, D)

    k, v = (x.repeat_interleave(H // HK, 1) for x in (key, value))
    scores = query @ k.mT * options.get("scaling", D**-0.5)
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores + learned.get("position_bias", 0.0)
    if attention_mask is None:
        if options.get("is_causal", True):
            seen = torch.ones(LQ, LK, dtype=torch.bool).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
    elif attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask[..., :LK], -torch.inf)
    else:
        scores = scores + attention_mask[..., :LK]
    if "s_aux" in learned:
        sinks = learned["s_aux"].view(1, H, 1, 1).expand(B, H, LQ, 1)
        probabilities = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)
    expected = (probabilities @ v).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    if weights:
        torch.testing.assert_close(given, probabilities, rtol=1e-4, atol=1e-5)
    inputs, upstream = (query, key, value, *learned.values()), torch.randn_like(expected)
    for our, their in zip(
        torch.autograd.grad(output, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def test_windows_without_a_mask() -> None:
    query, key, value = arguments(queries=LK)
    output, _ = integration.attention_forward(module(), query, key, value, None, sliding_window=3)
    i, j = torch.arange(LK)[:, None], torch.arange(LK)
    mask = ((j <= i) & (j > i - 3)).expand(B, 1, LK, LK)
    expected, _ = integration.attention_forward(module(), query, key, value, mask, sliding_window=3)
    torch.testing.assert_close(output, expected)


def test_padding_of_keys_alone() -> None:
    query, key, value = arguments()
    padding = torch.ones(B, LK, dtype=torch.long)
    padding[1, -3:] = 0
    output, _ = integration.attention_forward(module(), query, key, value, padding)
    expected, _ = integration.attention_forward(
        module(), query, key, value, padding.bool()[:, None, None].expand(B, 1, LQ, LK)
    )
    torch.testing.assert_close(output, expected)


def test_packed_sequences_by_their_starts() -> None:
    """As the collator that flattens batches gives them, and as a mask says it."""
    starts = torch.tensor([0, 3, 4, LK], dtype=torch.int32)
    query, key, value = (x[:1] for x in arguments(queries=LK))
    output, _ = integration.attention_forward(
        *(module(), query, key, value, None), cu_seq_lens_q=starts, cu_seq_lens_k=starts
    )
    number = torch.bucketize(torch.arange(LK), starts, right=True)
    mask = (number[:, None] == number) & torch.ones(LK, LK, dtype=torch.bool).tril()
    expected, _ = integration.attention_forward(module(), query, key, value, mask[None, None])
    torch.testing.assert_close(output, expected)


def test_dropout_is_drawn_from_torchs_generator() -> None:
    query, key, value = arguments()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(integration.attention_forward(
            module(), query, key, value, None, dropout=0.5)[0])  # fmt: skip
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_what_is_not_served_raises() -> None:
    given = (module(), *arguments())
    with pytest.raises(ValueError, match="paged cache"):
        integration.attention_forward(*given, None, cache=object())
    with pytest.raises(ValueError, match="one for each of the 4 heads"):
        integration.attention_forward(*given, None, s_aux=torch.zeros(B, H, LQ, 1))
    with pytest.raises(TypeError, match="attention_mask must be a tensor"):
        integration.attention_forward(*given, SimpleNamespace())


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_causal_models_do_not_look_ahead(name: str) -> None:
    model, batch = build(name)
    ours = accelerated(model)
    ids = batch["input_ids"][:1]
    changed = ids.clone()
    changed[:, 8:] = 5
    with torch.no_grad():
        before, after = ours(input_ids=ids).logits, ours(input_ids=changed).logits
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_packed_by_positions(name: str) -> None:
    """Two sequences in one row give what they give alone, where the library tells its masks."""
    model, batch = build(name)
    ours = accelerated(model)
    ids = batch["input_ids"][:1]
    positions = torch.cat((torch.arange(6), torch.arange(7)))[None]
    with torch.no_grad():
        packed = ours(input_ids=ids, position_ids=positions, use_cache=False).logits
        for part in (slice(0, 6), slice(6, 13)):
            alone = model(input_ids=ids[:, part], use_cache=False).logits
            torch.testing.assert_close(packed[:, part], alone, rtol=1e-4, atol=1e-4)


GENERATIONS = {
    "greedy": {},
    "static_cache": {"cache_implementation": "static", "disable_compile": True},
    "no_cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=[] if how in usual or name == "llama" else pytest.mark.slow)
        for name in [*DECODERS, "t5", "whisper"]
        for how in GENERATIONS
        for usual in [{"static_cache"} if name in ("gemma3", "t5") else {"greedy"}]
    ],
)
def test_generates_the_same_tokens(name: str, how: str) -> None:
    model, batch = build(name)
    ours = accelerated(model)
    prompt = {n: t for n, t in batch.items() if n != "labels"}
    if KINDS[name].valid and not bool(prompt["attention_mask"][:, -1].all()):
        prompt = {n: t.flip(1) for n, t in prompt.items()}  # generation wants padding in front
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, **GENERATIONS[how]}
    results = []
    for which in (model, ours):
        torch.manual_seed(0)
        results.append(which.generate(**prompt, **settings))
    assert results[0].shape[1] >= 8
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_prefill_in_chunks_with_a_cache(name: str) -> None:
    model, batch = build(name)
    ours, ids = accelerated(model), batch["input_ids"][:1]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache, logits = transformers.DynamicCache(config=ours.config), []
        for part in (slice(0, 5), slice(5, 9), slice(9, 10), slice(10, 13)):
            step = ours(input_ids=ids[:, part], past_key_values=cache, use_cache=True)
            logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)


DROPPING = {
    "bert": {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.3},
    "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.3},
    "t5": {"dropout_rate": 0.3},
    "llama": {"attention_dropout": 0.3},
    "whisper": {"attention_dropout": 0.3, "dropout": 0.3},
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_in_training_is_reproduced_by_the_seed(name: str) -> None:
    model, batch = build(name)
    config = copy.deepcopy(model.config)
    for key, value in DROPPING[name].items():
        setattr(config, key, value)
    twin = type(model)(config)
    twin.load_state_dict(model.state_dict())
    ours = fastseq.accelerate(twin, verbose=False).train()
    losses, gradients = [], []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        ours.zero_grad()
        loss = ours(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert torch.isfinite(losses[0])
    assert torch.equal(losses[0], losses[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients[:2], strict=True))
    assert not torch.equal(losses[0], losses[2])
    ours.eval()
    torch.testing.assert_close(ours(**batch).loss, model(**batch).loss, rtol=1e-4, atol=1e-5)
