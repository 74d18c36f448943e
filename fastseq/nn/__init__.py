"""Drop-in modules: ``torch.nn``'s subclassed, with their constructor, state_dict and semantics."""

import torch

from .additive_attention import AdditiveAttention
from .attention import MultiheadAttention
from .cross_entropy import CrossEntropyLoss
from .embedding import TokenPositionEmbedding
from .feed_forward import FeedForward
from .layer_norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from .positional import LearnedPositionalEncoding, SinusoidalPositionalEncoding
from .recurrent import (
    GRU,
    LSTM,
    RNN,
    GRUCell,
    LayerNormGRU,
    LayerNormLSTM,
    LSTMCell,
    RNNCell,
)
from .rotary_embedding import RotaryEmbedding
from .softmax import LogSoftmax, Softmax
from .transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

#: torch's class -> ours, for ``fastseq.accelerate``: direct subclasses without state of their own.
DROP_IN: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.CrossEntropyLoss: CrossEntropyLoss,
    torch.nn.GRU: GRU,
    torch.nn.GRUCell: GRUCell,
    torch.nn.LSTM: LSTM,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.LogSoftmax: LogSoftmax,
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.RMSNorm: RMSNorm,
    torch.nn.RNN: RNN,
    torch.nn.RNNCell: RNNCell,
    torch.nn.Softmax: Softmax,
    torch.nn.Transformer: Transformer,
    torch.nn.TransformerDecoder: TransformerDecoder,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.TransformerEncoder: TransformerEncoder,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
}

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AddLayerNorm",
    "AddRMSNorm",
    "AdditiveAttention",
    "CrossEntropyLoss",
    "FeedForward",
    "GRUCell",
    "LSTMCell",
    "LayerNorm",
    "LayerNormGRU",
    "LayerNormLSTM",
    "LearnedPositionalEncoding",
    "LogSoftmax",
    "MultiheadAttention",
    "RMSNorm",
    "RNNCell",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "Softmax",
    "TokenPositionEmbedding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
