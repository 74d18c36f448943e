"""Drop-in modules: ``torch.nn``'s subclassed, with their constructor, state_dict and semantics."""

import torch

from .cross_entropy import CrossEntropyLoss
from .layer_norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
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
from .softmax import LogSoftmax, Softmax

#: torch's class -> ours, for ``fastseq.accelerate``: direct subclasses without state of their own.
DROP_IN: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.CrossEntropyLoss: CrossEntropyLoss,
    torch.nn.GRU: GRU,
    torch.nn.GRUCell: GRUCell,
    torch.nn.LSTM: LSTM,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.LogSoftmax: LogSoftmax,
    torch.nn.RMSNorm: RMSNorm,
    torch.nn.RNN: RNN,
    torch.nn.RNNCell: RNNCell,
    torch.nn.Softmax: Softmax,
}

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AddLayerNorm",
    "AddRMSNorm",
    "CrossEntropyLoss",
    "GRUCell",
    "LSTMCell",
    "LayerNorm",
    "LayerNormGRU",
    "LayerNormLSTM",
    "LogSoftmax",
    "RMSNorm",
    "RNNCell",
    "Softmax",
]
