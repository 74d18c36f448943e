"""The public functions: ``torch.nn.functional``'s names and signatures, and fused ones beside."""

from .additive_attention import additive_attention
from .append_to_cache import append_to_cache
from .attention import attention
from .attention_weights import attention_weights
from .cross_entropy import cross_entropy
from .embedding import token_position_embedding
from .feed_forward import feed_forward
from .layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .linear_cross_entropy import linear_cross_entropy
from .recurrent import gru, lstm, rnn
from .recurrent_cell import gru_cell, lstm_cell, rnn_cell
from .rotary_embedding import rotary_embedding
from .sample import sample
from .scaled_dot_product_attention import scaled_dot_product_attention
from .softmax import log_softmax, masked_softmax, softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "additive_attention",
    "append_to_cache",
    "attention",
    "attention_weights",
    "cross_entropy",
    "feed_forward",
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
    "rotary_embedding",
    "sample",
    "scaled_dot_product_attention",
    "softmax",
    "token_position_embedding",
]
