"""Small models of every kind, with inputs: from Hugging Face configurations, and written here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 97
#: Whether these are the models of the version that is pinned: before it some (T5, BERT) computed
#: attention by themselves, or by classes of other names.
PINNED = version("transformers").startswith("5.23.") if find_spec("transformers") else False
Inputs = dict[str, Tensor]


class Result(NamedTuple):
    """What models of this file return."""

    logits: Tensor
    loss: Tensor


@dataclass(frozen=True)
class Kind:
    """A model to be built, and a batch for it; ``model(**batch)`` has ``.loss`` and ``.logits``.

    ``valid`` names the 0/1 input that says which rows of the logits mean something.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Inputs]
    valid: str | None = None


def build(name: str) -> tuple[nn.Module, Inputs]:
    """In eval, with weights that make attention sharp and norms uneven."""
    torch.manual_seed(0)
    kind = KINDS[name]
    model, batch = kind.make().eval(), kind.batch()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(0.0, 1.0 / math.sqrt(parameter[0].numel()))
    return model, batch


# --- Hugging Face --------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def hugging_face(name: str, configuration: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, configuration)(**settings))

    return make


def without_dropout(*names: str) -> dict[str, float]:
    return dict.fromkeys(names, 0.0)


BERT_DROPOUT = without_dropout("hidden_dropout_prob", "attention_probs_dropout_prob")
WAV2VEC2_DROPOUT = without_dropout(
    *("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"),
    *("final_dropout", "layerdrop", "mask_time_prob", "mask_feature_prob"),
)


def tokens(batch: int = 2, length: int = 13, *, padding: str = "right", labels: bool = True):
    def make() -> Inputs:
        ids = torch.randint(3, VOCABULARY, (batch, length))
        valid = torch.ones(batch, length, dtype=torch.long)
        if padding == "right":
            valid[1:, -4:] = 0
        else:
            valid[1:, :4] = 0
        inputs = {"input_ids": ids * valid, "attention_mask": valid}
        if labels:
            inputs["labels"] = torch.where(valid.bool(), ids, -100)
        return inputs

    return make


def translation() -> Inputs:
    source = tokens(length=11, labels=False)()
    target = torch.randint(3, VOCABULARY, (2, 7))
    target[1, -2:] = -100
    return {**source, "labels": target}


def images() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}


def spectrograms() -> Inputs:
    return {
        "input_features": torch.randn(2, 8, 32),
        "labels": torch.randint(3, VOCABULARY, (2, 6)),
    }


def waves() -> Inputs:
    valid = torch.ones(2, 160, dtype=torch.long)
    valid[1, 120:] = 0
    return {
        "input_values": torch.randn(2, 160) * valid,
        "attention_mask": valid,
        "labels": torch.randint(1, 19, (2, 4)),
    }


# --- written here --------------------------------------------------------------------------------


class ViTBlock(nn.Module):
    """Pre-norm block with fused projection and layer scale, as timm has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.scale * self.proj(y)
        return x + self.mlp(self.norm2(x))


class TimmViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 32))
        self.positions = nn.Parameter(torch.randn(1, 17, 32))
        self.blocks = nn.Sequential(*(ViTBlock(32, 4) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Result:
        x = self.patches(pixel_values).flatten(2).mT
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x), 1) + self.positions
        logits = self.head(self.norm(self.blocks(x))[:, 0])
        return Result(logits=logits, loss=F.cross_entropy(logits, labels))


class Seq2Seq(nn.Module):
    """torch's Transformer, as it is."""

    def __init__(self, *, norm_first: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.transformer = nn.Transformer(
            *(32, 4, 2, 2, 48, dropout), batch_first=True, norm_first=norm_first
        )
        self.head = nn.Linear(32, VOCABULARY)
        self.criterion = nn.CrossEntropyLoss(ignore_index=-100)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Result:
        target = F.pad(labels.clamp(min=0), (1, 0))[:, :-1]
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], labels.device)
        padding = attention_mask == 0
        x = self.transformer(
            self.embedding(input_ids),
            self.embedding(target),
            tgt_mask=torch.isinf(causal),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        logits = self.head(x)
        return Result(logits=logits, loss=self.criterion(logits.flatten(0, 1), labels.flatten()))


class Tagger(nn.Module):
    """A two-layer bidirectional LSTM over packed sequences, a norm and a linear layer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.lstm = nn.LSTM(24, 16, 2, batch_first=True, bidirectional=True, dropout=dropout)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, VOCABULARY)
        self.criterion = nn.CrossEntropyLoss(ignore_index=-100)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Result:
        lengths = attention_mask.sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(input_ids), lengths, batch_first=True, enforce_sorted=False
        )
        x, _ = nn.utils.rnn.pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=input_ids.shape[1]
        )
        logits = self.head(self.norm(x))
        return Result(logits=logits, loss=self.criterion(logits.flatten(0, 1), labels.flatten()))


class ConvTransformer(nn.Module):
    """Strided convolutions with group norm over a wave, a position convolution with weight norm,
    torch's encoder layers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, 16, 4, stride=2, bias=False),
            nn.GroupNorm(4, 16),
            nn.GELU(),
            nn.Conv1d(16, 32, 4, stride=4),
            nn.GELU(),
        )
        position = nn.Conv1d(32, 32, 3, padding=1, groups=4)
        self.position = nn.utils.parametrizations.weight_norm(position, dim=2)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout, F.gelu, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32))
        self.head = nn.Linear(32, 5)

    def forward(self, input_values: Tensor, labels: Tensor) -> Result:
        x = self.features(input_values[:, None])
        x = (x + F.gelu(self.position(x))).mT
        logits = self.head(self.encoder(x))
        return Result(logits=logits, loss=F.cross_entropy(logits.mean(1), labels))


def frames() -> Inputs:
    return {"input_values": torch.randn(2, 160), "labels": torch.tensor([0, 3])}


# --- all of them ---------------------------------------------------------------------------------

KINDS: dict[str, Kind] = {
    "bert": Kind(
        hugging_face("BertForMaskedLM", "BertConfig", **SIZES, **TOKENS, **BERT_DROPOUT),
        tokens(),
        "attention_mask",
    ),
    "gpt2": Kind(
        hugging_face(
            "GPT2LMHeadModel",
            "GPT2Config",
            **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
            **TOKENS,
            **without_dropout("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        ),
        tokens(padding="left"),
        "attention_mask",
    ),
    "t5": Kind(
        hugging_face(
            "T5ForConditionalGeneration",
            "T5Config",
            **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
            **{"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "dropout_rate": 0.0},
        ),
        translation,
    ),
    "vit": Kind(
        hugging_face(
            "ViTForImageClassification",
            "ViTConfig",
            **{**SIZES, "image_size": 16, "patch_size": 4},
            **BERT_DROPOUT,
        ),
        images,
    ),
    "whisper": Kind(
        hugging_face(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
            **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 16},
            **{"max_target_positions": 64, "decoder_start_token_id": 1},
            **TOKENS,
        ),
        spectrograms,
    ),
    "llama": Kind(
        hugging_face("LlamaForCausalLM", "LlamaConfig", **SIZES, **TOKENS, **GROUPED),
        tokens(padding="left"),
        "attention_mask",
    ),
    "gemma2": Kind(
        hugging_face(
            "Gemma2ForCausalLM",
            "Gemma2Config",
            **{**SIZES, **TOKENS, **GROUPED, "sliding_window": 5, "query_pre_attn_scalar": 8},
            # Some versions' sdpa leaves the softcap out.
            **{"attn_logit_softcapping": 2.0, "attn_implementation": "eager"},
        ),
        tokens(),
        "attention_mask",
    ),
    "gemma3": Kind(
        hugging_face(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **{**SIZES, **TOKENS, **GROUPED, "sliding_window": 5, "query_pre_attn_scalar": 8},
            layer_types=["sliding_attention", "full_attention"],
        ),
        tokens(),
        "attention_mask",
    ),
    "gpt_oss": Kind(
        hugging_face(
            "GptOssForCausalLM",
            "GptOssConfig",
            **{**SIZES, **TOKENS, **GROUPED, "sliding_window": 5},
            **{"num_local_experts": 2, "num_experts_per_tok": 2, "experts_implementation": "eager"},
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        tokens(),
        "attention_mask",
    ),
    "wav2vec2": Kind(
        hugging_face(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            **{**SIZES, "vocab_size": 20, "conv_dim": (16, 16), "conv_stride": (2, 4)},
            **{"conv_kernel": (4, 4), "num_feat_extract_layers": 2, "pad_token_id": 0},
            **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
            **WAV2VEC2_DROPOUT,
        ),
        waves,
    ),
    "timm_vit": Kind(TimmViT, images),
    "transformer": Kind(lambda: Seq2Seq(norm_first=False), translation),
    "transformer_norm_first": Kind(lambda: Seq2Seq(norm_first=True), translation),
    "lstm_tagger": Kind(Tagger, tokens(), "attention_mask"),
    "conv_transformer": Kind(ConvTransformer, frames),
}
