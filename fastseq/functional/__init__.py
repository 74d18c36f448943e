"""The public functions: ``torch.nn.functional``'s names and signatures, and fused ones beside."""

from .cross_entropy import cross_entropy
from .layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .linear_cross_entropy import linear_cross_entropy
from .recurrent import gru, lstm, rnn
from .recurrent_cell import gru_cell, lstm_cell, rnn_cell
from .softmax import log_softmax, masked_softmax, softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "cross_entropy",
    "gru",
    "gru_cell",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "lstm",
    "lstm_cell",
    "masked_softmax",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "softmax",
]
